"""Integer grids of a maximum: symmetric codes -B..B, the INT8 baseline of fully quantized training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..functional.ste import with_value
from ..functional.uniform import EPS, uniform_codes, uniform_fake_quantize
from .base import ActivationQuantizer, Grid, WeightQuantizer
from .registry import register

RANGES = ("symmetric", "full")


def largest_code(bits: int) -> int:
    """B = 2^(b-1) - 1: the code that the maximum gets; -B - 1 is not used."""
    return int(2 ** (bits - 1) - 1)


@register("int8", "weight", "symmetric codes -127..127 scaled by the weight's own maximum (any width of 2 to 8 bits)")
class Int8Weight(WeightQuantizer):
    """value = d * code, d = max|w| / B, code = round(w/d) in -B..B, B = 2^(b-1) - 1, ties to even.

    Gradients: dw = G everywhere, straight through; nothing is out of range and the scale is no parameter.
    Levels: 2^b - 1, with zero, as many below as above. The scale follows the weight, so there is nothing to initialise.
    Source: ShiftQuant (Guo, Liu et al.) section 2, with one group; the INT8 per-tensor baseline of its section 5.

    Args:
        channels: a maximum each output channel, or None for one of the tensor.
    """

    width_decides = True

    def __init__(self, bits: Mapping[int, int], *, channels: int | None = None, signed: bool = True) -> None:
        super().__init__(bits, channels=channels, signed=signed)
        if min(self.bits.values()) < 2:
            raise ValueError("Int8Weight: undefined at 1 bit (the largest code is 0); use the 'nested' grid")

    def grid(self, x: Tensor | None = None) -> Grid:
        if x is None:
            raise ValueError("Int8Weight.grid: needs the weight, whose maximum sets the scale; got None")
        w = x.detach()
        rows = w.to(torch.promote_types(w.dtype, torch.float32)).reshape(self.channels or 1, -1)
        largest = largest_code(self.width)
        return Grid((rows.abs().amax(dim=1) / largest).clamp_min(EPS), self.offset, -largest, largest)

    def _codes(self, x: Tensor, grid: Grid) -> Tensor:
        return uniform_codes(x.detach().to(grid.scale.dtype), self._broadcast(grid.scale, x), grid.lo, grid.hi)

    def codes(self, x: Tensor) -> Tensor:
        return self._codes(x, self.grid(x)).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            grid = self.grid(x)
            value = grid.dequantize(self._codes(x, grid)).to(x.dtype)
        return with_value(x, value)

    def init_(self, x: Tensor) -> None:
        """Nothing to set: the scale is that of the weight at hand."""


@register("int8", "activation", "symmetric codes -127..127 on a range that calibration fixes (any width)")
class Int8Activation(ActivationQuantizer):
    """value = d * round(clamp(x/d, lo, hi)), d = max|x| / hi, ties to even.

    Gradients: dx = G in range, bounds included, 0 outside. The range is not trained: calibration sets it to the largest
    |x| over its batches, or the first training batch does, and then it stays.
    Levels: codes -B..B, B = 2^(b-1) - 1 (at least 2 bits), whatever sign the inputs have, as the paper's "common INT";
    with range "full", inputs that are never negative get 0..2^b - 1 instead.
    Source: ShiftQuant (Guo, Liu et al.) section 2, with one group; the INT8 per-tensor baseline of its section 5.

    Args:
        range: "symmetric" or "full".
    """

    def __init__(
        self, bits: Mapping[int, int], *, signed: bool = False, shared: bool = False, range: str = "symmetric"
    ) -> None:
        if range not in RANGES:
            raise ValueError(f"Int8Activation: range must be 'symmetric' or 'full', got {range!r}")
        super().__init__(bits, signed=signed or range == "symmetric", shared=shared, init="minmax")
        self.range = range
        self.steps.requires_grad_(False)

    def limits(self) -> tuple[int, int]:
        largest = largest_code(self.width)
        return (-largest, largest) if self.signed else (0, 2**self.width - 1)

    def statistic_of(self, x: Tensor) -> Tensor:
        """max|x|, NaN for an empty batch, which has none."""
        return x.abs().amax() if x.numel() else x.new_full((), float("nan"))

    def step_from(self, statistic: Tensor) -> Tensor:
        """d = max|x| / hi, rounded up where rounding down would leave the maximum itself out of range."""
        hi = self.limits()[1]
        step = statistic / hi
        return torch.where(statistic / step > hi, step.nextafter(statistic), step)

    def codes(self, x: Tensor) -> Tensor:
        self.require_initialized()
        return uniform_codes(x, self.step.detach(), *self.limits()).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        self.prepare(x)
        return uniform_fake_quantize(x, self.step, *self.limits())
