"""Where values and scratch lie in the arena, planned before anything runs.

Two maps that exist at the same time may still overlap when one is made from the other tile by tile: a result may be
written where everything has been read. How far is computed from what each tile reads (`Overlap`), for groups that run
forwards and backwards; alternating directions lets a chain of layers live in little more than its largest map.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .schedule import ELEMENTWISE, Group, Schedule, reach, reads_own_pixel

ALIGNMENT = 4
_TRIES = 60
_NOTHING = 1 << 40  # beyond every map


@dataclass(frozen=True)
class Buffer:
    """Bytes that exist from one group to another, and in tiles (`steps` is not None) only while these steps run."""

    name: str
    bytes: int
    first: int
    last: int
    steps: tuple[int, int] | None = None

    def meets(self, other: Buffer) -> bool:
        """Whether both exist at some time."""
        if self.last < other.first or other.last < self.first:
            return False
        if self.steps is None or other.steps is None:
            return True
        return self.steps[0] <= other.steps[1] and other.steps[0] <= self.steps[1]


@dataclass(frozen=True)
class Overlap:
    """Where a result may begin, in bytes from the start of a value that it is made from.

    At most `most`, or at least `least`, or at 0 if `same`; None: nowhere.
    """

    most: int | None = None
    least: int | None = None
    same: bool = False

    def allows(self, distance: int) -> bool:
        return (
            (self.most is not None and distance <= self.most)
            or (self.least is not None and distance >= self.least)
            or (self.same and distance == 0)
        )

    def distances(self) -> list[int]:
        """Candidates: the aligned distances nearest to no overlap at all."""
        found = [0] if self.same else []
        if self.most is not None:
            found.append(self.most // ALIGNMENT * ALIGNMENT)
        if self.least is not None:
            found.append(-(-self.least // ALIGNMENT) * ALIGNMENT)
        return found


@dataclass(frozen=True)
class Arena:
    """offsets: name -> bytes from the start. backward: of each group, whether it begins with the last tile."""

    bytes: int
    offsets: dict[str, int]
    backward: tuple[bool, ...]


def value_name(index: int) -> str:
    return f"value {index}"


def element_bytes(dtype: str) -> int:
    return 4 if dtype == "i32" else 1


@dataclass(frozen=True)
class Run:
    """A group and how it runs: pixels of a tile, and whether it begins with the last tile."""

    group: Group
    tile: int
    backward: bool


def overlap(plan: Schedule, source: int, result: int, run: Run) -> Overlap:
    """Where `result`, made in the group that runs, may lie with respect to `source`, which no later group reads."""
    group, tile = run.group, run.tile
    sizes = [element_bytes(plan.values[index].dtype) * plan.values[index].shape[2] for index in (source, result)]
    writer = next(step for step, op in enumerate(group.ops) if op.output == result)
    readers = [step for step, op in enumerate(group.ops) if source in op.inputs]
    first, last = _bytes_read(plan, source, run)
    starts = np.arange(0, group.pixels, tile)
    begin, end = starts * sizes[1], np.minimum(starts + tile, group.pixels) * sizes[1]
    # A tile's steps run one after the other; within the writing one, only equal places of equal elements can be shared.
    over = max(readers) < writer
    in_place = max(readers) == writer and isinstance(group.ops[writer], ELEMENTWISE) and sizes[0] == sizes[1]
    in_place = in_place and all(reads_own_pixel(group.ops[step], source, plan.values) for step in readers)
    kept, later = _limits(first, last, begin, end, run.backward)
    at_once = later if over else kept
    same = in_place and (later <= 0 if run.backward else later >= 0)
    return Overlap(least=at_once, same=same) if run.backward else Overlap(most=at_once, same=same)


def _limits(
    first: NDArray[np.int64], last: NDArray[np.int64], begin: NDArray[np.int64], end: NDArray[np.int64], backward: bool
) -> tuple[int, int]:
    """How far a result may reach if a tile keeps all that it reads, and if it keeps only what later tiles read."""
    if backward:
        needed = np.append(-_NOTHING, np.maximum.accumulate(last))
        return int((needed[1:] - begin).max()), int((needed[:-1] - begin).max())
    needed = np.append(np.minimum.accumulate(first[::-1])[::-1], _NOTHING)
    return int((needed[:-1] - end).min()), int((needed[1:] - end).min())


def plan_bytes(plan: Schedule, index: int) -> int:
    """Bytes of a whole map."""
    value = plan.values[index]
    return int(np.prod(value.shape)) * element_bytes(value.dtype)


def _bytes_read(plan: Schedule, source: int, run: Run) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each tile: the first byte of `source` that it reads, and the one behind the last."""
    value, pixels = plan.values[source], run.group.pixels
    pixel_bytes = value.shape[2] * element_bytes(value.dtype)
    first, last = np.full(pixels, plan_bytes(plan, source)), np.zeros(pixels, np.int64)
    for op in run.group.ops:
        if source not in op.inputs:
            continue
        lowest, highest = reach(op, plan.values)
        first, last = np.minimum(first, lowest * pixel_bytes), np.maximum(last, (highest + 1) * pixel_bytes)
    starts = np.arange(0, pixels, run.tile)
    return np.minimum.reduceat(first, starts), np.maximum.reduceat(last, starts)


