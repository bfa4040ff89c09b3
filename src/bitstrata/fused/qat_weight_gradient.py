"""The weight gradient of a fused quantization-aware step, by the engine where it is faster than torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitstrata_runtime import _engine

from ..integer.convolution import Geometry
from ..integer.engine_codes import FASTEST
from .qat_products import multiplies_fast

LEAST_INPUTS = 8  # channels; with fewer, most of what the engine multiplies at a time is padding


def takes_weight_gradient(real: torch.dtype, groups: int, inputs: int) -> bool:
    """Whether `weight_gradient` is for a convolution with so many input channels, and faster than torch.

    Gradients in float32 are left to torch, which does not round them; so are convolutions in groups, for which there is
    no kernel, and those of few input channels.
    """
    return real == torch.bfloat16 and groups == 1 and inputs >= LEAST_INPUTS and multiplies_fast()


def weight_gradient(
    gradient: NDArray[np.uint16],
    codes: NDArray[Any],
    factor: NDArray[np.float32],
    geometry: Geometry,
    kernel: tuple[int, int],
) -> Tensor:
    """The gradient of a convolution's weight, float32 (out channels, in channels, *kernel).

    Args:
        gradient: of the convolution's result, bfloat16 (N, height, width, out channels).
        codes: int8 or uint8 (N, height, width, in channels).
        factor: (out channels,), what 1 of the gradient with respect to a weight in units of the codes stands for.
        geometry: of one group.
        kernel: height and width.
    """
    planar: dict[str, Any] = geometry.planar(2)
    out = np.empty((gradient.shape[3], codes.shape[3], *kernel), np.float32)
    layout = planar["stride"], planar["dilation"], planar["padding"]
    _engine.qat_weight_gradient(codes, span, gradient, factor, *layout, out, FASTEST, torch.get_num_threads())
    return torch.from_numpy(out)
