"""The normative executor: numpy int64, one short function an operation, following spec/numerics.md section by section.

`OracleExecutor` computes the same integers much faster: its convolutions are matrix products in floating point, exact
because every partial sum stays below 2^53; all other operations are the reference's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .intervals import align
from .plan import Add, Clip, Conv, Flatten, MaxPool, Op, Pad, Plan, Requant, Slice, SumPool, Table, Thresholds, Value

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES: dict[str, type[np.integer[Any]]] = {"u8": np.uint8, "s8": np.int8, "i32": np.int32}
_GATHER_BYTES = 1 << 25  # how much of a convolution's windows the oracle lays out at a time

Integers: TypeAlias = "NDArray[np.integer[Any]]"
Wide: TypeAlias = "NDArray[np.int64]"


class ReferenceExecutor:
    """Runs a plan one operation after another. Every result is checked against its proved bounds."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._last_use = {index: position for position, op in enumerate(plan.ops) for index in op.inputs}

    def run(self, codes: Integers) -> NDArray[np.int32]:
        """The output's integers, (N, H, W, C) int32, for input codes (N, H, W, C) of the input value's dtype.

        Raises ValueError if the codes' dtype, shape or range are not those of the plan's input.
        """
        values = self._start(codes)
        for position, op in enumerate(self.plan.ops):
            values[op.output] = self._compute(op, values)
            for index in op.inputs:
                if self._last_use[index] == position and index != self.plan.output:
                    values.pop(index, None)
        return values[self.plan.output].astype(np.int32, copy=False)

    def run_all(self, codes: Integers) -> dict[str, Integers]:
        """Every value by name, (N, H, W, C) in the value's dtype, the input included. Raises as `run` does."""
        values = self._start(codes)
        for op in self.plan.ops:
            values[op.output] = self._compute(op, values)
        return {self.plan.values[index].name: array for index, array in values.items()}

    def _start(self, codes: Integers) -> dict[int, Integers]:
        value = self.plan.values[self.plan.input]
        check_codes(value, codes)
        return {self.plan.input: codes}

    def _compute(self, op: Op, values: dict[int, Integers]) -> Integers:
        inputs = [values[index].astype(np.int64) for index in op.inputs]
        result = self._conv(op, *inputs) if isinstance(op, Conv) else _OPS[type(op)](op, *inputs)
        value = self.plan.values[op.output]
        if result.size and not (value.lo <= result.min() and result.max() <= value.hi):
            raise AssertionError(f"{op.name}: [{result.min()}, {result.max()}] exceeds [{value.lo}, {value.hi}]")
        return result.astype(DTYPES[value.dtype])

    def _conv(self, op: Conv, x: Wide) -> Wide:
        return conv(op, x)


class OracleExecutor(ReferenceExecutor):
    """The reference with convolutions as exact matrix products: the same integers, fast enough for data sets."""

    def _conv(self, op: Conv, x: Wide) -> Wide:
        return conv_by_gemm(op, x)


def check_codes(value: Value, codes: Integers) -> None:
    """ValueError unless `codes` are (N, H, W, C) of the value's shape, dtype and range."""
    dtype = DTYPES[value.dtype]
    if not isinstance(codes, np.ndarray) or codes.dtype != dtype or codes.shape[1:] != value.shape:
        have = f"{codes.dtype} {codes.shape}" if isinstance(codes, np.ndarray) else type(codes).__name__
        raise ValueError(f"run: codes must be a {np.dtype(dtype)} array (N, {str(value.shape)[1:]}, are {have}")
    if codes.size and not (value.lo <= codes.min() and codes.max() <= value.hi):
        raise ValueError(f"run: codes reach [{codes.min()}, {codes.max()}], beyond [{value.lo}, {value.hi}]")


def _pad_map(x: Wide, padding: tuple[int, int, int, int], fill: Integers | int) -> Wide:
    """x (N, H, W, C) with rows and columns around it that hold `fill`: one integer, or one a channel."""
    top, bottom, left, right = padding
    n, height, width, channels = x.shape
    padded = np.empty((n, height + top + bottom, width + left + right, channels), np.int64)
    padded[...] = fill
    padded[:, top : top + height, left : left + width] = x
    return padded


