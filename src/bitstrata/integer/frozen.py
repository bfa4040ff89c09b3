"""ShiftQuant with a range and exponents that were fixed from data, for evaluation and programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import group_exponents
from .rounding import round_codes
from .shiftquant import ShiftQuantized, along, check_axis, check_bits, divide, largest_code, scale_of, working


@dataclass(frozen=True)
class FrozenRange:
    """What calibration fixes of a layer's input.

    Attributes:
        range: float32 (), tau_0; 0 where only zeros were seen.
        exponents: uint8 (channels,), the group of each channel.
        signed: False for codes 0..2^b - 1.
    """

    range: Tensor
    exponents: Tensor
    signed: bool = True

    @staticmethod
    def of(ranges: Tensor, groups: int, signed: bool = True) -> FrozenRange:
        """From the largest magnitude of each channel, (channels,) floating; errors as group_exponents."""
        return FrozenRange(ranges.amax().to(torch.float32), group_exponents(ranges, groups), signed)

    def scale(self, bits: int) -> Tensor:
        """tau_0 / B in float32, 0 where that would be subnormal."""
        return scale_of(self.range, largest_code(bits, self.signed), "FrozenRange")


def frozen_quantize(x: Tensor, frozen: FrozenRange, bits: int, groups: int, axis: int) -> ShiftQuantized:
    """`shift_quantize` to nearest with a fixed range and exponents; what lies outside gets the outermost code.

    Args:
        x: floating, finite, not empty. frozen: of its channels. bits: 2..8. groups: N_G that the exponents are of.
        axis: the dimension of the channels.

    Raises:
        ValueError: bits or axis out of range; x not floating, empty or not finite; another number of channels.
    """
    where = "frozen_quantize"
    check_bits(bits, where)
    axis = check_axis(axis, x.dim(), where)
    values = working(x, where)
    if x.shape[axis] != frozen.exponents.numel():
        raise ValueError(
            f"{where}: x of shape {tuple(x.shape)} has {x.shape[axis]} channels along axis {axis}, the frozen "
            f"exponents are of {frozen.exponents.numel()}"
        )
    if not bool(values.isfinite().all()):
        raise ValueError(f"{where}: x contains NaN or infinity")
    scale, largest = frozen.scale(bits), largest_code(bits, frozen.signed)
    z = divide(values, scale) * along(torch.exp2(frozen.exponents.to(values.dtype)), axis, x.dim())
    codes = round_codes(z, -largest if frozen.signed else 0, largest, rounding="nearest", generator=None, where=where)
    return ShiftQuantized(codes, frozen.exponents, scale, bits, axis, groups, frozen.signed)
