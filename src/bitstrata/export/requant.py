"""The cheapest exact form of each requantization: thresholds, 32 bits, or the 64 bits of its definition.

A requantization f(x) = clamp((x*M + B) >> s, lo, hi) is monotonic in x, and so are the forms that stand for it here. A
monotonic function that equals f on both sides of each of f's steps, and at both ends of what x can be, equals f
everywhere between: from one step to the next f is constant, and the other lies between two equal values. Thresholds are
those steps; for 32 bits the constants are chosen so that the equalities hold, in exact integers. What has no such
constants keeps 64 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitstrata_runtime.plan import Requant, Value

INT32_MIN, INT32_MAX = -(1 << 31), (1 << 31) - 1
MOST_THRESHOLDS = 3  # beyond these, multiplying takes less memory
MOST_LEVELS = 256


@dataclass(frozen=True)
class Thresholds:
    """result = lowest + number of reached thresholds; of falling channels highest - that number.

    thresholds: ascending, int16 or int32 (channels, highest - lowest). falling: bool (channels,). One row if all
    channels are the same.
    """

    thresholds: NDArray[np.int16] | NDArray[np.int32]
    falling: NDArray[np.bool_]
    lowest: int
    highest: int


@dataclass(frozen=True)
class Short:
    """result = clamp((clamp(x, start, stop)*multiplier + addend) >> shift, lowest, highest), no sum beyond 32 bits.

    Arrays (channels,), or (1,) if all channels are the same; start and stop are None where x needs no clamp.
    """

    multiplier: NDArray[np.int32]
    addend: NDArray[np.int32]
    shift: NDArray[np.uint8]
    start: NDArray[np.int32] | None
    stop: NDArray[np.int32] | None
    lowest: int
    highest: int


@dataclass(frozen=True)
class Wide:
    """The definition itself, in 64 bits; arrays as of `Short`. split: 32 bits give the same, in two parts.

    With M = 2^s*Mh + Ml and B likewise, (x*M + B) >> s = x*Mh + Bh + ((x*Ml + Bl) >> s), as the first terms are whole
    numbers. If the result is a 32-bit number they may wrap; x*Ml + Bl must not.
    """

    multiplier: NDArray[np.int32]
    bias: NDArray[np.int64]
    shift: NDArray[np.uint8]
    lowest: int
    highest: int
    split: bool


Form = Thresholds | Short | Wide
Bounds = tuple[NDArray[np.int64], NDArray[np.int64]]


def choose(op: Requant, source: Value, result: Value, bounds: Bounds | None = None) -> Form:
    """The form which equals `op` for inputs within the proved bounds of `source`, or within `bounds`, one a channel."""
    constants = np.stack([op.multiplier.astype(object), op.bias.astype(object), op.shift.astype(object)], axis=1)
    firsts, lasts = bounds or (np.full(len(constants), source.lo), np.full(len(constants), source.hi))
    if (constants == constants[0]).all():
        constants, firsts, lasts = constants[:1], firsts.min(keepdims=True), lasts.max(keepdims=True)
    lo, hi = max(op.lo, result.lo), min(op.hi, result.hi)  # results are proved to be within the value's bounds
    ends = zip(firsts.tolist(), lasts.tolist(), strict=True)
    channels = [_Channel(int(m), int(b), int(s), lo, hi, *end) for (m, b, s), end in zip(constants, ends, strict=True)]
    if result.dtype != "i32":
        if hi - lo <= MOST_THRESHOLDS:
            thresholds = _thresholds(channels)
            if thresholds is not None:
                return thresholds
        for clamped in (False, True):
            short = _short(channels, clamped)
            if short is not None:
                return short
    multiplier, bias, shift = (np.array(column.tolist(), np.int64) for column in constants.T)
    split = result.dtype == "i32" and all(channel.splits() for channel in channels)
    return Wide(multiplier.astype(np.int32), bias, shift.astype(np.uint8), lo, hi, split)


@dataclass(frozen=True)
class _Channel:
    """f(x) = clamp((x*m + b) >> s, lo, hi) for x in [first, last], in exact integers."""

    m: int
    b: int
    s: int
    lo: int
    hi: int
    first: int
    last: int

    def at(self, x: int) -> int:
        return min(max((x * self.m + self.b) >> self.s, self.lo), self.hi)

    def splits(self) -> bool:
        """Whether no result needs the clamp, and the lower parts of the constants stay within 32 bits."""
        ends = [(x * self.m + self.b) >> self.s for x in (self.first, self.last)]
        part = (1 << self.s) - 1
        fits = (max(abs(self.first), abs(self.last)) + 1) * part <= INT32_MAX
        return fits and self.lo <= min(ends) and max(ends) <= self.hi

    def step(self, level: int) -> tuple[int, int]:
        """The x next to each other between which f reaches `level`: with at least `level`, and with less. m != 0."""
        rest = (level << self.s) - self.b  # reached where x*m >= rest
        if self.m > 0:
            inside = -(-rest // self.m)
            return inside, inside - 1
        inside = rest // self.m
        return inside, inside + 1

    def steps(self) -> list[tuple[int, int, int]]:
        """(level, inside, outside) of every step whose two sides x can be."""
        if self.m == 0:
            return []
        found = [(level, *self.step(level)) for level in range(self.lo + 1, self.hi + 1)]
        return [step for step in found if all(self.first <= x <= self.last for x in step[1:])]


def _thresholds(channels: list[_Channel]) -> Thresholds | None:
    """None if a threshold does not fit 32 bits."""
    rows, falling = [], []
    for channel in channels:
        # A threshold that is never reached is one more than x can be; one that always is, the least x.
        beyond, levels = channel.last + 1, range(channel.lo + 1, channel.hi + 1)
        falls = channel.m < 0
        if channel.m == 0:
            row = [channel.first if channel.at(0) >= level else beyond for level in levels]
        else:
            row = [channel.step(level)[1 if falls else 0] for level in levels]
        rows.append(sorted(min(max(x, channel.first), beyond) for x in row))
        falling.append(falls)
    flat = [x for row in rows for x in row]
    if not flat or max(flat) > INT32_MAX:
        return None
    narrow = min(flat) >= -(1 << 15) and max(flat) < 1 << 15
    thresholds = np.array(rows, np.int16) if narrow else np.array(rows, np.int32)
    return Thresholds(thresholds, np.array(falling), channels[0].lo, channels[0].hi)


def _short(channels: list[_Channel], clamped: bool) -> Short | None:
    """The 32-bit form, x clamped to the outermost steps or not; None if a channel has none."""
    if channels[0].hi - channels[0].lo >= MOST_LEVELS:
        return None
    found = []
    for channel in channels:
        constants = _short_constants(channel, clamped)
        if constants is None:
            return None
        found.append(constants)
    start, stop, multiplier, addend, shift = (np.array(column, np.int32) for column in zip(*found, strict=True))
    return Short(
        multiplier,
        addend,
        shift.astype(np.uint8),
        start if clamped else None,
        stop if clamped else None,
        channels[0].lo,
        channels[0].hi,
    )


def _short_constants(f: _Channel, clamped: bool) -> tuple[int, int, int, int, int] | None:
    """start, stop, multiplier, addend, shift."""
    steps = f.steps()
    if not steps:
        return f.first, f.last, 0, f.at(f.first), 0
    sides = [x for _, *pair in steps for x in pair]
    start, stop = (min(sides), max(sides)) if clamped else (f.first, f.last)
    tallest = max(abs(f.lo), abs(f.hi)) + 1
    for shift in range(30, -1, -1):
        drop = f.s - shift
        multiplier = (f.m + (1 << (drop - 1))) >> drop if drop > 0 else f.m << -drop
        if tallest << shift > INT32_MAX or max(abs(start), abs(stop)) * abs(multiplier) > INT32_MAX:
            continue
        addend = _addend(f, (start, stop), multiplier, shift) if multiplier * f.m > 0 else None
        if addend is None:
            return None  # a smaller shift is coarser still
        ends = [x * multiplier + addend for x in (start, stop)]
        if min(*ends, addend) >= INT32_MIN and max(*ends, addend) <= INT32_MAX:
            return start, stop, multiplier, addend, shift
    return None


def _addend(f: _Channel, ends: tuple[int, int], multiplier: int, shift: int) -> int | None:
    """An addend with which both sides of all steps, and both ends, have f's results; None if there is none."""
    least, most = -(1 << 80), 1 << 80
    for level, inside, outside in f.steps():
        least = max(least, (level << shift) - multiplier * inside)
        most = min(most, (level << shift) - 1 - multiplier * outside)
    for end in ends:
        if f.at(end) > f.lo:
            least = max(least, (f.at(end) << shift) - multiplier * end)
        if f.at(end) < f.hi:
            most = min(most, ((f.at(end) + 1) << shift) - 1 - multiplier * end)
    return least + (most - least) // 2 if least <= most else None
