"""From a traced network to units: which nodes run as one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..integer.products import headroom
from ..integer.rule import IntegerRule
from ..nn.integer_layers import IntegerConv2d, IntegerLayer, IntegerLinear
from ..nn.l1_norm import L1BatchNorm, QuantizedL1BatchNorm, QuantizedL1BatchNorm2d
from .linear import Linear
from .mean import Mean, is_flatten, is_mean
from .torch_op import TorchOp
from .units import ConvNorm, Join, MaxPool, Unit

RECTIFIERS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
SUMS = (operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__")


LEAVES = (f"{__package__.rpartition('.')[0]}.nn.", f"{__package__.rpartition('.')[0]}.quantizers.")
MOST_POSITIONS = 256  # of a pooling window: they are kept as bytes
Pair = tuple[int, int]


class FuseError(ValueError):
    """A network that cannot run as a fused step; the text says why."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = f"{m.__class__.__module__}.".startswith(LEAVES)  # what they do may depend on the precision
        return ours or isinstance(m, IntegerLayer | L1BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The model's graph, of one tensor to one tensor.

    Raises:
        FuseError: the forward pass depends on values, or has several inputs or results.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise FuseError(
            f"fuse: the forward pass of {type(model).__name__} cannot be traced ({type(error).__name__}: {error})"
        ) from error
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    results = [n for n in graph.nodes if n.op == "output"]
    if len(inputs) != 1 or not isinstance(results[0].args[0], fx.Node):
        raise FuseError(
            f"fuse: {type(model).__name__} must take one tensor and return one, its forward takes {len(inputs)} "
            "arguments" + ("" if len(inputs) != 1 else " and returns a structure")
        )
    _bypass_identities(model, graph)
    return graph


def _bypass_identities(model: nn.Module, graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if (
            node.op == "call_module"
            and type(model.get_submodule(str(node.target))) is nn.Identity
            and len(node.args) == 1
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def plain(module: nn.Module) -> bool:
    """Nobody watches the module: no hooks that a fused step would pass over."""
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _products_fit(layer: IntegerConv2d, rule: IntegerRule) -> bool:
    taps = layer.weight.shape[2] * layer.weight.shape[3]
    inner_in, inner_out = layer.weight.shape[1] * taps, layer.weight.shape[0] // layer.groups * taps
    groups = rule.shift_groups
    return (
        headroom(rule.a, groups, inner_in, other_bits=rule.w, signed=not rule.unsigned_nonneg).fits
        and headroom(rule.grad_bits, rule.grad_groups, inner_out, other_bits=rule.w).fits
    )


def _integer_conv(module: nn.Module) -> bool:
    if type(module) is not IntegerConv2d or not plain(module):
        return False
    rule = module.rule
    return (
        module.bias is None
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and rule.act_rounding == "nearest"
        and _products_fit(module, rule)
    )


def _integer_norm(module: nn.Module) -> bool:
    return (
        type(module) is QuantizedL1BatchNorm2d
        and plain(module)
        and module.engine_rule() is not None
        and module.running_mean.dtype == torch.float32
    )


class Planner:
    """Goes through a graph once and collects units; this one those of training in integers.

    Attributes:
        fused: names of the convolutions in fused units.
    """

    wanted = (
        "convolution (IntegerConv2d without bias) that only a QuantizedL1BatchNorm2d reads; make it one with "
        "integer_(model, example), on the CPU"
    )

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.graph = model, graph
        self.modules = dict(model.named_modules())
        self.units: list[Unit] = []
        self.fused: list[str] = []
        self._done: set[fx.Node] = set()

    def _module(self, node: fx.Node | Any) -> nn.Module | None:
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.modules[str(node.target)]
        return None

    def _is(self, node: fx.Node, functions: tuple[Any, ...]) -> bool:
        return node.op in ("call_function", "call_method") and node.target in functions

    def _writes(self, node: fx.Node, module: nn.Module | None) -> bool:
        """Whether the operation may write into its argument."""
        if module is not None:
            return bool(getattr(module, "inplace", False))
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        in_place = str(name).endswith("_") and not str(name).endswith("__")
        return (
            in_place
            or node.target in (operator.iadd, operator.imul, operator.isub)
            or node.kwargs.get("inplace") is True
        )

    def _rectifies(self, node: fx.Node) -> bool:
        module = self._module(node)
        return (type(module) is nn.ReLU and plain(module)) if module is not None else self._is(node, RECTIFIERS)

    def _only(self, node: fx.Node, test: Callable[[fx.Node], bool]) -> fx.Node | None:
        """The only node that reads it, if it passes the test."""
        users = list(node.users)
        return users[0] if len(users) == 1 and test(users[0]) else None

    def _conv_norm(self, node: fx.Node) -> fx.Node | None:
        """The normalization that alone reads a convolution, if both can be fused."""
        conv = self._module(node)
        if conv is None or len(node.args) != 1 or node.kwargs or not self._fusable_conv(conv):
            return None
        return self._only(node, lambda user: self._fusable_norm(self._module(user) or nn.Identity()))

    def _sum(self, node: fx.Node) -> bool:
        return (
            self._is(node, SUMS)
            and len(node.args) == 2
            and not node.kwargs
            and all(isinstance(a, fx.Node) for a in node.args)
            and node.args[0] is not node.args[1]
        )

    def _max_pool(self, node: fx.Node) -> tuple[Pair, Pair, Pair] | None:
        """Window, stride and padding of a maximum pooling that can be fused."""
        module = self._module(node)
        if type(module) is not nn.MaxPool2d or not plain(module) or len(node.args) != 1 or node.kwargs:
            return None
        kernel = _pair(module.kernel_size)
        if _pair(module.dilation) != (1, 1) or module.ceil_mode or module.return_indices:
            return None
        if kernel[0] * kernel[1] > MOST_POSITIONS:
            return None
        return kernel, _pair(module.stride), _pair(module.padding)

    def plan(self) -> list[Unit]:
        """Units in the order in which they run.

        Raises:
            FuseError: nothing to fuse.
        """
        normed: set[fx.Node] = set()  # results of a fused normalization that only one node reads, not rectified
        results: set[fx.Node] = set()  # of all
        for node in self.graph.nodes:
            if node in self._done or node.op in ("placeholder", "output"):
                continue
            norm = self._conv_norm(node)
            if norm is not None:
                last = self._only(norm, self._rectifies)
                self._add_conv_norm(node, norm, last)
                results.add(last or norm)
                if last is None and len(norm.users) == 1:
                    normed.add(norm)
            elif (pooling := self._max_pool(node)) is not None and node.args[0] in results:
                self.units.append(self._max_pool_unit((node.args[0].name,), node.name, *pooling))
            elif self._sum(node) and normed.intersection(node.args):
                own = next(a for a in node.args if a in normed)
                other = next(a for a in node.args if a is not own)
                last = self._only(node, self._rectifies)
                self._done.update(n for n in (node, last) if n is not None)
                self.units.append(self._join_unit((own.name, other.name), (last or node).name, last is not None))
            else:
                self.units.append(self._other(node))
        if not self.fused:
            raise FuseError(f"fuse: {type(self.model).__name__} has no {self.wanted}")
        return self.units

    def _other(self, node: fx.Node) -> Unit:
        """What is no convolution, sum or pooling of integers."""
        unit, module = self._by_torch(node), self._module(node)
        if type(module) is IntegerLinear and plain(module) and len(unit.reads) == 1:
            return Linear(unit.reads, unit.result, module, unit)
        if is_mean(module) and plain(module or nn.Identity()):
            last = self._only(node, is_flatten)
            if last is not None:
                self._done.add(last)
                return Mean(unit.reads, last.name, (unit, self._by_torch(last)))
        return unit

    def _by_torch(self, node: fx.Node) -> TorchOp:
        module = self._module(node)
        inplace = self._writes(node, module)
        if inplace and len(node.all_input_nodes[0].users) > 1:
            written = node.all_input_nodes[0].name
            raise FuseError(f"fuse: {node.name!r} writes into {written!r}, which other operations read too")
        return TorchOp(tuple(n.name for n in node.all_input_nodes), node.name, node, module, inplace)

    _max_pool_unit: Callable[..., Unit] = MaxPool
    _join_unit: Callable[..., Unit] = Join

    @staticmethod
    def _fusable_conv(module: nn.Module) -> bool:
        return _integer_conv(module)

    @staticmethod
    def _fusable_norm(module: nn.Module) -> bool:
        return _integer_norm(module)

    def _add_conv_norm(self, conv: fx.Node, norm: fx.Node, last: fx.Node | None) -> None:
        layer, normalization = self._module(conv), self._module(norm)
        assert isinstance(layer, IntegerConv2d)
        assert isinstance(normalization, QuantizedL1BatchNorm)
        source = conv.args[0]
        assert isinstance(source, fx.Node)
        self._done.update(n for n in (conv, norm, last) if n is not None)
        self.fused.append(str(conv.target))
        result, rectified = last or norm, last is not None
        pooled = self._only(result, lambda user: self._max_pool(user) is not None) is not None
        self.units.append(
            ConvNorm((source.name,), result.name, layer, normalization, str(norm.target), rectified, pooled)
        )
