"""A plan: the integer operations of a program at one precision map, every constant resolved.

Made by `derive.derive(program, precision_map)`, read by the reference executor and by the engine. Tensors are NHWC;
shapes below are (H, W, C). Every operation here is integer arithmetic only, defined bit by bit in spec/numerics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Value:
    """A tensor of the plan. dtype is "u8", "s8" or "i32"; lo and hi are proved bounds of its integers."""

    name: str
    shape: tuple[int, int, int]  # (H, W, C)
    dtype: str
    lo: int
    hi: int
    scale: float | None = None  # real value of one unit; None for codes and accumulators


@dataclass(frozen=True)
class Op:
    """Common part of all operations: indices into `Plan.values` of the inputs, and of the result."""

    name: str
    inputs: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Conv(Op):
    """acc[n,y,x,o] = sum over the window of (mul*codes[o,i,ky,kx] + add) * x, x = pad_code outside the map.

    Cross-correlation as in torch. codes: int8 (out, in/groups, kh, kw). pad_code: int32 (in channels,). int32 result,
    proved not to overflow.
    """

    layer: str
    codes: NDArray[np.int8]
    mul: int
    add: int
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, bottom, left, right
    dilation: tuple[int, int]
    groups: int
    pad_code: NDArray[np.int32]


@dataclass(frozen=True)
class Requant(Op):
    """out = clamp((x * multiplier[c] + bias[c]) >> shift[c], lo, hi), in int64, arithmetic shift.

    The result is codes (u8/s8) or fixed point (i32), as the output value's dtype says.
    multiplier: int32 (C,), bias: int64 (C,), shift: uint8 (C,) in 0..62.
    """

    multiplier: NDArray[np.int32]
    bias: NDArray[np.int64]
    shift: NDArray[np.uint8]
    lo: int
    hi: int


@dataclass(frozen=True)
class Thresholds(Op):
    """out = base[c] + sign[c] * (number of j with x > after[j, c]): a requantization without multiplication.

    x is i32, the result codes (u8/s8). after: int32 (levels, C); sign: int8 (C,), 1 or -1; base: int32 (C,).
    Made of `Requant` by `thresholds.as_thresholds`, equal to it for every x.
    """

    after: NDArray[np.int32]
    sign: NDArray[np.int8]
    base: NDArray[np.int32]


@dataclass(frozen=True)
class Table(Op):
    """out = table[min(max(x - first, 0), entries - 1), c]: a requantization by lookup.

    x is i32. table: int32 (entries, C), within the result's dtype (u8, s8 or i32). Made of `Requant` by
    `lookup.as_tables`, equal to it for every x within the input value's bounds.
    """

    table: NDArray[np.int32]
    first: int


@dataclass(frozen=True)
class Add(Op):
    """out = align(a, shift_a) + align(b, shift_b).

    align(v, s) = v << -s for s <= 0, and (v + (1 << (s-1))) >> s for s > 0 (rounding half up), in int64; the sum is
    proved to fit int32.
    """

    shift_a: int
    shift_b: int


@dataclass(frozen=True)
class Clip(Op):
    """out = min(max(x, lo), hi)."""

    lo: int
    hi: int


@dataclass(frozen=True)
class MaxPool(Op):
    """Maximum over the window; positions outside the map do not take part."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]


@dataclass(frozen=True)
class SumPool(Op):
    """out = (sum over the window + half) >> shift in int64, half = 1 << (shift-1) or 0; outside the map counts 0.

    Fixed point gives fixed point (i32). Codes give codes of the input's own type, with shift 0, proved to fit it.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    shift: int


@dataclass(frozen=True)
class Slice(Op):
    """out = x[:, h0:h1:hs, w0:w1:ws, c0:c1:cs]."""

    h: tuple[int, int, int]
    w: tuple[int, int, int]
    c: tuple[int, int, int]


@dataclass(frozen=True)
class Pad(Op):
    """Zeros around the map and the channels: (before, after) each."""

    h: tuple[int, int]
    w: tuple[int, int]
    c: tuple[int, int]


@dataclass(frozen=True)
class Flatten(Op):
    """(H, W, C) -> (1, 1, C*H*W), elements in C, H, W order (torch's flatten of NCHW)."""


@dataclass(frozen=True)
class Plan:
    """Operations in execution order. `values[input]` is the network's input, `values[output]` its logits (i32)."""

    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    input: int
    output: int
    input_step: float  # step and offset of the input grid: value = step * (code + offset)
    input_offset: tuple[float, ...]
