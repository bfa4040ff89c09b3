"""MaQD's quantizers: weights scaled, rounded and cut to a fixed grid; activations on [0, 1] with a sum of sigmoids.

Source: Sawada, Saiin and Suetake, "MaQD" (2024), eqs. 6 to 8, 10, 11 and 15.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dorefa import widened
from .fake_quantize import fake_quantize
from .formula import Formula, Gradients, Needs, Rule, register_formula

NARROWEST = 0.05  # sigmoids that kernels sum by products of exponentials, which float32 must hold


@register_formula
@dataclass(frozen=True)
class Scaled(Formula):
    """value = code / top, code = clip(p round(D s x), -top, top), ties to even; dx = gain G for |s x| < 1, else 0.

    D is `rounded`, which is top (p = 1), or half of it (p = 2).
    """

    top: int
    rounded: float
    s: float
    gain: float

    name = "scaled"

    def levels(self, x: Tensor) -> Tensor:
        """The codes as floating-point numbers, float32 at least; NaN stays NaN."""
        codes = (widened(x) * self.s).mul_(self.rounded).round_()
        return codes.mul_(self._power()).clamp_(-self.top, self.top).add_(0.0)  # no zero has a sign

    def _power(self) -> int:
        return round(self.top / self.rounded)

    def value(self, x: Tensor, step: Tensor, extra: Tensor | None) -> Tensor:
        return self.levels(x).mul_(1.0 / self.top).to(x.dtype)

    def gradients(
        self, grad: Tensor, x: Tensor, step: Tensor, extra: Tensor | None, *, needs: Needs, factor: float
    ) -> Gradients:
        if not needs[0]:
            return None, None, None
        inside = (widened(x) * self.s).abs_() < 1
        return (widened(grad) * self.gain).masked_fill_(~inside, 0.0).to(grad.dtype), None, None

    def rule(self) -> Rule:
        return Rule(
            "scaled", -self.top, self.top, shift=self._power() - 1, open_range=True,
            factor=self.s, rounded=self.rounded, gain=self.gain,
        )  # fmt: skip


@register_formula
@dataclass(frozen=True)
class Sigmoids(Formula):
    """value = code / top, code = clip(round(top x), 0, top), ties to even; dx = gain G `surrogate_slope(x)`.

    Kernels take one exponential of an element for all of its sigmoids, and are within 2e-6 of the largest slope of it.
    """

    top: int
    alpha: float
    gain: float

    name = "sigmoids"

    def value(self, x: Tensor, step: Tensor, extra: Tensor | None) -> Tensor:
        codes = (widened(x) * self.top).round_().clamp_(0, self.top).add_(0.0)  # no zero has a sign
        return codes.mul_(1.0 / self.top).to(x.dtype)

    def gradients(
        self, grad: Tensor, x: Tensor, step: Tensor, extra: Tensor | None, *, needs: Needs, factor: float
    ) -> Gradients:
        if not needs[0]:
            return None, None, None
        slope = surrogate_slope(x, self.top + 1, self.alpha).mul_(self.gain)
        return (grad * slope).to(grad.dtype), None, None

    def rule(self) -> Rule:
        if self.alpha < NARROWEST:
            raise ValueError(f"Sigmoids: kernels take sigmoids of {NARROWEST} or wider, got {self.alpha}")
        return Rule("sigmoids", 0, self.top, factor=self.alpha, gain=self.gain / self.alpha)


def surrogate_slope(x: Tensor, states: int, alpha: float = 0.25) -> Tensor:
    """Sum of the slopes of states - 1 sigmoids, of width alpha, at the thresholds of MaQD's activation.

    sum_m S_m (1 - S_m) / alpha, S_m = sigmoid((x - b_m) / alpha), b_m = (m - 1/2) / (states - 1), m = 1..states-1. Its
    integral over the real line is states - 1.

    Args:
        x: any shape.

    Returns:
        x's shape, float32 at least.

    Source: MaQD eqs. 11 and 15.
    """
    scaled = widened(x.detach()) / alpha
    total = torch.zeros_like(scaled)
    for m in range(1, states):  # one threshold at a time: states - 1 copies of a feature map would not fit
        near = torch.sigmoid(scaled - (m - 0.5) / (states - 1) / alpha)
        total.addcmul_(near, 1 - near)
    return total.div_(alpha)


def scaled_fake_quantize(x: Tensor, formula: Scaled) -> Tensor:
    """Fake-quantize standardized weights; gradients as in `Scaled`.

    Args:
        x: any shape, floating; the result has its shape and dtype.
        formula: says all.
    """
    return fake_quantize(x, widened(x.new_ones(1)), None, formula)


def sigmoids_fake_quantize(x: Tensor, top: int, alpha: float, gain: float) -> Tensor:
    """Fake-quantize onto top + 1 values that fill [0, 1]; gradients as in `Sigmoids`.

    Args:
        x: any shape, floating; the result has its shape and dtype.
        top: largest code. alpha: positive, width of the sigmoids. gain: factor on the gradient.
    """
    return fake_quantize(x, widened(x.new_ones(1)), None, Sigmoids(top, alpha, gain))
