"""Memory that one step gives back and the next one takes, so that it is not mapped anew every time."""

from __future__ import annotations

import bisect
import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

LOOSE = 2  # a block serves what takes at least this part of it, one in LOOSE


class Pool:
    """Blocks of memory. What is not given back is simply freed with its last reference."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []  # blocks, by size
        self._sizes: list[int] = []  # theirs
        self._holders: dict[int, int] = {}  # of a block, by its identity

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A contiguous array; its elements are arbitrary."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        at = bisect.bisect_left(self._sizes, size)
        if at < len(self._sizes) and self._sizes[at] <= LOOSE * size:
            block = self._free.pop(at)
            self._sizes.pop(at)
        else:
            block = np.empty(size, np.uint8)
        return block[:size].view(kind).reshape(shape)

    def share(self, array: NDArray[Any], holders: int) -> None:
        """A taken array that so many will give back before the backward pass ends."""
        self._holders[id(array.base)] = holders

    def sole(self, array: NDArray[Any]) -> bool:
        """Whether nobody else holds it."""
        return self._holders.get(id(array.base), 1) == 1

    def give(self, array: NDArray[Any]) -> None:
        """Back, as it was taken or reshaped; its giver reads it no more."""
        block = array.base
        assert isinstance(block, np.ndarray)
        left = self._holders.pop(id(block), 1) - 1
        if left:
            self._holders[id(block)] = left
            return
        at = bisect.bisect_right(self._sizes, block.nbytes)
        self._sizes.insert(at, block.nbytes)
        self._free.insert(at, block)

    def forget(self) -> None:
        """A backward pass broke off: nobody will give back what was shared."""
        self._holders.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that wait."""
        return sum(self._sizes)
