"""UniQ's weight and activation quantizers (Pham, Abraham, Chung; IEEE Access 2021)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..functional.symmetric import symmetric_codes, symmetric_fake_quantize
from ..functional.uniform import EPS, uniform_codes, uniform_fake_quantize
from .base import ActivationQuantizer, Grid, WeightQuantizer
from .initial import WEIGHT_RULES, Rule, check_rule, weight_step
from .registry import register


@register("uniq", "weight", "UniQ: learned step, symmetric codes without a zero (one precision, 1 to 8 bits)")
class UniqWeight(WeightQuantizer):
    """value = D (code + 1/2), code = round(clip(w/D + (N-1)/2, 0, N-1)) - 2^(b-1), N = 2^b, ties to even.

    Gradients (G = dL/dvalue, g = 1/sqrt(n_w max(2^(b-1)-1, 1)), n_w = weights a step):
        |w/D| < (N-1)/2:  dw = G,  dD = g G (code + 1/2 - w/D)
        else:             dw = 0,  dD = g G sign(w) (N-1)/2
    Eq. 6 prints sign(w) D (N-1)/2 for the last line, which is not the derivative of eq. 3.
    Levels: N, symmetric, without zero; at one bit {-D/2, D/2}, with w = 0 on -D/2.
    Init: D = c_w(b) std(w), the MSE-optimal step of a Gaussian (section 4.2). Source: UniQ eqs. 3, 4, 6.

    Args:
        channels: one step an output channel ("kernel-wise"), or None for one a tensor ("layer-wise").
        init: rule for the initial step, see `initial`; UniQ Table 5 compares "mse", "lsq" (not at 1 bit), 0.1 and 0.2.
    """

    width_decides = True
    offset = 0.5

    def __init__(
        self, bits: Mapping[int, int], *, channels: int | None = None, signed: bool = True, init: Rule = "mse"
    ) -> None:
        super().__init__(bits, channels=channels, signed=signed)
        self.init = check_rule("UniqWeight", init, WEIGHT_RULES)
        widths = sorted(set(self.bits.values()))
        if len(widths) != 1:
            raise ValueError(
                f"UniqWeight: one width for all precisions, got {widths}: a UniQ step fits one width; "
                "use the 'nested' grid to serve several"
            )
        self.step = nn.Parameter(torch.ones(self._step_shape()))

    def _limits(self) -> tuple[int, int]:
        return -(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1

    def grid(self, x: Tensor | None = None) -> Grid:
        return Grid(self.step.detach().clamp_min(EPS), self.offset, *self._limits())

    def codes(self, x: Tensor) -> Tensor:
        return symmetric_codes(x, self._broadcast(self.step.detach(), x), self.width).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // self.step.numel()
        grad_scale = (count * max(2 ** (self.width - 1) - 1, 1)) ** -0.5
        return symmetric_fake_quantize(x, self._broadcast(self.step, x), self.width, grad_scale=grad_scale)

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        rows = x.detach().reshape(self.step.numel(), -1)
        self.step.copy_(weight_step(self.init, rows, *self._limits(), self.offset))


@register("uniq", "activation", "UniQ: learned step from the MSE-optimal constant; signed inputs get signed codes")
class UniqActivation(ActivationQuantizer):
    """value = D * round(clamp(x/D, 0, 2^b - 1)); a step a precision.

    Gradients (G = dL/dvalue, g = 1/sqrt(N (2^b - 1)), N = elements of the batch tensor):
        0 < x/D < 2^b - 1:  dx = G,  dD = g G (code - x/D)
        above:              dx = 0,  dD = g G (2^b - 1);   at or below 0: both 0
    Init: D = c_a(b) sqrt(2 mean x^2), the MSE-optimal step of a rectified Gaussian, maximum over calibration batches.
    Inputs that may be negative use the signed range (at least 2 bits) with the Gaussian's optimal step; UniQ itself
    cuts their negative half. Source: UniQ eq. 5, section 4.2, eq. 10.

    Args:
        numel: "batch" (UniQ's code) or "sample" (LSQ's text), what N counts.
        init: rule for the initial step, see `initial`.
        signed_input: what inputs that may be negative get: "signed", the signed range; "cut", the unsigned grid, with
            the unsigned initial step of the whole input, as in UniQ (the linear bottlenecks of MobileNetV2).
    """

    def __init__(
        self,
        bits: Mapping[int, int],
        *,
        signed: bool = False,
        shared: bool = False,
        numel: str = "batch",
        init: Rule = "mse",
        signed_input: str = "signed",
    ) -> None:
        if signed_input not in ("signed", "cut"):
            raise ValueError(f"UniqActivation: signed_input must be 'signed' or 'cut', got {signed_input!r}")
        super().__init__(bits, signed=signed and signed_input == "signed", shared=shared, numel=numel, init=init)
        self.signed_input = signed_input

    def codes(self, x: Tensor) -> Tensor:
        self.require_initialized()
        return uniform_codes(x, self.step.detach(), *self.limits()).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        self.prepare(x)
        lo, hi = self.limits()
        count = self.count(x)
        return uniform_fake_quantize(x, self.step, lo, hi, grad_scale=(count * (hi - lo)) ** -0.5, open_range=True)

    def init_(self, x: Tensor) -> None:
        with warnings.catch_warnings():
            if self.signed_input == "cut":  # cutting was asked for
                warnings.filterwarnings("ignore", message=r"\w+: inputs below zero", category=UserWarning)
            super().init_(x)
