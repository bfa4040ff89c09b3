"""Interval arithmetic of the integer program, and the integer constants that the intervals allow.

Sections refer to spec/numerics.md. An interval is a pair of int64 arrays (C,): proved bounds of a value's integers,
a channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from .errors import ProgramError

if TYPE_CHECKING:
    from numpy.typing import NDArray

INT32_MAX = (1 << 31) - 1
FIXED_LIMIT = (1 << 31) - (1 << 10)  # what a fixed-point bound may reach; the rest is room for roundings

_ROWS = 1 << 16  # of weights at a time

Bounds: TypeAlias = "tuple[NDArray[np.int64], NDArray[np.int64]]"


def constant(low: int, high: int, channels: int) -> Bounds:
    """The same interval in every channel."""
    return np.full(channels, low, np.int64), np.full(channels, high, np.int64)


def join(bounds: Bounds, value: int | NDArray[np.int64] | NDArray[np.int32]) -> Bounds:
    """The smallest intervals that hold `bounds` and `value`."""
    return np.minimum(bounds[0], value), np.maximum(bounds[1], value)


def largest(bounds: Bounds) -> NDArray[np.int64]:
    """Largest magnitude in each interval, (C,)."""
    return np.maximum(np.abs(bounds[0]), np.abs(bounds[1]))


def conv(codes: NDArray[np.int8], mul: int, add: int, groups: int, bounds: Bounds) -> Bounds:
    """Section 2: bounds of the accumulators of weights mul*codes + add over inputs within `bounds`.

    codes: (out, in/groups, kh, kw). With w = w⁺ + w⁻ split by sign, sum of min(w*lo, w*hi) is
    sum(w⁺)*lo + sum(w⁻)*hi, so the kernel's positions are summed before they meet the interval.
    """
    out, per_group = codes.shape[:2]
    positive, negative = _signed_sums(codes.reshape(out * per_group, -1), mul, add)
    positive, negative = (part.reshape(groups, out // groups, per_group) for part in (positive, negative))
    low, high = (bound.reshape(groups, per_group, 1) for bound in bounds)
    return (positive @ low + negative @ high).reshape(out), (positive @ high + negative @ low).reshape(out)


def _signed_sums(codes: NDArray[np.int8], mul: int, add: int) -> Bounds:
    """Sums over each row of codes (rows, taps) of the positive weights mul*code + add, and of the negative ones.

    A tap at a time over rows that stay in the cache, in the narrowest integers that hold every sum: the weights of a
    large network are read in milliseconds.
    """
    rows, taps = codes.shape
    most = (abs(mul) * 128 + abs(add)) * taps
    dtype = next((np.dtype(t) for t in (np.int16, np.int32) if most <= np.iinfo(t).max), np.dtype(np.int64))
    total, positive = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for start in range(0, rows, _ROWS):
        part = codes[start : start + _ROWS]
        both, above = np.zeros((2, len(part)), dtype)
        for tap in range(taps):
            weight = part[:, tap].astype(dtype)
            np.multiply(weight, mul, out=weight)
            np.add(weight, add, out=weight)
            np.add(both, weight, out=both)
            np.maximum(weight, 0, out=weight)
            np.add(above, weight, out=above)
        total[start : start + _ROWS] = both
        positive[start : start + _ROWS] = above
    return positive, total - positive


def align(value: NDArray[np.int64], shift: int) -> NDArray[np.int64]:
    """Section 4: value * 2^-shift, in int64; a right shift rounds half up."""
    return (value + (1 << (shift - 1))) >> shift if shift > 0 else value << -shift


def round_half_up(value: float) -> int:
    """floor(value + 1/2), as an exact integer."""
    return math.floor(value + 0.5)


def clamp_range(
    clip: tuple[float | None, float | None], unit: float, low: int, high: int, where: str
) -> tuple[int, int]:
    """Section 3: [low, high] narrowed by real clip bounds rounded to `unit`s. ProgramError if nothing is left."""
    if clip[0] is not None:
        low = max(low, round_half_up(clip[0] / unit))
    if clip[1] is not None:
        high = min(high, round_half_up(clip[1] / unit))
    if low > high:
        raise ProgramError(f"{where}: clip {clip} in units of {unit} leaves no integer: [{low}, {high}]")
    return low, high


def code_clamp(
    clip: tuple[float | None, float | None], step: float, offset: float, code_range: tuple[int, int]
) -> tuple[int, int]:
    """Section 3: the codes of real clip bounds on the grid step*(code + offset), themselves clamped to its range."""
    low, high = code_range
    least, most = (None if bound is None else round_half_up(bound / step - offset) for bound in clip)
    return (
        low if least is None else min(max(least, low), high),
        high if most is None else min(max(most, low), high),
    )


@dataclass(frozen=True)
class Constants:
    """out = (x * multiplier + bias) >> shift, a channel: int32, int64 and uint8 arrays (C,)."""

    multiplier: NDArray[np.int32]
    bias: NDArray[np.int64]
    shift: NDArray[np.uint8]

    def image(self, bounds: Bounds, low: int, high: int) -> Bounds:
        """Intervals of the clamped result: the formula is monotone in x, so the end points suffice."""
        ends = [
            np.clip((end * self.multiplier.astype(np.int64) + self.bias) >> self.shift.astype(np.int64), low, high)
            for end in bounds
        ]
        return np.minimum(*ends), np.maximum(*ends)


def requant_constants(
    scale: NDArray[np.float64], offset: NDArray[np.float64], magnitude: NDArray[np.int64], where: str
) -> Constants:
    """Section 3: the finest (M, B, s) a channel for `code = floor(scale*x + offset + 1/2)` with |x| <= magnitude.

    scale and offset: float64 (C,), A and Bv of the text; magnitude: int64 (C,) below 2^31, X of the text. Raises
    ProgramError that names a channel for which no shift keeps the constants within their types.
    """
    channels = scale.size
    found = Constants(np.zeros(channels, np.int32), np.zeros(channels, np.int64), np.zeros(channels, np.uint8))
    pending = np.arange(channels)
    # |scale| >= 2^(e-1), so at shifts above 32 - e the multiplier reaches 2^31: only zeros (and NaN) start at 62.
    exponents = np.frexp(np.where(np.isfinite(scale) & (scale != 0), scale, 2.0**-62))[1]
    for shift in range(min(62, int(32 - exponents.min(initial=32))), -1, -1):
        if not pending.size:
            return found
        multiplier, bias, fits = _at_shift(scale[pending], offset[pending], magnitude[pending], shift)
        done = pending[fits]
        found.multiplier[done], found.bias[done], found.shift[done] = multiplier[fits], bias[fits], shift
        pending = pending[~fits]
    if pending.size:
        channel = int(pending[0])
        raise ProgramError(
            f"{where}: channel {channel}: no requantization constants: one input unit is {scale[channel]!r} output "
            f"units, the offset {offset[channel]!r}; the multiplier must stay below 2^31, x*M + B below 2^63"
        )
    return found


def _at_shift(
    scale: NDArray[np.float64], offset: NDArray[np.float64], magnitude: NDArray[np.int64], shift: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """M, B and whether they fit, at one shift. Every comparison is exact."""
    half, limit = (1 << shift) >> 1, np.iinfo(np.int64).max
    with np.errstate(over="ignore", invalid="ignore"):
        real_m, real_b = np.rint(np.ldexp(scale, shift)), np.rint(np.ldexp(offset, shift))
        # Below -2^63 float64 is a multiple of 2^11: adding half first is exact wherever the sum comes back into range.
        below = real_b < -(2.0**63)
        real_b = np.where(below, real_b + half, real_b)
        fits = (np.abs(real_m) < 2.0**31) & (real_b >= -(2.0**63)) & (real_b < 2.0**63)  # false for NaN
    multiplier = np.where(fits, real_m, 0.0).astype(np.int64)
    bias = np.where(fits, real_b, 0.0).astype(np.int64)
    half_left = np.where(below, 0, half)
    fits &= bias <= limit - half_left
    bias = np.where(fits, bias + half_left, 0)
    return multiplier, bias, fits & (bias >= -limit) & (np.abs(bias) <= limit - magnitude * np.abs(multiplier))


def fraction_bits(bound: float, where: str) -> int:
    """Section 4: the largest f <= 30 with bound * 2^f <= 2^31 - 2^10. Raises ProgramError if f would be negative."""
    for f in range(30, -1, -1):
        if bound <= math.ldexp(FIXED_LIMIT, -f):  # exact, and no bound is too large for it
            return f
    raise ProgramError(f"{where}: values up to {bound!r} do not fit 32-bit fixed point")
