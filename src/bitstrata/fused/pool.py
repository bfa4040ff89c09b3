"""Memory that one step gives back and the next one takes, so that it is not mapped anew every time."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class Pool:
    """Tensors by size. What is not given back is simply freed with its last reference."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._holders: dict[int, int] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU; its elements are arbitrary."""
        size = int(torch.Size(shape).numel()) * dtype.itemsize
        free = self._free[size]
        block = free.pop() if free else torch.empty(size, dtype=torch.uint8)
        return block.view(dtype).view(shape)

    def share(self, tensor: Tensor, holders: int) -> None:
        """A taken tensor that so many will give back."""
        self._holders[tensor.data_ptr()] = holders

    def give(self, tensor: Tensor) -> None:
        """Back, whole as it was taken; its giver reads it no more."""
        left = self._holders.pop(tensor.data_ptr(), 1) - 1
        if left:
            self._holders[tensor.data_ptr()] = left
            return
        block = tensor.reshape(-1).view(torch.uint8)
        self._free[block.numel()].append(block)

    @property
    def nbytes(self) -> int:
        """Bytes that wait."""
        return sum(size * len(blocks) for size, blocks in self._free.items())
