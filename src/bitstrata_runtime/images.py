"""Images as callers have them, (N, C, H, W), to the layout that programs run on, (N, H, W, C)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def channels_last(x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 (N, C, H, W), strided as it may be -> contiguous uint8 (N, H, W, C).

    By the compiled extension where something has loaded it, several times faster.
    """
    compiled = sys.modules.get("bitstrata_runtime._engine")
    if compiled is None:
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    result: NDArray[np.uint8] = compiled.channels_last(np.ascontiguousarray(x))
    return result
