"""The weight quantizer of vertical layering (Wu, He, Tan, Qi, Huang; TPAMI 2023)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..functional.vertical import vertical_codes, vertical_fake_quantize, vertical_offset, vertical_scale
from .base import Grid, WeightQuantizer
from .initial import WEIGHT_RULES, Rule, check_rule, weight_step
from .registry import register


@register("vertical", "weight", "vertical layering: LSQ codes, narrower widths are their upper bits plus compensation")
class VerticalWeight(WeightQuantizer):
    """value_b = s 2^(n-b) (c_b + z_b), c_n = clip(round(w/s), -2^(n-1), 2^(n-1)-1), c_b = floor(c_n / 2^(n-b)).

    z_b = (1 - 2^-(n-b)) / 2 stands for the mean of the dropped bits: 0 at n, then 1/4, 3/8, 7/16, ...
    Gradients (G = dL/dvalue, u = w/s, g = 1/sqrt(N (2^(n-1)-1)) at every width, N = weights a step):
        -2^(n-1) <= u <= 2^(n-1)-1:  dw = G,  ds = g G (2^(n-b) (c_b + z_b) - u)
        below, above:                dw = 0,  ds = g G 2^(n-b) (c_b + z_b), c_b = -2^(b-1), 2^(b-1)-1
    The paper prints the step's gradient (eq. 8) without z_b, with the sign of the upper bound wrong, and with the range
    decided on the clipped codes; what stands here is the derivative of the value.
    Levels: 2^b, 2 to 8 bits; no zero below the widest. Init: s = 2 mean|w| / sqrt(2^n - 1).
    Source: vertical layering, eqs. 1-8, section 4.4.

    Args:
        bits: precision -> width; the source width n is the largest, the smallest is at least 2.
        channels: one source step an output channel, or None for one a tensor (the paper's).
        compensation: False sets every z_b to 0 (the paper's Table 7).
        ste_include_z: False leaves z_b out of the step's gradient, as eq. 8 is printed.
        init: rule for the initial source step, see `initial`; it is for the source width.
    """

    width_decides = True
    nested = True

    def __init__(
        self,
        bits: Mapping[int, int],
        *,
        channels: int | None = None,
        signed: bool = True,
        compensation: bool = True,
        ste_include_z: bool = True,
        init: Rule = "vertical",
    ) -> None:
        super().__init__(bits, channels=channels, signed=signed)
        self.init = check_rule("VerticalWeight", init, WEIGHT_RULES)
        self.source_bits = max(self.bits.values())
        for precision, width in self.bits.items():
            if width < 2:
                raise ValueError(
                    f"VerticalWeight: needs at least 2 bits, got {width} at precision {precision} (one bit of a code "
                    "with a zero is {-1, 0}); use the 'nested' grid"
                )
        self.compensation = compensation
        self.ste_include_z = ste_include_z
        self.step = nn.Parameter(torch.ones(self._step_shape()))

    def grid(self, x: Tensor | None = None) -> Grid:
        offset = vertical_offset(self.source_bits, self.width) if self.compensation else 0.0
        scale = vertical_scale(self.step.detach(), self.source_bits, self.width)
        return Grid(scale, offset, -(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1)

    def codes(self, x: Tensor) -> Tensor:
        return vertical_codes(x, self._broadcast(self.step.detach(), x), self.source_bits, self.width).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // self.step.numel()
        return vertical_fake_quantize(
            x,
            self._broadcast(self.step, x),
            self.source_bits,
            self.width,
            compensation=self.compensation,
            ste_include_z=self.ste_include_z,
            grad_scale=(count * (2 ** (self.source_bits - 1) - 1)) ** -0.5,
        )

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        rows = x.detach().reshape(self.step.numel(), -1)
        half = 2 ** (self.source_bits - 1)
        self.step.copy_(weight_step(self.init, rows, -half, half - 1))
