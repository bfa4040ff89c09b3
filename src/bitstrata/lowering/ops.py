"""How each operation of a model becomes program nodes. One handler an operation; anything else is an error.

A handler takes (context, fx node, arguments) where tensor arguments are `Real`s and everything else is a plain value.
Handlers have the signatures of the torch functions they stand for.
"""
# ruff: noqa: PLR0917

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..nn.layers import QuantizedLayer
from ..nn.norm import PrecisionBatchNorm
from .builder import Builder, Real
from .errors import LowerError
from .trace import module_of, where


@dataclass
class Context:
    """State of one lowering: the builder and what was met on the way."""

    builder: Builder
    values: dict[fx.Node, Any]  # shape without batch, or a plain value, of every fx node
    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    folded: dict[str, PrecisionBatchNorm] = field(default_factory=dict)
    standalone: dict[str, PrecisionBatchNorm] = field(default_factory=dict)
    readers: list[str] = field(default_factory=list)  # layers that read the network's input

    def shape(self, node: fx.Node) -> tuple[int, int, int]:
        """The node's shape as (C, H, W): features are (C, 1, 1), sequences (C, 1, L)."""
        return as_map(self.values[node], where(node))


def name_of(node: fx.Node, op: str) -> str:
    """Name of the value that the node becomes: its module's path, or "path.op" for a function called in a forward."""
    inside = module_of(node)
    return inside if node.op == "call_module" else f"{inside}.{op}" if inside else op