class _Placement:
    """Buffers, which of them meet, and how results may overlap what they are made from."""

    def __init__(self, plan: Schedule, buffers: Sequence[Buffer], tiles: Sequence[int]) -> None:
        self.plan, self.buffers, self.tiles = plan, buffers, tiles
        self.meeting = [
            [j for j, other in enumerate(buffers) if j != i and buffer.meets(other)] for i, buffer in enumerate(buffers)
        ]
        self.pairs = self._pairs()

    def _pairs(self) -> dict[tuple[int, int], tuple[int, tuple[Overlap, Overlap]]]:
        """(value, result) -> their group, and what is allowed forwards and backwards."""
        index = {buffer.name: position for position, buffer in enumerate(self.buffers)}
        spans = self.plan.first_last()
        found = {}
        for source, (_, last) in spans.items():
            for result, (first, _) in spans.items():
                names = value_name(source), value_name(result)
                if first != last or source == result or any(name not in index for name in names):
                    continue
                runs = [Run(self.plan.groups[first], self.tiles[first], way) for way in (False, True)]
                ways = [overlap(self.plan, source, result, run) for run in runs]
                found[index[names[0]], index[names[1]]] = (first, (ways[0], ways[1]))
        return found

    def allowed(self, i: int, j: int, backward: Sequence[bool]) -> tuple[int, Overlap] | None:
        """(1, overlap) if j is made from i, (-1, overlap) if i is made from j."""
        for sign, pair in ((1, (i, j)), (-1, (j, i))):
            if pair in self.pairs:
                group, ways = self.pairs[pair]
                return sign, ways[backward[group]]
        return None

    def place(self, order: Sequence[int], backward: Sequence[bool]) -> tuple[int, list[int]]:
        """Each buffer at the lowest place that is free; the size and the offsets."""
        offsets = [-1] * len(self.buffers)
        for i in order:
            placed = [(j, self.allowed(i, j, backward)) for j in self.meeting[i] if offsets[j] >= 0]
            candidates = {0}
            for j, pair in placed:
                candidates.add(_aligned(offsets[j] + self.buffers[j].bytes))
                if pair is not None:
                    candidates |= {offsets[j] - pair[0] * distance for distance in pair[1].distances()}
            offsets[i] = min(at for at in candidates if at >= 0 and self._free(i, at, placed, offsets))
        return max((o + b.bytes for o, b in zip(offsets, self.buffers, strict=True)), default=0), offsets

    def _free(self, i: int, at: int, placed: list[tuple[int, tuple[int, Overlap] | None]], offsets: list[int]) -> bool:
        for j, pair in placed:
            if at + self.buffers[i].bytes <= offsets[j] or offsets[j] + self.buffers[j].bytes <= at:
                continue
            if pair is None or not pair[1].allows(pair[0] * (offsets[j] - at)):
                return False
        return True


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def plan_arena(plan: Schedule, tile_buffers: Sequence[Buffer], tiles: Sequence[int]) -> Arena:
    """Places for all maps of the schedule but its input and output, and for `tile_buffers`; tiles: pixels, a group.

    The same every time: the search for a small arena draws from a generator with a fixed seed.
    """
    maps = [
        Buffer(value_name(index), plan_bytes(plan, index), *span)
        for index, span in sorted(plan.first_last().items())
        if index not in (plan.input, plan.output)
    ]
    buffers = [*maps, *tile_buffers]
    placement = _Placement(plan, buffers, tiles)
    rng = random.Random(0)
    count = len(plan.groups)
    best: tuple[int, list[int], tuple[bool, ...]] | None = None
    for attempt in range(_TRIES):
        backward = tuple(_direction(attempt, position, rng) for position in range(count))
        weight = [buffer.bytes * (1.0 if attempt < 3 else rng.uniform(0.3, 1.0)) for buffer in buffers]
        order = sorted(range(len(buffers)), key=lambda i: -weight[i])
        size, offsets = placement.place(order, backward)
        if best is None or size < best[0]:
            best = (size, offsets, backward)
    assert best is not None
    names = [buffer.name for buffer in buffers]
    return Arena(_aligned(best[0]), dict(zip(names, best[1], strict=True)), best[2])


def _direction(attempt: int, position: int, rng: random.Random) -> bool:
    if attempt == 0:
        return False
    return position % 2 == attempt % 2 if attempt < 3 else rng.random() < 0.5
