"""Reductions that gradient rules share."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum `x` over every dimension that `shape` (same rank, or one element) does not keep; float32 at least.

    Step-size gradients add millions of terms, so half-precision terms are accumulated in float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if shape.numel() == 1:
        return x.sum(dtype=dtype).reshape(shape)
    dims = [d for d in range(x.dim()) if shape[d] == 1]
    return x.sum(dim=dims, keepdim=True, dtype=dtype) if dims else x.to(dtype)  # sum(dim=[]) would sum everything