def _window_grid(
    x: NDArray[Any], kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> NDArray[Any]:
    """All windows of a padded map, a view (N, OH, OW, C, kh, kw)."""
    span = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    windows = sliding_window_view(x, span, axis=(1, 2))
    return windows[:, :: stride[0], :: stride[1], :, :: dilation[0], :: dilation[1]]


def _weights(op: Conv) -> Wide:
    """Section 1: integer weight = mul*code + add, (out, in/groups, kh, kw)."""
    return op.mul * op.codes.astype(np.int64) + op.add


def conv(op: Conv, x: Wide) -> Wide:
    """Section 2: the sum over the window of weight times code, outside the map the channel's pad code."""
    weights = _weights(op)
    out, per_group, kernel_h, kernel_w = weights.shape
    windows = _window_grid(_pad_map(x, op.padding, op.pad_code), (kernel_h, kernel_w), op.stride, op.dilation)
    acc = np.zeros((*windows.shape[:3], out), np.int64)
    for group in range(op.groups):
        outs = slice(group * (out // op.groups), (group + 1) * (out // op.groups))
        ins = slice(group * per_group, (group + 1) * per_group)
        for ky in range(kernel_h):
            for kx in range(kernel_w):
                acc[..., outs] += windows[:, :, :, ins, ky, kx] @ weights[outs, :, ky, kx].T
    return acc


def conv_by_gemm(op: Conv, x: Wide) -> Wide:
    """`conv` by floating-point matrix products over the windows laid out, a few images at a time.

    Exact: no partial sum exceeds `bound` in magnitude, and below 2^24 (2^53) float32 (float64) holds every integer.
    """
    weights = _weights(op)
    out, per_group, kernel_h, kernel_w = weights.shape
    peak = max(int(np.abs(x).max(initial=0)), int(np.abs(op.pad_code).max()))
    bound = int(np.abs(weights).sum(axis=(1, 2, 3)).max()) * peak
    assert bound < 1 << 53, f"{op.name}: float64 would round"
    real = np.float32 if bound < 1 << 24 else np.float64
    padded = _pad_map(x, op.padding, op.pad_code).astype(real)
    windows = _window_grid(padded, (kernel_h, kernel_w), op.stride, op.dilation)
    n, height, width = windows.shape[:3]
    depth = per_group * kernel_h * kernel_w
    # (groups, depth, out/groups) on the right of (groups, positions, depth)
    right = weights.reshape(op.groups, out // op.groups, depth).transpose(0, 2, 1).astype(real)
    acc = np.empty((n, height, width, out), np.int64)
    batch = max(1, _GATHER_BYTES // (8 * height * width * depth * op.groups))
    for start in range(0, n, batch):
        left = windows[start : start + batch].reshape(-1, op.groups, depth).transpose(1, 0, 2)
        product = (left @ right).transpose(1, 0, 2)
        acc[start : start + batch] = product.reshape(-1, height, width, out).astype(np.int64)
    return acc


def _requant(op: Requant, x: Wide) -> Wide:
    """Section 3: one multiplication, one addition, one arithmetic shift and a clamp, in int64."""
    shifted: Wide = (x * op.multiplier.astype(np.int64) + op.bias) >> op.shift.astype(np.int64)
    return np.minimum(np.maximum(shifted, op.lo), op.hi)


def _add(op: Add, a: Wide, b: Wide) -> Wide:
    """Section 4: right shifts round half up."""
    return align(a, op.shift_a) + align(b, op.shift_b)


def _thresholds(op: Thresholds, x: Wide) -> Wide:
    """Section 8."""
    passed = sum((x > row for row in op.after.astype(np.int64)), np.zeros(x.shape, np.int64))
    return op.base.astype(np.int64) + op.sign * passed


def _table(op: Table, x: Wide) -> Wide:
    """Section 9: the entry of the channel's own column."""
    index = np.clip(x - op.first, 0, len(op.table) - 1)
    return np.take_along_axis(op.table.astype(np.int64), index.reshape(-1, x.shape[-1]), axis=0).reshape(x.shape)


def _clip(op: Clip, x: Wide) -> Wide:
    return np.minimum(np.maximum(x, op.lo), op.hi)


def _maxpool(op: MaxPool, x: Wide) -> Wide:
    """Section 4: positions outside the map are smaller than anything."""
    padded = _pad_map(x, op.padding, int(np.iinfo(np.int64).min))
    largest: Wide = _window_grid(padded, op.kernel, op.stride).max(axis=(-2, -1))
    return largest


def _sumpool(op: SumPool, x: Wide) -> Wide:
    """Section 4: positions outside the map count 0; the divisor is in the result's scale."""
    total: Wide = _window_grid(_pad_map(x, op.padding, 0), op.kernel, op.stride).sum(axis=(-2, -1))
    return align(total, op.shift)


def _slice(op: Slice, x: Wide) -> Wide:
    return x[:, slice(*op.h), slice(*op.w), slice(*op.c)]


def _pad(op: Pad, x: Wide) -> Wide:
    return np.pad(x, ((0, 0), op.h, op.w, op.c))


def _flatten(op: Flatten, x: Wide) -> Wide:
    """Section 4: (C, H, W) order, as of torch's flatten of NCHW."""
    n, height, width, channels = x.shape
    return x.transpose(0, 3, 1, 2).reshape(n, 1, 1, channels * height * width)


_OPS: dict[type[Op], Callable[..., Wide]] = {
    Requant: _requant,
    Add: _add,
    Clip: _clip,
    Thresholds: _thresholds,
    Table: _table,
    MaxPool: _maxpool,
    SumPool: _sumpool,
    Slice: _slice,
    Pad: _pad,
    Flatten: _flatten,
}
