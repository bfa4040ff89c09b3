"""LSQ: learned step size quantization (Esser et al., ICLR 2020)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..functional.uniform import EPS, uniform_codes, uniform_fake_quantize
from .base import ActivationQuantizer, Grid, WeightQuantizer
from .initial import WEIGHT_RULES, Rule, check_rule, weight_step
from .registry import register


@register("lsq", "weight", "LSQ: learned step, signed codes with a zero (one precision, 2 to 8 bits)")
class LSQWeight(WeightQuantizer):
    """value = s * round(clamp(w/s, -2^(b-1), 2^(b-1)-1)).

    Gradients (G = dL/dvalue, g = 1/sqrt(N Q_P), N = weights a step):
        in range (bounds included):  dw = G,  ds = g G (code - w/s)
        below, above:                dw = 0,  ds = g G (-Q_N), g G Q_P
    Levels: 2^b, with zero, one more below than above. Init: s = 2 mean|w| / sqrt(Q_P). Source: LSQ eqs. 1-3, section 2.

    Args:
        init: rule for the initial step, see `initial`.
    """

    width_decides = True

    def __init__(
        self, bits: Mapping[int, int], *, channels: int | None = None, signed: bool = True, init: Rule = "lsq"
    ) -> None:
        super().__init__(bits, channels=channels, signed=signed)
        self.init = check_rule(type(self).__name__, init, WEIGHT_RULES)
        widths = set(self.bits.values())
        if len(widths) != 1:
            raise ValueError(
                f"{type(self).__name__}: one width for all precisions, got {sorted(widths)}: an LSQ step fits one "
                "width; use the 'nested' grid to serve several"
            )
        if min(widths) < 2:
            raise ValueError(
                f"{type(self).__name__}: undefined at 1 bit (the largest code is 0); use the 'nested' grid"
            )
        self.step = nn.Parameter(torch.ones(self._step_shape()))

    def _limits(self) -> tuple[int, int]:
        return -(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1

    def grid(self, x: Tensor | None = None) -> Grid:
        return Grid(self.step.detach().clamp_min(EPS), self.offset, *self._limits())

    def codes(self, x: Tensor) -> Tensor:
        return uniform_codes(x, self._broadcast(self.step.detach(), x), *self._limits()).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        lo, hi = self._limits()
        grad_scale = (x.numel() // self.step.numel() * hi) ** -0.5
        return uniform_fake_quantize(x, self._broadcast(self.step, x), lo, hi, grad_scale=grad_scale)

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        self.step.copy_(weight_step(self.init, x.detach().reshape(self.step.numel(), -1), *self._limits()))


@register("lsq", "activation", "LSQ: learned step, unsigned after ReLU and signed elsewhere")
class LSQActivation(ActivationQuantizer):
    """value = s * round(clamp(x/s, lo, hi)), {0..2^b-1} or, for inputs that may be negative, {-2^(b-1)..2^(b-1)-1}.

    Gradients as for LSQ weights with N = features a sample (the paper's text) or elements a batch (public code).
    Init: s = 2 mean|x| / sqrt(Q_P) over the first training batch, or its maximum over calibration batches. Signed
    one-bit codes would be {-1, 0}: signed inputs use at least two bits.
    Source: LSQ eqs. 1-3, section 2.

    Args:
        numel: "sample" or "batch", what N counts in the gradient scale 1/sqrt(N Q_P).
        init: rule for the initial step, see `initial`.
    """

    def codes(self, x: Tensor) -> Tensor:
        self.require_initialized()
        return uniform_codes(x, self.step.detach(), *self.limits()).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        self.prepare(x)
        lo, hi = self.limits()
        count = self.count(x)
        return uniform_fake_quantize(x, self.step, lo, hi, grad_scale=(count * hi) ** -0.5)
