"""Grids that fill a range with a clipping level: PACT, its calibrated gradient CG-PACT, and DoReFa's activations.

Source: Choi et al., "PACT", eqs. 1-3; Jin et al., "Rethinking neural network quantization" (SAT), eqs. 11-13; Zhou et
al., "DoReFa-Net", eqs. 5 and 11.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dorefa import widened
from .fake_quantize import fake_quantize
from .formula import EPS, Formula, Gradients, Needs, Rule, register_formula
from .reduce import sum_to


def clipping_level(alpha: Tensor) -> Tensor:
    """The clipping level as a divisor: |alpha|, at least 1e-8; 0-d, so that it widens no tensor."""
    return alpha.detach().abs().clamp_min(EPS).reshape(())


def clipping_scale(alpha: Tensor, top: int, signed: bool) -> Tensor:
    """The distance of two values: |alpha| or, signed, 2 |alpha| in `top` steps; one element."""
    return clipping_level(alpha).reshape(1) * (2 if signed else 1) / top


def clipping_codes(x: Tensor, alpha: Tensor, top: int, signed: bool) -> Tensor:
    """round(a clip(x, 0, alpha)/alpha), or round(a (clip(x, -alpha, alpha)/alpha + 1)/2) - (a + 1)/2; a = `top`.

    Args:
        x: any shape, floating; the result has its dtype, at least float32.
        alpha: one element; |alpha| counts.
        top: 2^bits - 1. signed: the second grid, whose values are those of code + 1/2.
    """
    unit = widened(x).div(clipping_level(alpha))
    if not signed:
        return unit.clamp_(0, 1).mul_(top).round_()
    return unit.clamp_(-1, 1).add_(1).div_(2).mul_(top).round_().sub_((top + 1) // 2)


@register_formula
@dataclass(frozen=True)
class Clipping(Formula):
    """value = scale (code + offset). dx = G strictly inside the range, 0 elsewhere; the unrounded x decides.

    dalpha: G times the bound that x is cut to, in alphas; inside 0 or, `calibrated`, G (value - x)/alpha. `closed`:
    x = 0 and x = alpha are inside.
    """

    top: int
    signed: bool
    calibrated: bool
    closed: bool = False

    name = "clipping"

    def value(self, x: Tensor, step: Tensor, extra: Tensor | None) -> Tensor:
        codes = clipping_codes(x, step, self.top, self.signed)
        scale = clipping_scale(step, self.top, self.signed).reshape(())  # x may be 0-d
        return ((codes.to(scale.dtype) + self._offset()) * scale).to(x.dtype)

    def _offset(self) -> float:
        return 0.5 if self.signed else 0.0

    def gradients(
        self, grad: Tensor, x: Tensor, step: Tensor, extra: Tensor | None, *, needs: Needs, factor: float
    ) -> Gradients:
        level, wide = clipping_level(step), widened(x)
        low = -level if self.signed else torch.zeros_like(level)
        inside = (wide >= low) & (wide <= level) if self.closed else (wide > low) & (wide < level)
        grad_x = grad.masked_fill(~inside, 0.0) if needs[0] else None
        if not needs[1]:
            return grad_x, None, None
        u = wide.div(level).clamp_(-1 if self.signed else 0, 1)
        slope = torch.zeros_like(u)
        if self.calibrated:
            codes = clipping_codes(x, step, self.top, self.signed)
            slope = (codes + self._offset()) * ((2 if self.signed else 1) / self.top) - u
        slope = torch.where(inside, slope, u)  # u is a bound there
        sign = torch.where(step < 0, -1.0, 1.0)  # of |alpha|; 1 at 0, where the level must be able to grow again
        return grad_x, (sum_to(slope * grad, step.shape) * sign * factor).to(step.dtype), None

    def rule(self) -> Rule:
        half = (self.top + 1) // 2
        lo, hi = (-half, self.top - half) if self.signed else (0, self.top)
        grid = "centred" if self.signed else "unit"
        return Rule(grid, lo, hi, open_range=not self.closed, calibrated=self.calibrated)


def clipping_fake_quantize(
    x: Tensor, alpha: Tensor, top: int, *, signed: bool = False, calibrated: bool = False, closed: bool = False
) -> Tensor:
    """Fake-quantize onto `top` + 1 values that fill [0, |alpha|], or [-|alpha|, |alpha|]; gradients as in `Clipping`.

    Args:
        x: any shape, floating; the result has its shape and dtype.
        alpha: one element; gets a gradient, the sum over elements.
        top: 2^bits - 1. signed: the range has both signs, and no value is 0.
        calibrated: elements in range count in alpha's gradient (CG-PACT).
        closed: elements on a bound are in range, as a clamp's are; else outside (PACT).
    """
    return fake_quantize(x, alpha, None, Clipping(top, signed, calibrated, closed))
