"""Tracing: the model's graph with every tensor's shape on one example."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..nn.norm import PrecisionBatchNorm
from ..nn.own import collapse_own_
from ..prepare.precision import precisions, set_precision
from .errors import LowerError
from .frozen import deployed
from .ready import refuse_unready
from .tracer import SizedTracer


@dataclass(frozen=True)
class Traced:
    """A float64 evaluation copy of the model, its graph without dead ends, and every node's value on an example.

    values: tensors as (shape without the batch); anything else (sizes, numbers) as it is.
    """

    model: nn.Module
    graph: fx.Graph
    values: dict[fx.Node, Any]


def double_copy(model: nn.Module, served: tuple[int, ...] | None = None) -> nn.Module:
    """A float64 copy in evaluation mode on the CPU: what "the fake-quantized model, exactly" means here.

    Of a network trained in integers, the copy is the quantized network that it evaluates as once frozen.

    Args:
        served: precisions it is for; with a single one, layers that have weights of their own a precision are replaced
            by those of that precision, and the copy runs at it.
    """
    twin = copy.deepcopy(deployed(model)).cpu().double().eval()
    if served is not None and len(served) == 1:
        collapse_own_(twin, served[0])
        set_precision(twin, served[0])
    _rename_owners_(twin)
    return twin


def _rename_owners_(twin: nn.Module) -> None:
    """Normalizations name their layers as they were; inside a wrapper, such as AveragedModel, names are longer."""
    names = {id(module): name for name, module in twin.named_modules()}
    for module in list(twin.modules()):
        if isinstance(module, PrecisionBatchNorm) and module.owner not in names.values():
            module.owner = names.get(id(module.followed), module.owner)


def module_of(node: fx.Node) -> str:
    """Qualified name of the innermost module in whose forward the node is; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def function_of(node: fx.Node) -> str:
    """Name of the function or method that the node calls."""
    if getattr(node.target, "__qualname__", "").startswith("boolean_dispatch"):  # F.max_pool2d calls itself "fn"
        return re.sub(r"_\d+$", "", node.name)
    return str(getattr(node.target, "__name__", node.target))


def where(node: fx.Node) -> str:
    """The node for people: the module it calls, or the function and the module whose forward calls it."""
    if node.op == "call_module":
        return f"module {str(node.target)!r}"
    inside = module_of(node)
    return f"{function_of(node)!r} in " + (f"module {inside!r}" if inside else "the model's forward")


def trace(model: nn.Module, example: Tensor, served: tuple[int, ...] | None = None) -> Traced:
    """Trace a model of one input tensor and check that the graph computes what the model does.

    Raises:
        LowerError: numbers that are not finite; a step never set; a forward that cannot be traced (control flow that
            depends on data, several inputs), does not run on inputs of the example's shape, or changes a tensor in
            place that it uses again.
    """
    twin = double_copy(model, served)
    kind = type(model).__name__
    shape = (2, *example.shape[1:])  # a batch of one would hide what happens to the batch dimension
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    refuse_unready(twin, precisions(twin) if served is None else served)
    try:
        with torch.no_grad():
            graph = SizedTracer(x.clone()).trace(twin)
    except Exception as error:
        raise LowerError(_untraceable(kind, shape, error)) from error
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        names = ", ".join(repr(str(node.target)) for node in inputs)
        raise LowerError(f"lower: the model must take one input tensor, {kind}.forward uses {len(inputs)} ({names})")
    recorder = _Recorder(twin, graph)
    try:
        with torch.no_grad():
            found, expected = recorder.run(x.clone()), twin(x.clone())
    except LowerError:
        raise
    except Exception as error:
        raise LowerError(_untraceable(kind, shape, error)) from error
    if isinstance(expected, Tensor) and not torch.allclose(found, expected, equal_nan=True):
        raise LowerError(
            f"lower: the traced graph of {kind} computes something else than the model: either an in-place operation "
            "such as += changes a tensor that is used again (write y = y + x), or the forward is random in evaluation "
            "mode"
        )
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)  # computed, but not for the output
    return Traced(twin, graph, recorder.values)


def _untraceable(kind: str, shape: tuple[int, ...], error: Exception) -> str:
    if isinstance(error, fx.proxy.TraceError):
        return (
            f"lower: cannot trace {kind}.forward: {error}; its control flow must not depend on the input: move such "
            "parts out of forward, or lower the part of the model that is free of them"
        )
    text = f"lower: {kind} does not run on an input of shape {shape}: {_first_line(error)}"
    if "Double" in text or "double" in text:
        text += "; lowering evaluates in float64: leave casts such as x.float() out of the forward"
    return text


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class _Recorder(fx.Interpreter):
    """Runs the graph, notes every value, and refuses in-place operations whose effect the graph does not show."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        read = {node: self.env[node] for node in n.all_input_nodes if isinstance(self.env.get(node), Tensor)}
        versions = {node: tensor._version for node, tensor in read.items()}
        result = super().run_node(n)
        for node, tensor in read.items():
            if tensor._version != versions[node]:
                self._check_in_place(n, tensor)
        self.values[n] = tuple(result.shape[1:]) if isinstance(result, Tensor) else result
        return result

    def _check_in_place(self, changing: fx.Node, changed: Tensor) -> None:
        storage = changed.untyped_storage().data_ptr()
        for node, tensor in self.env.items():
            if not isinstance(tensor, Tensor) or tensor.untyped_storage().data_ptr() != storage:
                continue
            later = [user for user in node.users if self.position[user] > self.position[changing]]
            if later:
                raise LowerError(
                    f"lower: {where(changing)} changes a tensor in place that {where(later[0])} uses again; make the "
                    "operation out of place"
                )
