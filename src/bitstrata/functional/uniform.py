"""Uniform grids with a zero: LSQ (weights and activations) and UniQ's unsigned activations.

Source: Esser et al., "Learned step size quantization", eqs. 1-3; Pham et al., "UniQ", eq. 5 and its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .fake_quantize import fake_quantize
from .formula import EPS, Formula, Gradients, Needs, Rule, positive, register_formula
from .reduce import sum_to

__all__ = ["EPS", "Uniform", "positive", "uniform_codes", "uniform_fake_quantize"]


def uniform_codes(x: Tensor, step: Tensor, lo: int, hi: int) -> Tensor:
    """round_half_even(clamp(x / step, lo, hi)), in x's floating dtype.

    Args:
        x: any shape, floating.
        step: one element, or broadcastable to x (one step a channel); steps below 1e-8 count as 1e-8.
        lo, hi: smallest and largest code.
    """
    return x.div(positive(step)).clamp_(lo, hi).round_()


@register_formula
@dataclass(frozen=True)
class Uniform(Formula):
    """value = s * round(clamp(x/s, lo, hi)).

    dx = G inside the range, 0 outside; ds = g * sum G * (code - x/s inside, lo below, hi above). The range is decided
    on the unrounded x/s; a value on a bound is inside (LSQ) unless `open_range` (UniQ). NaN is inside. With
    `everywhere`, dx = G outside too, and nothing is said of ds.
    """

    lo: int
    hi: int
    open_range: bool = False
    everywhere: bool = False

    name = "uniform"
    narrows = True
    half_steps = True

    def value(self, x: Tensor, step: Tensor, extra: Tensor | None) -> Tensor:
        return uniform_codes(x, step, self.lo, self.hi).mul_(positive(step)).to(x.dtype)

    def gradients(
        self, grad: Tensor, x: Tensor, step: Tensor, extra: Tensor | None, *, needs: Needs, factor: float
    ) -> Gradients:
        u = x.div(positive(step))
        outside = (u <= self.lo) | (u >= self.hi) if self.open_range else (u < self.lo) | (u > self.hi)
        if self.everywhere:
            outside = torch.zeros_like(outside)
        grad_x = grad.masked_fill(outside, 0.0) if needs[0] else None
        if not needs[1]:
            return grad_x, None, None
        residual = u.clamp(self.lo, self.hi).round_().sub_(u.masked_fill(outside, 0.0))
        return grad_x, sum_to(residual.mul_(grad), step.shape).mul_(factor).to(step.dtype), None

    def rule(self) -> Rule:
        return Rule("uniform", self.lo, self.hi, open_range=self.open_range, everywhere=self.everywhere)


def uniform_fake_quantize(
    x: Tensor,
    step: Tensor,
    lo: int,
    hi: int,
    *,
    grad_scale: float = 1.0,
    open_range: bool = False,
    everywhere: bool = False,
) -> Tensor:
    """Fake-quantize onto the grid step * {lo..hi} with the straight-through estimator (LSQ eqs. 1-3, UniQ eq. 5).

    Args:
        x: any shape, floating; the result has its shape and dtype.
        step: one element or broadcastable; gets a gradient of its own shape, multiplied by `grad_scale`.
        lo, hi: smallest and largest code.
        grad_scale: factor on the step's gradient only (LSQ section 2.2).
        open_range: values on a bound count as outside (UniQ), else inside (LSQ).
        everywhere: x gets the gradient outside the range too, for steps that follow x and learn nothing.
    """
    return fake_quantize(x, step, None, Uniform(lo, hi, open_range, everywhere), grad_scale=grad_scale)
