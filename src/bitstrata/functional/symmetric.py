"""UniQ's symmetric weight grid without a zero: +-D/2, +-3D/2, ... +-(2^b - 1)D/2.

Source: Pham, Abraham, Chung, "UniQ", eqs. 3, 4 and 6.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .fake_quantize import fake_quantize
from .formula import Formula, Gradients, Needs, Rule, positive, register_formula
from .reduce import sum_to


def symmetric_codes(w: Tensor, step: Tensor, bits: int) -> Tensor:
    """round_half_even(clip(w/D + (N-1)/2, 0, N-1)) - 2^(b-1) with N = 2^b, in w's floating dtype.

    Evaluated as the floor of w/D, with ties (whole multiples of D) moved to the even neighbour: adding (N-1)/2 first
    would round away a small w/D, and with it the sign of weights near zero.

    Args:
        w: any shape, floating.
        step: D, one element or broadcastable to w; steps below 1e-8 count as 1e-8.
        bits: b in 1..8.
    """
    half = 2 ** (bits - 1)
    u = w.div(positive(step)).clamp_(-half, half)
    codes = u.floor()
    odd = (codes + half).remainder_(2)
    return codes.sub_(odd.mul_(u == codes)).clamp_(-half, half - 1)


@register_formula
@dataclass(frozen=True)
class Symmetric(Formula):
    """value = D * (code + 1/2). G = dL/dvalue; in range means |w/D| < (N-1)/2, strictly, before rounding.

    In range: dw = G, dD = g G (code + 1/2 - w/D). Outside: dw = 0, dD = g G sign(w) (N-1)/2.
    """

    bits: int

    name = "symmetric"
    narrows = True
    half_steps = True

    def value(self, x: Tensor, step: Tensor, extra: Tensor | None) -> Tensor:
        return symmetric_codes(x, step, self.bits).add_(0.5).mul_(positive(step)).to(x.dtype)

    def gradients(
        self, grad: Tensor, x: Tensor, step: Tensor, extra: Tensor | None, *, needs: Needs, factor: float
    ) -> Gradients:
        u = x.div(positive(step))
        outside = ~(u.abs() < (2**self.bits - 1) / 2)
        grad_x = grad.masked_fill(outside, 0.0) if needs[0] else None
        if not needs[1]:
            return grad_x, None, None
        level = symmetric_codes(x, step, self.bits).add_(0.5)  # outside the range it is sign(w) (N-1)/2 already
        residual = level.sub_(u.masked_fill_(outside, 0.0)).mul_(grad)
        return grad_x, sum_to(residual, step.shape).mul_(factor).to(step.dtype), None

    def rule(self) -> Rule:
        return Rule("symmetric", -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1, open_range=True)


def symmetric_fake_quantize(w: Tensor, step: Tensor, bits: int, *, grad_scale: float = 1.0) -> Tensor:
    """Fake-quantize onto UniQ's symmetric grid with the straight-through estimator (UniQ eqs. 3 and 6).

    The gradient of D outside the range is sign(w) (N-1)/2, the derivative of the value sign(w) D (N-1)/2; eq. 6 prints
    sign(w) alpha, larger by the factor D.

    Args:
        w: any shape, floating; the result has its shape and dtype.
        step: D, one element or broadcastable; gets a gradient of its own shape, multiplied by `grad_scale`.
        bits: b in 1..8.
        grad_scale: factor on the gradient of D only.
    """
    return fake_quantize(w, step, None, Symmetric(bits), grad_scale=grad_scale)
