"""Memory of what layers compute for one step: results and gradients of inputs, which the next step needs as large."""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from torch import Tensor

from .pool import Pool

SMALLEST = 1 << 16  # bytes: less than that the C library has at hand

_pool = Pool()
_lock = threading.Lock()


def floats(*shape: int) -> Tensor:
    """Not initialized: float32 in the C library's memory."""
    return torch.empty(shape, dtype=torch.float32)


def step_floats(*shape: int) -> Tensor:
    """The same for what lives for a part of a step, out of memory that is kept for the next one.

    The C library would cut the holes that large results leave into small pieces, of which some stay, so that the next
    result fits into none: a ViT's step took up to twice the memory that it ever used at once.
    """
    if 4 * math.prod(shape) < SMALLEST:
        return floats(*shape)
    with _lock:
        return torch.from_numpy(_pool.take(shape, np.float32))
