"""Products of floats in the backward pass of a fused quantization-aware step, by the engine where it is faster."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitstrata_runtime import _engine

from ..integer.convolution import Geometry
from ..integer.engine_codes import FASTEST
from .qat_codes import IntegerWeight, Rule

MOST_TAPS = 128  # of a kernel, as the engine takes it
LEAST_INPUTS = 8  # channels; with fewer, most of what the engine multiplies for a weight gradient is padding


def multiplies_fast() -> bool:
    """Whether the engine's products of bfloat16 are the fastest here.

    Not without vector instructions for them: what is left is the engine's portable loops. Not on processors with AMX
    either: torch multiplies on its tiles, several times as fast as vectors do.
    """
    return _engine.float_products(FASTEST) != "generic" and _engine.chosen_isa(FASTEST) != "amx"


def takes_input_gradient(real: torch.dtype, groups: int, kernel: tuple[int, ...]) -> bool:
    """Whether `input_gradient` is for this convolution, and faster than torch.

    Gradients in float32 are left to torch, which does not round them; so are convolutions in groups, for which there is
    no kernel.
    """
    return real == torch.bfloat16 and groups == 1 and math.prod(kernel) <= MOST_TAPS and multiplies_fast()


def input_gradient(
    gradient: NDArray[np.uint16], weight: IntegerWeight, geometry: Geometry, out: NDArray[np.uint16]
) -> None:
    """The gradient of a convolution's input, in units of the integer weights.

    Args:
        gradient: of the convolution's result, bfloat16 (N, height, width, out channels).
        weight: its integers are read.
        geometry: of one group.
        out: bfloat16 (N, height, width, in channels), written; sums are float32, rounded once.
    """
    planar: dict[str, Any] = geometry.planar(2)
    _engine.qat_input_gradient(
        gradient,
        weight.high,
        weight.low,
        planar["stride"],
        planar["dilation"],
        planar["padding"],
        out,
        FASTEST,
        torch.get_num_threads(),
    )


def takes_weight_gradient(real: torch.dtype, groups: int, inputs: int) -> bool:
    """Whether `weight_gradient` is for a convolution with so many input channels, and faster than torch.

    What `takes_input_gradient` leaves to torch is left to it here too; so are few input channels.
    """
    return real == torch.bfloat16 and groups == 1 and inputs >= LEAST_INPUTS and multiplies_fast()


def weight_gradient(
    gradient: NDArray[np.uint16], codes: NDArray[Any], rule: Rule, weight: IntegerWeight, geometry: Geometry
) -> Tensor:
    """The gradient of a convolution's weight, float32 (out channels, in channels, height, width), in its memory order.

    Args:
        gradient: of the convolution's result in units of the integer weights, bfloat16 (N, height, width, out
            channels).
        codes: int8 or uint8 (N, height, width, in channels), made by `rule`.
        weight: its shape and units are read.
        geometry: of one group.
    """
    planar: dict[str, Any] = geometry.planar(2)
    outputs, inputs, height, width = weight.high.shape
    last = weight.channels_last
    out = np.empty((outputs, height, width, inputs) if last else weight.high.shape, np.float32)
    factor = (rule.step / weight.unit).astype(np.float32)
    layout = planar["stride"], planar["dilation"], planar["padding"]
    threads = torch.get_num_threads()
    _engine.qat_weight_gradient(codes, (rule.lo, rule.hi), gradient, factor, *layout, last, out, FASTEST, threads)
    return torch.from_numpy(out).permute(0, 3, 1, 2) if last else torch.from_numpy(out)
