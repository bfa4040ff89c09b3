"""From a plan to groups: operations that go over the pixels of one map together, a tile of pixels at a time.

A value that only its own group reads exists as one tile; the others are whole maps in the arena.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from bitstrata_runtime.plan import Add, Clip, Conv, Flatten, MaxPool, Op, Pad, Plan, Requant, Slice, SumPool, Value

ELEMENTWISE = (Requant, Add, Clip)
Indices = NDArray[np.int64]


@dataclass
class Group:
    """Operations over the pixels of maps of one height and width, in the order in which they run."""

    shape: tuple[int, int]
    ops: list[Op] = field(default_factory=list)

    @property
    def pixels(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Schedule:
    """`values` are the plan's, some of them with another shape; `maps`: which ones exist whole."""

    values: tuple[Value, ...]
    groups: tuple[Group, ...]
    input: int
    output: int
    maps: frozenset[int]

    def makers(self, kind: type[Op]) -> dict[int, Op]:
        """Value -> the operation of this kind that makes it."""
        return {op.output: op for group in self.groups for op in group.ops if isinstance(op, kind)}

    def first_last(self) -> dict[int, tuple[int, int]]:
        """Of every value in `maps`: the group that makes it (-1: the input) and the last one that reads it."""
        spans = dict.fromkeys(self.maps, (-1, -1))
        for position, group in enumerate(self.groups):
            for op in group.ops:
                for index in op.inputs:
                    if index in spans:
                        spans[index] = (spans[index][0], position)
                if op.output in spans:
                    spans[op.output] = (position, position)
        return spans


def schedule(plan: Plan) -> Schedule:
    """The groups of a plan. Operations that nothing needs are left out; cheap ones wait until they are needed."""
    values = list(plan.values)
    ops = _delay(_sink_clips(_needed(plan.ops, plan.output), values, plan.output))
    groups = _group(ops, values)
    home = {op.output: position for position, group in enumerate(groups) for op in group.ops}
    maps = {plan.input, plan.output}
    for position, group in enumerate(groups):
        maps |= {index for op in group.ops for index in op.inputs if home.get(index) != position}
    return Schedule(tuple(values), tuple(groups), plan.input, plan.output, frozenset(maps))


def _readers(ops: Sequence[Op], index: int) -> list[Op]:
    return [op for op in ops if index in op.inputs]


def _needed(ops: Sequence[Op], output: int) -> list[Op]:
    needed, kept = {output}, []
    for op in reversed(ops):
        if op.output in needed:
            needed |= set(op.inputs)
            kept.append(op)
    return kept[::-1]


def _sink_clips(ops: list[Op], values: list[Value], output: int) -> list[Op]:
    """Clip, then slice becomes slice, then clip: the slice can then read a map that exists anyway."""
    result = list(ops)
    for position, op in enumerate(ops):
        if not isinstance(op, Clip) or op.output == output:
            continue
        readers = _readers(result, op.output)
        if len(readers) != 1 or not isinstance(readers[0], Slice):
            continue
        cut = readers[0]
        source, clipped = values[op.inputs[0]], values[op.output]
        # The two exchange their places and their values; the slice's result takes the bounds of what it cuts.
        result[position] = replace(cut, inputs=op.inputs, output=op.output)
        result[result.index(cut)] = replace(op, inputs=(op.output,), output=cut.output)
        values[op.output] = replace(clipped, shape=values[cut.output].shape, lo=source.lo, hi=source.hi)
    return result


def _delay(ops: list[Op]) -> list[Op]:
    """Slices, pads and clips that one operation reads move to just before it."""
    result = list(ops)
    for op in reversed(ops):
        if isinstance(op, Slice | Pad | Clip):
            readers = _readers(result, op.output)
            if len(readers) == 1 or (readers and not isinstance(op, Clip)):
                result.remove(op)
                result.insert(min(result.index(reader) for reader in readers), op)
    return result


def _group(ops: list[Op], values: Sequence[Value]) -> list[Group]:
    groups: list[Group] = []
    home: dict[int, int] = {}
    for op in ops:
        shape = values[op.output].shape[:2]
        earliest = 0
        for index in op.inputs:
            if index in home:
                earliest = max(earliest, home[index] + (0 if reads_own_pixel(op, index, values) else 1))
        # What works on single elements goes where its input is; the rest goes as late as it can.
        places = range(earliest if isinstance(op, ELEMENTWISE) else max(earliest, len(groups) - 1), len(groups))
        position = next((place for place in places if groups[place].shape == shape), len(groups))
        if position == len(groups):
            groups.append(Group(shape))
        groups[position].ops.append(op)
        home[op.output] = position
    return groups


def reads_own_pixel(op: Op, index: int, values: Sequence[Value]) -> bool:
    """Whether each pixel of op's result needs no more of the value `index` than the same pixel."""
    source, result = values[index], values[op.output]
    if isinstance(op, ELEMENTWISE):
        return True
    if source.shape[:2] != result.shape[:2]:
        return False
    first, last = reach(op, values)
    own = np.arange(result.shape[0] * result.shape[1])
    return bool((first >= own).all() and (last <= own).all())


def reach(op: Op, values: Sequence[Value]) -> tuple[Indices, Indices]:
    """The first and last pixel of its inputs that each pixel of op's result reads, two arrays (pixels,).

    A pixel that reads nothing has a first one behind the map and a last one of -1.
    """
    (height, width, _), (out_h, out_w, _) = values[op.inputs[0]].shape, values[op.output].shape
    if isinstance(op, ELEMENTWISE):
        return np.arange(out_h * out_w), np.arange(out_h * out_w)
    if isinstance(op, Flatten):
        return np.zeros(1, np.int64), np.full(1, height * width - 1)
    (top, bottom), (left, right) = _axes(op, (height, width), (out_h, out_w))
    first = top[:, np.newaxis] * width + left
    last = bottom[:, np.newaxis] * width + right
    empty = (top > bottom)[:, np.newaxis] | (left > right)
    return np.where(empty, height * width, first).ravel(), np.where(empty, -1, last).ravel()


def _axes(op: Op, sizes: tuple[int, int], outs: tuple[int, int]) -> list[tuple[Indices, Indices]]:
    """Of rows and columns: the first and last ones inside the map that each row or column of the result reads."""
    if isinstance(op, Slice):
        return [(a, a) for a in (np.arange(*bounds) for bounds in (op.h, op.w))]
    if isinstance(op, Pad):
        starts = [np.arange(out) - before for out, (before, _) in zip(outs, (op.h, op.w), strict=True)]
        return [
            (np.maximum(a, 0), np.where(a < 0, -1, np.minimum(a, n - 1))) for a, n in zip(starts, sizes, strict=True)
        ]
    assert isinstance(op, Conv | MaxPool | SumPool)
    kernel = op.codes.shape[2:] if isinstance(op, Conv) else op.kernel
    dilation = op.dilation if isinstance(op, Conv) else (1, 1)
    result = []
    for axis in (0, 1):
        begin = np.arange(outs[axis]) * op.stride[axis] - op.padding[2 * axis]
        elements = begin[:, np.newaxis] + np.arange(kernel[axis]) * dilation[axis]
        inside = (elements >= 0) & (elements < sizes[axis])
        first = np.where(inside, elements, sizes[axis]).min(axis=1)
        result.append((first, np.where(inside, elements, -1).max(axis=1)))
    return result
