"""Memory that one step gives back and the next one takes, so that it is not mapped anew every time."""

from __future__ import annotations

import bisect
import math

import torch
from torch import Tensor

LOOSE = 2  # a block serves what takes at least this part of it, one in LOOSE


class Pool:
    """Blocks of memory. What is not given back is simply freed with its last reference."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []  # blocks, by size
        self._holders: dict[int, int] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU; its elements are arbitrary."""
        size = math.prod(shape) * dtype.itemsize
        at = bisect.bisect_left(self._free, size, key=Tensor.numel)
        fits = at < len(self._free) and self._free[at].numel() <= LOOSE * size
        block = self._free.pop(at) if fits else torch.empty(size, dtype=torch.uint8)
        return block[:size].view(dtype).view(shape)

    def share(self, tensor: Tensor, holders: int) -> None:
        """A taken tensor that so many will give back before the backward pass ends."""
        self._holders[tensor.data_ptr()] = holders

    def sole(self, tensor: Tensor) -> bool:
        """Whether nobody else holds it."""
        return self._holders.get(tensor.data_ptr(), 1) == 1

    def give(self, tensor: Tensor) -> None:
        """Back, as it was taken; its giver reads it no more."""
        address = tensor.data_ptr()
        left = self._holders.pop(address, 1) - 1
        if left:
            self._holders[address] = left
            return
        block = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        bisect.insort(self._free, block, key=Tensor.numel)

    def forget(self) -> None:
        """A backward pass broke off: nobody will give back what was shared."""
        self._holders.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that wait."""
        return sum(block.numel() for block in self._free)
