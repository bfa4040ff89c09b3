"""Where MaQD's activation quantizer stands: in the place of the activation function, and before average pooling.

A quantized layer quantizes its own input. To stand for `ReLU, average pooling, convolution` as MaQD has it, the
quantizer must see what the ReLU saw (it cuts at 0 itself, and its gradient there is not 0), and the pooling must come
after it: both move into the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .observe import BATCH_NORMS, evaluating

ACTIVATIONS = (nn.ReLU, nn.Hardtanh)  # ReLU6 is a Hardtanh
POOLS = (nn.AvgPool1d, nn.AvgPool2d)
# What commutes with cutting at 0 and with a monotone elementwise quantizer: it moves, drops or picks elements, or
# multiplies them by a factor of at least 1 (dropout).
TRANSPARENT = (
    *(nn.Identity, nn.Flatten, nn.MaxPool1d, nn.MaxPool2d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
TRANSPARENT_FUNCTIONS = (
    *(torch.flatten, torch.reshape, torch.max_pool1d, torch.max_pool2d),
    *(F.max_pool1d, F.max_pool2d, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
)
TRANSPARENT_METHODS = ("flatten", "reshape", "view", "contiguous")
# What averages, so does not commute with a quantizer; a layer behind it still reads the activation before it.
AVERAGES = (*POOLS, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
AVERAGE_FUNCTIONS = (F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, torch.mean)
SHAPE_METHODS = ("size", "dim", "numel")
CUTS = ("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "clamp_min_")


@dataclass(frozen=True)
class Placed:
    """What became of one activation or pooling module.

    action: "absorbed", an Identity is in its place; "kept", it is as it was.
    layers: names of the layers that do its work now, or, if it was kept, that read it.
    reason: why it was kept; "" otherwise.
    """

    name: str
    action: str
    layers: tuple[str, ...]
    reason: str = ""


def absorb_activations_(
    model: nn.Module, example: Any, layers: Mapping[str, nn.Module], *, strict: bool = False
) -> list[Placed]:
    """Take the activations and average poolings before `layers` out of a float model, in place.

    The layers are to get quantizers that are monotone, map 0 and less to 0 and 1 and more to 1 (MaQD eq. 8), so, with
    such quantizers, a model computes after the change what it did before, poolings aside, which then follow their
    quantizer:

    - A ReLU, ReLU6 or Hardtanh (lower bound at most 0, upper at least 1) becomes an Identity if, at every place that
      calls it, its output reaches `layers` or absorbed poolings only, directly or through Dropout, Flatten, MaxPool,
      Identity, or the functions of these.
    - An AvgPool1d/2d of uniform weights becomes an Identity, and the `input_pool` of every layer that reads it, if it
      reads such an activation (through the same) and those layers read nothing else.

    An activation that something else reads too (a residual sum) is kept: the layers' values are right, their gradients
    are masked below 0, where MaQD's are not. Until the layers are quantized, the model computes something else: run
    whatever needs the float model before. Modules that never run stay as they are.

    Args:
        example: a tensor, or a tuple or list of positional arguments; run to check that the change is right.
        layers: qualified name -> module, those that will quantize their input.
        strict: raise where an activation or pooling that `layers` read is kept.

    Returns:
        What became of each activation, and of each pooling behind one, that some layer reads; in order of execution.

    Raises:
        ValueError: the model cannot be traced; a layer reads an activation called as a function (F.relu); something
            is kept and strict is set; or an in-place operation makes the change wrong. The model is then unchanged.

    Source: MaQD section 3.2 and figure 1.
    """
    view = _View(model, layers)
    _refuse_functions(view)
    activations, pools = _decide(view)
    report = [*_report(view, activations), *_report(view, pools)]
    order = {name: index for index, name in enumerate(view.order)}
    report.sort(key=lambda placed: order[placed.name])
    kept = [placed for placed in report if placed.action == "kept"]
    if strict and kept:
        raise ValueError(
            "absorb_activations_: " + "; ".join(f"{p.name!r} must be kept: {p.reason}" for p in kept) + "; "
            "change the model, or allow it with strict=False"
        )
    _replace_checked(model, example, view, activations, pools)
    return report


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[int]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if id(m) in self.leaves or isinstance(m, BATCH_NORMS):
            return True
        return super().is_leaf_module(m, module_qualified_name)


class _View:
    """The traced graph, with modules under one name each, however often and under how many names they are called."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.model = model
        try:
            self.graph = _Tracer({id(layer) for layer in layers.values()}).trace(model)
        except Exception as error:
            raise ValueError(
                f"absorb_activations_: cannot trace {type(model).__name__}.forward: {error}; its control flow must not "
                "depend on the input: move such parts out of forward into modules of torch.nn"
            ) from error
        self.layer_names = {id(layer): name for name, layer in layers.items()}
        self.calls: dict[str, list[fx.Node]] = {}  # in order of the first call
        self.module: dict[fx.Node, nn.Module] = {}
        names: dict[int, str] = {}
        for node in self.graph.nodes:
            if node.op == "call_module":
                module = model.get_submodule(str(node.target))
                self.module[node] = module
                self.calls.setdefault(names.setdefault(id(module), str(node.target)), []).append(node)
        self.order = list(self.calls)

    def of_kind(self, kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
        """The called modules of some types; subclasses may compute something else, so those of torch only."""
        for name, nodes in self.calls.items():
            module = self.module[nodes[0]]
            if isinstance(module, kinds) and type(module).__module__.startswith("torch.nn."):
                yield name, module

    def layer(self, node: fx.Node) -> str | None:
        """Name of the layer that the node calls, None for anything else."""
        return self.layer_names.get(id(self.module.get(node)))

    def transparent(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.module[node]
            return type(module) in TRANSPARENT and not getattr(module, "return_indices", False)
        if node.op == "call_function":
            return node.target in TRANSPARENT_FUNCTIONS and not node.kwargs.get("return_indices", False)
        return node.op == "call_method" and node.target in TRANSPARENT_METHODS

    def readers(self, node: fx.Node, through: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
        """The nodes that read the node's values, those behind `through` in its place; the shape is no value."""
        for user in node.users:
            shape = user.op == "call_method" and user.target in SHAPE_METHODS
            shape |= user.target is getattr and user.args[1] in ("shape", "ndim")
            if shape:
                continue
            if through(user):
                yield from self.readers(user, through)
            else:
                yield user

    def source(self, node: fx.Node, through: Callable[[fx.Node], bool]) -> fx.Node:
        """The node whose values this one reads, looking back through `through`."""
        read = node.all_input_nodes[0]
        while through(read) and read.all_input_nodes:
            read = read.all_input_nodes[0]
        return read

    def layers_of(self, name: str) -> tuple[str, ...]:
        """The layers that read a module's output, directly or behind transparent nodes and averages, sorted."""
        return self.layers_behind(self.calls[name])

    def layers_behind(self, nodes: list[fx.Node]) -> tuple[str, ...]:
        def through(node: fx.Node) -> bool:
            averages = node.target in AVERAGE_FUNCTIONS or (node.op, node.target) == ("call_method", "mean")
            return averages or self.transparent(node) or isinstance(self.module.get(node), AVERAGES)

        found = {self.layer(reader) for node in nodes for reader in self.readers(node, through)}
        return tuple(sorted(name for name in found if name is not None))

    def identity(self, node: fx.Node) -> bool:
        return isinstance(self.module.get(node), nn.Identity)

    def where(self, node: fx.Node) -> str:
        """The node for people."""
        if node.op == "call_module":
            return f"module {str(node.target)!r}"
        if node.op == "output":
            return "the model's output"
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        inside = f"module {str(stack[-1][0])!r}" if stack and stack[-1][0] else "the model's forward"
        return f"{getattr(node.target, '__name__', node.target)!r} in {inside}"


def _refuse_functions(view: _View) -> None:
    for node in view.graph.nodes:
        called = str(getattr(node.target, "__name__", node.target))
        if node.op in ("call_function", "call_method") and called in CUTS and view.layers_behind([node]):
            raise ValueError(
                f"absorb_activations_: {view.where(node)}, which layer {view.layers_behind([node])[0]!r} reads, is no "
                "module, so it cannot be taken out and would mask the quantizer's gradient below 0; call an nn.ReLU, "
                "nn.ReLU6 or nn.Hardtanh module instead"
            )


Reasons = dict[str, str]  # module -> why it is kept; "" for absorbed


def _decide(view: _View) -> tuple[Reasons, Reasons]:
    """Reasons for the activations, and for the poolings behind one, that some layer reads."""
    acts = {name: m for name, m in view.of_kind(ACTIVATIONS) if view.layers_of(name)}
    pools: Reasons = {}
    for name, pool in view.of_kind(POOLS):
        sources = [view.source(node, view.transparent) for node in view.calls[name]]
        behind = [any(view.module.get(source) is m for m in acts.values()) for source in sources]
        if view.layers_of(name) and any(behind):
            if all(behind):
                pools[name] = _not_uniform(pool) or _pool_readers(view, name)
            else:
                other = sources[behind.index(False)]
                pools[name] = f"it also reads {view.where(other)}, which is no activation"
    absorbed = {node for name, reason in pools.items() if not reason for node in view.calls[name]}
    return {name: _range(module) or _readers(view, name, absorbed) for name, module in acts.items()}, pools


def _range(module: nn.Module) -> str:
    if isinstance(module, nn.Hardtanh) and not (module.min_val <= 0 and module.max_val >= 1):
        return f"it cuts at {module.min_val:g} and {module.max_val:g}, inside the quantizer's range of 0 to 1"
    return ""


def _readers(view: _View, name: str, absorbed: set[fx.Node]) -> str:
    """Why an activation's readers need it; "" if they do not."""
    position = {node: index for index, node in enumerate(view.graph.nodes)}
    for node in view.calls[name]:
        changed = node.all_input_nodes[0]
        if getattr(view.module[node], "inplace", False) and any(position[u] > position[node] for u in changed.users):
            return f"it changes the output of {view.where(changed)} in place, which is used again"
        for reader in view.readers(node, view.transparent):
            if view.layer(reader) is None and reader not in absorbed:
                return f"{view.where(reader)} reads it"
    return ""


def _not_uniform(pool: nn.Module) -> str:
    def spread(value: Any) -> tuple[Any, ...]:
        return tuple(value) if isinstance(value, tuple | list) else (value,)

    if getattr(pool, "divisor_override", None) is not None:
        return f"divisor_override={pool.divisor_override} makes it a sum, not an average"
    if pool.ceil_mode:
        return "ceil_mode=True averages fewer elements at the border"
    if any(spread(pool.padding)) and not pool.count_include_pad:
        return "count_include_pad=False averages fewer elements at the border"
    return ""


def _pool_readers(view: _View, name: str) -> str:
    """Why the readers of a pooling cannot pool by themselves; "" if they can."""
    calls = view.calls[name]
    for node in calls:
        for reader in view.readers(node, view.identity):
            layer = view.layer(reader)
            if layer is None:
                return f"{view.where(reader)} reads it, which is no layer that could pool by itself"
            for call, module in view.module.items():
                if view.layer_names.get(id(module)) == layer and view.source(call, view.identity) not in calls:
                    return f"layer {layer!r} reads something else too"
    return ""


def _report(view: _View, reasons: Reasons) -> list[Placed]:
    return [
        Placed(name, "kept" if reason else "absorbed", view.layers_of(name), reason) for name, reason in reasons.items()
    ]


def _replace_checked(model: nn.Module, example: Any, view: _View, activations: Reasons, pools: Reasons) -> None:
    """Replace, and compare the model's outputs with [0, 1] clamps where the activations were, and in the layers."""
    taken = [name for name, reason in activations.items() if not reason]
    moved = {name: view.layers_of(name) for name, reason in pools.items() if not reason}
    if not taken and not moved:
        return
    modules = {name: model.get_submodule(name) for name in (*taken, *moved)}
    layers = {view.layer_names[id(m)]: m for m in view.module.values() if id(m) in view.layer_names}
    pool_of = {layer: modules[name] for name, readers in moved.items() for layer in readers}
    kept = [model.get_submodule(name) for name in activations if name not in modules]
    before = _clamped_run(model, example, [*kept, *(modules[name] for name in taken)], layers, {})
    ids = {id(module) for module in modules.values()}
    places = [
        (parent, child_name, child)
        for parent in model.modules()
        for child_name, child in parent._modules.items()  # named_children would hide a second name of the same module
        if id(child) in ids
    ]
    for parent, child_name, _ in places:
        parent._modules[child_name] = nn.Identity()
    cause: Exception | None = None
    try:
        if _agree(before, _clamped_run(model, example, kept, layers, pool_of)):
            places = []
    except Exception as error:
        cause = error
    for parent, child_name, child in places:
        parent._modules[child_name] = child
    if places:
        raise ValueError(
            f"absorb_activations_: without {', '.join(map(repr, modules))} the model computes something else on the "
            "example: an in-place operation changes a tensor that is used again; make it out of place (inplace=False)"
        ) from cause
    for layer, pool in pool_of.items():
        layers[layer].input_pool = pool


def _clamped_run(
    model: nn.Module, example: Any, clamps: list[nn.Module], layers: Mapping[str, nn.Module], pools: Mapping[str, Any]
) -> Any:
    """The model's output in evaluation with clamps at the outputs of `clamps` and the inputs of layers, then pooled."""

    def cut(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.clamp(0, 1)

    def enter(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0].clamp(0, 1)
            return (pools[name](x) if name in pools else x, *args[1:])

        return hook

    handles = [module.register_forward_hook(cut) for module in clamps]
    handles += [layer.register_forward_pre_hook(enter(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), evaluating(model):
            given = example if isinstance(example, tuple | list) else (example,)
            return model(*[x.clone() if isinstance(x, Tensor) else x for x in given])
    finally:
        for handle in handles:
            handle.remove()


def _agree(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return (
            isinstance(after, Tensor)
            and before.shape == after.shape
            and torch.allclose(before, after, rtol=1e-3, atol=1e-5 * (1 + float(before.abs().max())), equal_nan=True)
        )
    if isinstance(before, tuple | list):
        return len(before) == len(after) and all(_agree(b, a) for b, a in zip(before, after, strict=True))
    return bool(isinstance(after, Mapping)) and all(_agree(b, after[key]) for key, b in before.items())
