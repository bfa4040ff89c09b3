"""Images as callers have them, (N, C, H, W), to the layout that programs run on, (N, H, W, C)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

try:
    from ._engine import channels_last as _compiled
except ImportError:  # the package works without its extension, slowly
    _compiled = None


def channels_last(x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 (N, C, H, W), strided as it may be -> contiguous uint8 (N, H, W, C)."""
    if _compiled is None:
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    result: NDArray[np.uint8] = _compiled(np.ascontiguousarray(x))
    return result
