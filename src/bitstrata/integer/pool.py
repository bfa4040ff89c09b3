"""Memory that one step gives back and the next one takes, so that it is not mapped anew every time."""

from __future__ import annotations

import bisect
import math
import mmap
import weakref
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

ALIGNMENT = 64  # bytes: a line of the cache
SMALLEST = 1 << 28  # bytes of a segment, of which only pages that were written take memory
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


class Span(NamedTuple):
    """Bytes start..end - 1 of a segment."""

    segment: int
    start: int
    end: int


class Pool:
    """Memory in segments, out of which blocks are cut where they fit first; free neighbours become one again.

    So what a step no longer needs serves blocks of every size, as the activations of small maps do for the gradients
    of large ones. A block that is not given back returns with its last reference.
    """

    def __init__(self) -> None:
        self._segments: list[mmap.mmap] = []
        self._free: list[Span] = []  # in order, no two of them adjacent
        self._lent: dict[int, tuple[weakref.ref[Any], Span]] = {}  # by the block's identity
        self._lost: list[Span] = []  # of blocks that were not given back
        self._holders: dict[int, int] = {}  # of a block, by its identity

    def __reduce__(self) -> tuple[type[Pool], tuple[()]]:
        return Pool, ()  # a copy has memory of its own

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A contiguous array; its elements are arbitrary."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        span = self._cut(max(-(-size // ALIGNMENT), 1) * ALIGNMENT)
        block = np.frombuffer(self._segments[span.segment], np.uint8, span.end - span.start, span.start)
        self._lent[id(block)] = (self._watch(block, span), span)
        return block[:size].view(kind).reshape(shape)

    def share(self, array: NDArray[Any], holders: int) -> None:
        """A taken array that so many will give back before the backward pass ends."""
        self._holders[id(array.base)] = holders

    def sole(self, array: NDArray[Any]) -> bool:
        """Whether nobody else holds it."""
        return self._holders.get(id(array.base), 1) == 1

    def give(self, array: NDArray[Any]) -> None:
        """Back, as it was taken or reshaped; its giver reads it no more."""
        key = id(array.base)
        left = self._holders.pop(key, 1) - 1
        if left:
            self._holders[key] = left
            return
        _, span = self._lent.pop(key)
        self._put(span)

    def forget(self) -> None:
        """A backward pass broke off: nobody will give back what was shared."""
        self._holders.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all segments, lent or free."""
        return sum(len(segment) for segment in self._segments)

    @property
    def lent(self) -> int:
        """Bytes that were taken and not given back."""
        return sum(span.end - span.start for _, span in self._lent.values())

    def _watch(self, block: NDArray[np.uint8], span: Span) -> weakref.ref[Any]:
        lent, lost, key = self._lent, self._lost, id(block)

        def gone(_: object) -> None:  # at any moment, in any thread: the free list must not change now
            if lent.pop(key, None) is not None:
                lost.append(span)

        return weakref.ref(block, gone)

    def _cut(self, size: int) -> Span:
        while self._lost:
            self._put(self._lost.pop())
        if not self._lent and len(self._segments) > 1:  # one as large as all of them has no bounds inside
            total = self.nbytes
            self._segments.clear()
            self._free.clear()
            self._grow(total)
        at = next((i for i, (_, start, end) in enumerate(self._free) if end - start >= size), -1)
        if at < 0:
            self._grow(max(size, self.nbytes, SMALLEST))
            at = len(self._free) - 1
        segment, start, end = self._free[at]
        if start + size == end:
            del self._free[at]
        else:
            self._free[at] = Span(segment, start + size, end)
        return Span(segment, start, start + size)

    def _grow(self, size: int) -> None:
        """A further segment.

        Raises:
            OSError: the system has no memory for it.
        """
        # not by malloc: once it has freed something as large, it keeps what torch frees
        segment = mmap.mmap(-1, size, **PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # of a kernel without huge pages
                segment.madvise(mmap.MADV_HUGEPAGE)
        self._segments.append(segment)
        self._free.append(Span(len(self._segments) - 1, 0, size))

    def _put(self, span: Span) -> None:
        at = bisect.bisect_left(self._free, span)
        segment, start, end = span
        if at < len(self._free) and self._free[at][:2] == (segment, end):
            end = self._free.pop(at).end
        if at and self._free[at - 1].segment == segment and self._free[at - 1].end == start:
            at -= 1
            start = self._free.pop(at).start
        self._free.insert(at, Span(segment, start, end))