def as_map(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """(C,), (C, L) or (C, H, W) as (C, H, W)."""
    if len(shape) == 1:
        return (shape[0], 1, 1)
    if len(shape) == 2:
        return (shape[0], 1, shape[1])
    if len(shape) == 3:
        return (shape[0], shape[1], shape[2])
    raise LowerError(f"lower: {name} has {len(shape) + 1} dimensions; programs hold (N, C), (N, C, L) and (N, C, H, W)")


Handler = Callable[..., Real]
FUNCTIONS: dict[Any, Handler] = {}
METHODS: dict[str, Handler] = {}
MODULES: dict[type[nn.Module], Handler] = {}


def _on(*targets: Any) -> Callable[[Handler], Handler]:
    def add(handler: Handler) -> Handler:
        for target in targets:
            table: dict[Any, Handler] = METHODS if isinstance(target, str) else FUNCTIONS
            table[target] = handler
        return handler

    return add


# --- clipping and identities -----------------------------------------------------------------------------------------


@_on(F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
def relu(ctx: Context, node: fx.Node, x: Real, inplace: bool = False) -> Real:
    return clamp(ctx, node, x, 0.0, None)


@_on(F.relu6)
def relu6(ctx: Context, node: fx.Node, x: Real, inplace: bool = False) -> Real:
    return clamp(ctx, node, x, 0.0, 6.0)


@_on(F.hardtanh, F.hardtanh_)
def hardtanh(
    ctx: Context, node: fx.Node, x: Real, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Real:
    return clamp(ctx, node, x, min_val, max_val)


@_on(torch.clamp, torch.clip, torch.clamp_, "clamp", "clamp_", "clip", "clip_")
def clamp(ctx: Context, node: fx.Node, x: Real, min: float | None = None, max: float | None = None) -> Real:
    if x.kind == "input":
        raise LowerError(f"lower: {where(node)} clips the network's input before any quantized layer has read it")
    lo = None if min is None or min == -math.inf else float(min)
    hi = None if max is None or max == math.inf else float(max)
    if lo is not None and hi is not None and lo > hi:
        lo = hi  # as torch does
    return ctx.builder.clip(x, lo, hi)


@_on(torch.clamp_min, torch.clamp_min_, "clamp_min", "clamp_min_")
def clamp_min(ctx: Context, node: fx.Node, x: Real, min: float) -> Real:
    return clamp(ctx, node, x, min, None)


@_on(torch.clamp_max, torch.clamp_max_, "clamp_max", "clamp_max_")
def clamp_max(ctx: Context, node: fx.Node, x: Real, max: float) -> Real:
    return clamp(ctx, node, x, None, max)


@_on(
    F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout, torch.clone,
    "clone", "contiguous", "detach",
)  # fmt: skip
def identity(ctx: Context, node: fx.Node, x: Real, *_args: Any, **_kwargs: Any) -> Real:
    return x


# --- sums and shapes -------------------------------------------------------------------------------------------------


@_on(operator.add, operator.iadd, torch.add, "add", "add_")
def add(ctx: Context, node: fx.Node, a: Any, b: Any, *, alpha: float = 1) -> Real:
    if not isinstance(a, Real) or not isinstance(b, Real) or alpha != 1:
        raise LowerError(f"lower: {where(node)} must add two tensors of the network with alpha=1, not a constant")
    if a.shape != b.shape:
        raise LowerError(f"lower: {where(node)} adds shapes {a.shape} and {b.shape}; broadcasting is not supported")
    left, right = (ctx.builder.fixed(x, where(node), power_of_two=True) for x in (a, b))
    return Real(ctx.builder.emit(name_of(node, "add"), "add", (left.base, right.base)), "fixed", a.shape)


@_on(operator.getitem)
def getitem(ctx: Context, node: fx.Node, x: Real, index: Any) -> Real:
    shape = ctx.values[node.args[0]]  # type: ignore[index]
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(shape) + 1 - (len(items) - 1))
    items += [slice(None)] * (len(shape) + 1 - len(items))
    if not all(isinstance(i, slice) for i in items) or items[0].indices(1 << 30) != (0, 1 << 30, 1):
        raise LowerError(
            f"lower: {where(node)} must slice channels and positions only (x[:, :, ::2, ::2]), got {index!r}"
        )
    spans = [list(i.indices(n)) for i, n in zip(items[1:], shape, strict=True)]
    if any(step < 1 or stop <= start for start, stop, step in spans):
        raise LowerError(f"lower: {where(node)} slices {shape} with {index!r}: empty or reversed")
    c, h, w = _axes(spans, [0, 1, 1])
    source = x if x.kind == "input" else ctx.builder.fixed(x, where(node))
    return _moved(
        source, ctx.builder.emit(name_of(node, "slice"), "slice", (source.base,), c=c, h=h, w=w), ctx.shape(node)
    )


@_on(F.pad, torch.constant_pad_nd)
def pad(ctx: Context, node: fx.Node, x: Real, pad: Any, mode: str = "constant", value: float | None = None) -> Real:
    if mode != "constant" or value not in (None, 0, 0.0):
        raise LowerError(f"lower: {where(node)} pads with mode {mode!r}, value {value!r}; only zeros are supported")
    amounts = list(pad)
    rank = len(ctx.values[node.args[0]])  # type: ignore[index]
    if min(amounts) < 0 or len(amounts) // 2 > rank:
        raise LowerError(f"lower: {where(node)} pads by {tuple(amounts)}; amounts must be >= 0 and spare the batch")
    amounts += [0] * (2 * rank - len(amounts))
    per_axis = [[amounts[2 * i], amounts[2 * i + 1]] for i in reversed(range(rank))]
    c, h, w = _axes(per_axis, [0, 0])
    source = ctx.builder.fixed(x, where(node))
    return _moved(source, ctx.builder.emit(name_of(node, "pad"), "pad", (source.base,), c=c, h=h, w=w), ctx.shape(node))


def _axes(per_axis: list[Any], missing: list[int]) -> tuple[Any, Any, Any]:
    if len(per_axis) == 1:
        return per_axis[0], missing, missing
    if len(per_axis) == 2:
        return per_axis[0], missing, per_axis[1]
    return per_axis[0], per_axis[1], per_axis[2]


def _moved(source: Real, base: str, shape: tuple[int, int, int]) -> Real:
    return Real(base, source.kind, shape, pooled=source.pooled)


@_on(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, "flatten", "reshape", "view", "squeeze", "unsqueeze")
def flatten(ctx: Context, node: fx.Node, x: Real, *_args: Any, **_kwargs: Any) -> Real:
    shape = ctx.values[node]
    if 1 <= len(shape) <= 3 and ctx.shape(node) == x.shape:
        return x  # axes of one position come or go; (C), (C, 1) and (C, 1, 1) are the same map
    if len(shape) != 1 or shape[0] != math.prod(x.shape):
        raise LowerError(
            f"lower: {where(node)} reshapes {x.shape} to {shape}; only flattening everything behind the batch is "
            "supported"
        )
    source = x if x.kind == "input" else ctx.builder.fixed(x, where(node))
    return _moved(source, ctx.builder.emit(name_of(node, "flatten"), "flatten", (source.base,)), ctx.shape(node))


# --- pooling ---------------------------------------------------------------------------------------------------------


@_on(F.max_pool2d, F.max_pool1d, torch.max_pool2d, torch.max_pool1d)
def max_pool(
    ctx: Context,
    node: fx.Node,
    x: Real,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Real:
    window = _window(ctx, node, x, kernel_size, stride, padding, ceil_mode)
    if set(_pair(ctx, node, dilation, 1)) != {1} or return_indices:
        raise LowerError(f"lower: {where(node)}: max pooling with dilation or indices is not supported")
    return _max_over(ctx, node, x, window)


@_on(F.avg_pool2d, F.avg_pool1d)
def avg_pool(
    ctx: Context,
    node: fx.Node,
    x: Real,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Real:
    window = _window(ctx, node, x, kernel_size, stride, padding, ceil_mode)
    if any(window["padding"]) and not count_include_pad:
        raise LowerError(
            f"lower: {where(node)}: average pooling with padding and count_include_pad=False divides by another number "
            "at the border; set count_include_pad=True or padding=0"
        )
    if divisor_override not in (None, math.prod(window["kernel"])):
        raise LowerError(f"lower: {where(node)}: divisor_override={divisor_override} is not supported")
    return _average(ctx, node, x, window)


@_on(F.adaptive_avg_pool2d, F.adaptive_avg_pool1d)
def adaptive_avg_pool(ctx: Context, node: fx.Node, x: Real, output_size: Any) -> Real:
    kernel = _even_windows(ctx, node, x)
    return _average(ctx, node, x, {"kernel": kernel, "stride": kernel, "padding": [0, 0, 0, 0]})


@_on(F.adaptive_max_pool2d, F.adaptive_max_pool1d, torch.adaptive_max_pool1d)
def adaptive_max_pool(ctx: Context, node: fx.Node, x: Real, output_size: Any, return_indices: bool = False) -> Real:
    if return_indices:
        raise LowerError(f"lower: {where(node)}: max pooling with indices is not supported")
    kernel = _even_windows(ctx, node, x)
    return _max_over(ctx, node, x, {"kernel": kernel, "stride": kernel, "padding": [0, 0, 0, 0]})


@_on(torch.amax, "amax")
def amax(ctx: Context, node: fx.Node, x: Real, dim: Any = (), keepdim: bool = False) -> Real:
    kernel = _all_positions(ctx, node, x, dim, "maximum")
    return _max_over(ctx, node, x, {"kernel": kernel, "stride": kernel, "padding": [0, 0, 0, 0]})


@_on(torch.mean, "mean")
def mean(ctx: Context, node: fx.Node, x: Real, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Real:
    kernel = _all_positions(ctx, node, x, dim, "mean")
    return _average(ctx, node, x, {"kernel": kernel, "stride": kernel, "padding": [0, 0, 0, 0]})


def _all_positions(ctx: Context, node: fx.Node, x: Real, dim: Any, what: str) -> list[int]:
    """The window of a reduction, which must be over all positions."""
    rank = len(ctx.values[node.args[0]]) + 1  # type: ignore[index]
    dims = sorted(d % rank for d in ([dim] if isinstance(dim, int) else list(dim or [])))
    if dims != list(range(2, rank)) or not dims:
        positions = "(2, 3) of (N, C, H, W)" if rank == 4 else "2 of (N, C, L)"
        raise LowerError(
            f"lower: {where(node)} takes the {what} over {dim!r}; only over all positions is supported: over "
            f"{positions} in one call"
        )
    return [x.shape[1], x.shape[2]]


def _even_windows(ctx: Context, node: fx.Node, x: Real) -> list[int]:
    """The window of an adaptive pooling, which must be the same everywhere."""
    _, height, width = x.shape
    _, rows, columns = ctx.shape(node)
    if height % rows or width % columns:
        raise LowerError(
            f"lower: {where(node)} pools {height}x{width} to {rows}x{columns}: windows of several sizes; choose an "
            "output size that divides the input"
        )
    return [height // rows, width // columns]


def _max_over(ctx: Context, node: fx.Node, x: Real, window: dict[str, Any]) -> Real:
    source = x if x.kind == "input" else ctx.builder.fixed(x, where(node))
    return _moved(
        source, ctx.builder.emit(name_of(node, "maxpool"), "maxpool", (source.base,), **window), ctx.shape(node)
    )


def pool_window(ctx: Context, node: fx.Node, pool: nn.Module, x: Real) -> dict[str, Any]:
    """Attributes of the average pooling that a layer applies to its quantized input `x`."""
    if not isinstance(pool, nn.AvgPool1d | nn.AvgPool2d) or getattr(pool, "divisor_override", None) is not None:
        raise LowerError(f"lower: {where(node)} pools its input by {pool}; only plain average pooling is supported")
    window = _window(ctx, node, x, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)
    if any(window["padding"]) and not pool.count_include_pad:
        raise LowerError(f"lower: {where(node)} pools its input with count_include_pad=False; set it to True")
    return window


def _average(ctx: Context, node: fx.Node, x: Real, window: dict[str, Any]) -> Real:
    source = ctx.builder.fixed(x, where(node))
    base = ctx.builder.emit(name_of(node, "avgpool"), "avgpool", (source.base,), **window)
    size = math.prod(window["kernel"])
    return Real(base, "fixed", ctx.shape(node), pooled=source.pooled or bool(size & (size - 1)))


def _pair(ctx: Context, node: fx.Node, value: Any, along: int) -> list[int]:
    """A pooling argument as [height, width]; `along` fills the height of 1-d operations."""
    items = [int(v) for v in value] if isinstance(value, tuple | list) else [int(value)]
    if len(ctx.values[node.args[0]]) == 2:  # type: ignore[index]
        return [along, items[-1]]
    return items if len(items) == 2 else items * 2


def _window(
    ctx: Context, node: fx.Node, x: Real, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool
) -> dict[str, Any]:
    kernel = _pair(ctx, node, kernel_size, 1)
    steps = kernel if stride in (None, [], ()) else _pair(ctx, node, stride, 1)
    border = _pair(ctx, node, padding, 0)
    for size, k, s, p in zip(x.shape[1:], kernel, steps, border, strict=True):
        if ceil_mode and (size + 2 * p - k) % s:
            raise LowerError(
                f"lower: {where(node)}: ceil_mode=True makes windows that stick out of the map; use padding"
            )
    return {"kernel": kernel, "stride": steps, "padding": [border[0], border[0], border[1], border[1]]}


# --- modules ---------------------------------------------------------------------------------------------------------


def _pool_args(m: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(m, name) for name in names}


_POOL = ("kernel_size", "stride", "padding", "ceil_mode")
MODULES.update(
    {
        nn.ReLU: lambda ctx, node, m, x: relu(ctx, node, x),
        nn.ReLU6: lambda ctx, node, m, x: relu6(ctx, node, x),
        nn.Hardtanh: lambda ctx, node, m, x: hardtanh(ctx, node, x, m.min_val, m.max_val),
        nn.Identity: lambda ctx, node, m, x: x,
        nn.Flatten: lambda ctx, node, m, x: flatten(ctx, node, x),
        nn.ZeroPad2d: lambda ctx, node, m, x: pad(ctx, node, x, m.padding),
    }
)
for _dropout in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout):
    MODULES[_dropout] = lambda ctx, node, m, x: x
for _max in (nn.MaxPool1d, nn.MaxPool2d):
    MODULES[_max] = lambda ctx, node, m, x: max_pool(
        ctx, node, x, **_pool_args(m, *_POOL, "dilation", "return_indices")
    )
for _avg in (nn.AvgPool1d, nn.AvgPool2d):
    MODULES[_avg] = lambda ctx, node, m, x: avg_pool(
        ctx,
        node,
        x,
        **_pool_args(m, *_POOL, "count_include_pad"),
        divisor_override=getattr(m, "divisor_override", None),
    )
for _adaptive in (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d):
    MODULES[_adaptive] = lambda ctx, node, m, x: adaptive_avg_pool(ctx, node, x, m.output_size)
for _adaptive_max in (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d):
    MODULES[_adaptive_max] = lambda ctx, node, m, x: adaptive_max_pool(ctx, node, x, m.output_size, m.return_indices)
