"""UniQ's activation quantizer (Pham, Abraham, Chung; IEEE Access 2021)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..functional.steps import optimal_step, rectified_step
from ..functional.uniform import EPS, uniform_codes, uniform_fake_quantize
from .base import ActivationQuantizer, Grid
from .registry import register


@register("uniq", "activation", "UniQ: learned step from the MSE-optimal constant; signed inputs get signed codes")
class UniqActivation(ActivationQuantizer):
    """value = D * round(clamp(x/D, 0, 2^b - 1)); a step a precision.

    Gradients (G = dL/dvalue, g = 1/sqrt(N (2^b - 1)), N = elements of the batch tensor):
        0 < x/D < 2^b - 1:  dx = G,  dD = g G (code - x/D)
        above:              dx = 0,  dD = g G (2^b - 1);   at or below 0: both 0
    Init: D = c_a(b) sqrt(2 mean x^2), the MSE-optimal step of a rectified Gaussian, maximum over calibration batches.
    Inputs that may be negative use the signed range (at least 2 bits) with the Gaussian's optimal step, where UniQ's
    own code would cut the negative half. Source: UniQ eq. 5, section 4.2, eq. 10.

    Args:
        numel: "batch" (UniQ's code) or "sample" (LSQ's text), what N counts.
    """

    def __init__(
        self, bits: Mapping[int, int], *, signed: bool = False, shared: bool = False, numel: str = "batch"
    ) -> None:
        super().__init__(
            {p: max(b, 2) if signed else b for p, b in bits.items()}, signed=signed, shared=shared, numel=numel
        )

    def statistic_of(self, x: Tensor) -> Tensor:
        power = x.square().mean()
        return (power if self.signed else 2 * power).sqrt()

    def step_from(self, statistic: Tensor) -> Tensor:
        if self.signed:
            lo, hi = self.limits()
            return optimal_step(tuple(float(c) for c in range(lo, hi + 1))) * statistic
        return rectified_step(self.width) * statistic

    def grid(self) -> Grid:
        grid = super().grid()
        return Grid(grid.scale.clamp_min(EPS), grid.offset, grid.lo, grid.hi)

    def codes(self, x: Tensor) -> Tensor:
        self.require_initialized()
        return uniform_codes(x, self.step.detach(), *self.limits()).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        self.prepare(x)
        lo, hi = self.limits()
        count = self.count(x)
        return uniform_fake_quantize(x, self.step, lo, hi, grad_scale=(count * (hi - lo)) ** -0.5, open_range=True)
