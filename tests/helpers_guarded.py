"""Memory that ends at a page which nobody may touch: a byte read or written too far ends the process."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

POSSIBLE = os.name == "posix"
_libc = ctypes.CDLL(None, use_errno=True) if POSSIBLE else None


def guarded_copy(array: np.ndarray) -> np.ndarray:
    """A C-contiguous copy whose last byte is the last one before such a page; a plain copy where there are none."""
    if _libc is None:
        return array.copy()
    page = mmap.PAGESIZE
    body = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, body + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(address + body), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = np.frombuffer(memory, array.dtype, array.size, body - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


@contextmanager
def guarded_engine() -> Iterator[None]:
    """Within it, the engine's arenas, packed weights and results end at such pages."""
    from bitstrata_runtime import _engine

    assert _engine.guard_memory(True) or not POSSIBLE
    try:
        yield
    finally:
        _engine.guard_memory(False)
