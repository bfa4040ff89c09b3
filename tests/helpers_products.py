"""Convolutions on codes, computed slowly in int64, and arrays that end where memory ends."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pair = tuple[int, int]
Codes = NDArray[Any]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True)
class Conv:
    """Layout of a convolution: x (batch, *size, ins), w (outs, ins / groups, *kernel). padding: top, left, bottom,
    right.
    """

    batch: int
    size: Pair
    ins: int
    outs: int
    kernel: Pair
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1

    @property
    def padded(self) -> Pair:
        """Height and width with the padding."""
        return self.size[0] + self.padding[0] + self.padding[2], self.size[1] + self.padding[1] + self.padding[3]

    @property
    def out_size(self) -> Pair:
        """Height and width of the result."""
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        rows, columns = ((n - m) // s + 1 for n, m, s in zip(self.padded, spans, self.stride, strict=True))
        return rows, columns

    @property
    def x_shape(self) -> tuple[int, ...]:
        return self.batch, *self.size, self.ins

    @property
    def y_shape(self) -> tuple[int, ...]:
        return self.batch, *self.out_size, self.outs

    @property
    def w_shape(self) -> tuple[int, ...]:
        return self.outs, self.ins // self.groups, *self.kernel

    def arguments(self, isa: str, threads: int) -> dict[str, Any]:
        """What the engine's functions take."""
        sizes = {"stride": self.stride, "dilation": self.dilation, "padding": self.padding, "groups": self.groups}
        return {**sizes, "isa": isa, "threads": threads}

    def taps(self) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
        """(ky, kx, the padded positions that the tap sees, in the order of the results)."""
        for ky in range(self.kernel[0]):
            for kx in range(self.kernel[1]):
                first = ky * self.dilation[0], kx * self.dilation[1]
                rows, columns = (
                    slice(f, f + (n - 1) * s + 1, s) for f, n, s in zip(first, self.out_size, self.stride, strict=True)
                )
                yield ky, kx, (rows, columns)

    def channels(self, group: int) -> tuple[slice, slice]:
        """Input and output channels of a group."""
        ins, outs = self.ins // self.groups, self.outs // self.groups
        return slice(group * ins, (group + 1) * ins), slice(group * outs, (group + 1) * outs)

    def pad(self, x: Codes) -> Codes:
        """int64 (batch, *padded, channels), zeros around x."""
        top, left, bottom, right = self.padding
        return np.pad(x.astype(np.int64), ((0, 0), (top, bottom), (left, right), (0, 0)))

    def forward(self, x: Codes, w: Codes) -> Codes:
        """int64 of y_shape."""
        padded, y = self.pad(x), np.zeros(self.y_shape, np.int64)
        for group in range(self.groups):
            ins, outs = self.channels(group)
            for ky, kx, (rows, columns) in self.taps():
                y[..., outs] += padded[:, rows, columns, ins] @ w[outs, :, ky, kx].astype(np.int64).T
        return y

    def input_grad(self, g: Codes, w: Codes) -> Codes:
        """int64 of x_shape."""
        grad = np.zeros((self.batch, *self.padded, self.ins), np.int64)
        for group in range(self.groups):
            ins, outs = self.channels(group)
            for ky, kx, (rows, columns) in self.taps():
                grad[:, rows, columns, ins] += g[..., outs].astype(np.int64) @ w[outs, :, ky, kx].astype(np.int64)
        top, left = self.padding[:2]
        return grad[:, top : top + self.size[0], left : left + self.size[1]]

    def weight_grad(self, g: Codes, x: Codes) -> Codes:
        """int64 of w_shape."""
        padded, grad = self.pad(x), np.zeros(self.w_shape, np.int64)
        for group in range(self.groups):
            ins, outs = self.channels(group)
            gradient = g[..., outs].astype(np.int64).reshape(-1, outs.stop - outs.start)
            for ky, kx, (rows, columns) in self.taps():
                seen = padded[:, rows, columns, ins].reshape(len(gradient), -1)
                grad[outs, :, ky, kx] += gradient.T @ seen
        return grad


def guarded(values: Codes) -> Codes:
    """A copy that ends where a page ends that must not be touched: reading or writing beyond it ends the process."""
    page = mmap.PAGESIZE
    pages = -(-values.nbytes // page) * page
    memory = mmap.mmap(-1, pages + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(address + pages, page, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    array = np.frombuffer(memory, values.dtype, values.size, pages - values.nbytes).reshape(values.shape)
    array[...] = values
    return array
