"""DoReFa's quantizers (Zhou et al., 2016), which SAT builds on (Jin et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..functional.clipping import clipping_fake_quantize
from ..functional.companded import companded_fake_quantize
from ..functional.dorefa import SCHEMES, dorefa_codes, tanh_normalize, unit_codes, widened
from ..functional.ste import with_value
from ..functional.uniform import EPS
from .base import Grid, Quantizer, WeightQuantizer
from .registry import register


@register("dorefa", "weight", "DoReFa: tanh(w)/max|tanh(w)| on a fixed grid over [-1, 1] (SAT's weight quantizer)")
class DoReFaWeight(WeightQuantizer):
    """value = (2K - a)/a, K = round(a (x + 1)/2), a = 2^b - 1, x = tanh(w)/max|tanh(w)|; code = K - 2^(b-1).

    Gradients: of x itself, through tanh and through the maximum, for every element (nothing is cut off).
    Levels: 2^b, without a zero for "original" and "centered". The maximum is the tensor's, or with one scale a channel
    the channel's. No parameters, nothing to initialise: the values fill [-1, 1] whatever the weight's size; an all-zero
    weight takes the code of x = 0. Source: DoReFa eqs. 7-9; SAT eqs. 5, 6, 8, 9.

    Args:
        scheme: "original" as above; "modified": value = 2^(1-b) floor(2^(b-1) x), at most 1 - 2^(1-b); "centered":
            half a step more. With the last two, narrower codes are the upper bits of wider ones; with "original" each
            width rounds by itself.
        one_bit: "sat" uses the formula above at one bit; "mean" uses value = mean|w| sign(w), sign(0) = 1, with the
            gradient passed straight through and none through the mean (DoReFa eq. 7).
        detach_max: no gradient through the maximum.
    """

    def __init__(
        self,
        bits: Mapping[int, int],
        *,
        channels: int | None = None,
        signed: bool = True,
        scheme: str = "original",
        one_bit: str = "sat",
        detach_max: bool = False,
    ) -> None:
        super().__init__(bits, channels=channels, signed=signed)
        if scheme not in SCHEMES:
            raise ValueError(f"DoReFaWeight: scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
        if one_bit not in ("sat", "mean"):
            raise ValueError(f"DoReFaWeight: one_bit must be 'sat' or 'mean', got {one_bit!r}")
        self.scheme = scheme
        self.one_bit = one_bit
        self.detach_max = detach_max
        self.nested = scheme != "original"
        self.offset = 0.0 if scheme == "modified" else 0.5
        self.register_buffer("unit", torch.ones(self._step_shape()), persistent=False)  # follows dtype and device

    unit: Tensor

    def _by_mean(self) -> bool:
        return self.one_bit == "mean" and self.width == 1

    def _normalized(self, x: Tensor) -> Tensor:
        return tanh_normalize(widened(x), per_channel=self.channels is not None, detach_max=self.detach_max)

    def _codes(self, x: Tensor) -> Tensor:
        if self._by_mean():  # of the quotient, so that a nested code of one bit is the upper bit to the last element
            return dorefa_codes(self._normalized(x), 1, "modified")
        return dorefa_codes(self._normalized(x), self.width, self.scheme)

    @torch.no_grad()
    def grid(self, x: Tensor | None = None) -> Grid:
        """The grid for the weight x; only the one-bit grid of one_bit="mean" needs x (ValueError without)."""
        half = 2 ** (self.width - 1)
        unit = self.unit if x is None else self.unit.to(widened(x))
        if not self._by_mean():
            step = 2 / (2 * half - 1) if self.scheme == "original" else 1 / half
            return Grid(unit * step, self.offset, -half, half - 1)
        if x is None:
            raise ValueError(
                "DoReFaWeight: grid needs the tensor x: with one_bit='mean' the one-bit grid follows its mean magnitude"
            )
        mean = widened(x).abs().reshape(unit.numel(), -1).mean(dim=1)
        return Grid(2 * mean.clamp_min(EPS), 0.5, -half, half - 1)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        return self._codes(x).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if not self._by_mean():
            return companded_fake_quantize(
                x, self.width, self.scheme, per_channel=self.channels is not None, detach_max=self.detach_max
            )
        with torch.no_grad():
            value = self.grid(x).dequantize(self._codes(x)).to(x.dtype)  # codes stay floats: NaN stays NaN
        return with_value(x, value)

    def init_(self, x: Tensor) -> None:
        """Nothing to set: the grid is fixed, or follows the weight."""


@register("dorefa", "activation", "DoReFa: fixed grid on [0, 1], nothing learned and nothing to calibrate")
class DoReFaActivation(Quantizer):
    """value = round(a clip(x, 0, 1))/a, a = 2^b - 1.

    Gradients (G = dL/dvalue): dx = G for 0 <= x <= 1, else 0. No parameters; negative inputs are cut.
    Source: DoReFa eqs. 5, 11.
    """

    unit: Tensor

    stands_for_relu = True

    def __init__(self, bits: Mapping[int, int], *, signed: bool = False, shared: bool = False) -> None:
        super().__init__(bits, signed=False)
        self.register_buffer("unit", torch.ones(1), persistent=False)  # follows dtype and device

    @torch.no_grad()
    def grid(self, x: Tensor | None = None) -> Grid:
        top = 2**self.width - 1
        unit = self.unit if x is None else self.unit.to(widened(x))
        return Grid(unit / top, self.offset, 0, top)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        return unit_codes(widened(x), self.width).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        unit = self.unit.to(widened(x).dtype)
        return clipping_fake_quantize(x, unit, 2**self.width - 1, closed=True)

    def init_(self, x: Tensor) -> None:
        """Nothing to set: the grid is fixed."""
