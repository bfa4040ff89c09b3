"""LSQ: learned step size quantization (Esser et al., ICLR 2020)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..functional.uniform import EPS, uniform_codes, uniform_fake_quantize
from .base import ActivationQuantizer, Grid, WeightQuantizer
from .registry import register


@register("lsq", "weight", "LSQ: learned step, signed codes with a zero (one precision, 2 to 8 bits)")
class LSQWeight(WeightQuantizer):
    """value = s * round(clamp(w/s, -2^(b-1), 2^(b-1)-1)).

    Gradients (G = dL/dvalue, g = 1/sqrt(N Q_P), N = weights a step):
        in range (bounds included):  dw = G,  ds = g G (code - w/s)
        below, above:                dw = 0,  ds = g G (-Q_N), g G Q_P
    Levels: 2^b, with zero, one more below than above. Init: s = 2 mean|w| / sqrt(Q_P). Source: LSQ eqs. 1-3, section 2.
    """

    def __init__(self, bits: Mapping[int, int], *, channels: int | None = None, signed: bool = True) -> None:
        super().__init__(bits, channels=channels, signed=signed)
        widths = set(self.bits.values())
        if len(widths) != 1:
            raise ValueError(
                f"LSQWeight: one width for all precisions, got {sorted(widths)}: an LSQ step fits one width; "
                "use the 'nested' grid to serve several"
            )
        if min(widths) < 2:
            raise ValueError("LSQWeight: undefined at 1 bit (the largest code is 0); use the 'nested' grid")
        self.step = nn.Parameter(torch.ones(self._step_shape()))

    def _limits(self) -> tuple[int, int]:
        return -(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1

    def grid(self) -> Grid:
        return Grid(self.step.detach().clamp_min(EPS), self.offset, *self._limits())

    def codes(self, x: Tensor) -> Tensor:
        return uniform_codes(x, self._broadcast(self.step.detach(), x), *self._limits()).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        lo, hi = self._limits()
        grad_scale = (x.numel() // self.step.numel() * hi) ** -0.5
        return uniform_fake_quantize(x, self._broadcast(self.step, x), lo, hi, grad_scale=grad_scale)

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        mean = x.detach().reshape(self.step.numel(), -1).abs().mean(dim=1)
        self.step.copy_((2 * mean / self._limits()[1] ** 0.5).clamp_min(1e-6))


@register("lsq", "activation", "LSQ: learned step, unsigned after ReLU and signed elsewhere")
class LSQActivation(ActivationQuantizer):
    """value = s * round(clamp(x/s, lo, hi)), {0..2^b-1} or, for inputs that may be negative, {-2^(b-1)..2^(b-1)-1}.

    Gradients as for LSQ weights with N = features a sample (the paper's text) or elements a batch (public code).
    Init: s = 2 mean|x| / sqrt(Q_P) over the first training batch, or its maximum over calibration batches. Signed
    one-bit codes would be {-1, 0}: signed inputs use at least two bits.
    Source: LSQ eqs. 1-3, section 2.

    Args:
        numel: "sample" or "batch", what N counts in the gradient scale 1/sqrt(N Q_P).
    """

    def __init__(
        self, bits: Mapping[int, int], *, signed: bool = False, shared: bool = False, numel: str = "sample"
    ) -> None:
        super().__init__(
            {p: max(b, 2) if signed else b for p, b in bits.items()}, signed=signed, shared=shared, numel=numel
        )

    def statistic_of(self, x: Tensor) -> Tensor:
        return x.abs().mean()

    def step_from(self, statistic: Tensor) -> Tensor:
        return 2 * statistic / self.limits()[1] ** 0.5

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
        return uniform_fake_quantize(x, self.step, lo, hi, grad_scale=(count * hi) ** -0.5)
