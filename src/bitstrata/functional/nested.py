"""The nested symmetric grid: UniQ's symmetric grid whose narrower widths are the upper bit-planes of one code.

At source width n and source step D: u = w/D, c_n = clamp(floor(u), -2^(n-1), 2^(n-1)-1); at b bits c_b = c_n >> (n-b)
and the value is S_b * (c_b + 1/2) with S_b = r_b * D * 2^(n-b). Equals UniQ (Pham et al., eq. 3) at b = n, and UniQ
with step 2^(n-b) D at every other width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .fake_quantize import fake_quantize
from .formula import EPS, Formula, Gradients, Needs, Rule, positive, register_formula
from .reduce import sum_to


def nested_codes(w: Tensor, step: Tensor, source_bits: int, bits: int) -> Tensor:
    """Codes at `bits` bits, in w's floating dtype: floor of the source code by 2^(source_bits - bits).

    Args:
        w: any shape, floating.
        step: source step D, one element or broadcastable to w; steps below 1e-8 count as 1e-8.
        source_bits: n, width of the stored code; bits: b <= n.
    """
    half = 2 ** (source_bits - 1)
    source = w.div(positive(step)).floor_().clamp_(-half, half - 1)
    return source.div_(2 ** (source_bits - bits)).floor_() if bits < source_bits else source


@register_formula
@dataclass(frozen=True)
class Nested(Formula):
    """value = S * (c_b + 1/2), S = r * D * 2^(n-b).

    G = dL/dvalue. Inside |u| < 2^(n-1), decided on the unrounded u at the source width for every b:
    dw = r G; dD = g r G (2^(n-b) (c_b + 1/2) - u). Outside: dw = 0; dD = g r G 2^(n-b) (c_b + 1/2).
    dr = g G D 2^(n-b) (c_b + 1/2).
    """

    source_bits: int
    bits: int

    name = "nested"
    narrows = True
    takes_extra = True

    def value(self, x: Tensor, step: Tensor, extra: Tensor | None) -> Tensor:
        assert extra is not None
        scale = nested_scale(step, extra, self.source_bits, self.bits)
        codes = nested_codes(x, step, self.source_bits, self.bits)
        return (codes + 0.5).mul_(scale.reshape(()) if scale.numel() == 1 else scale).to(x.dtype)

    def gradients(
        self, grad: Tensor, x: Tensor, step: Tensor, extra: Tensor | None, *, needs: Needs, factor: float
    ) -> Gradients:
        assert extra is not None
        divisor, r = positive(step), positive(extra)
        u = x / divisor
        outside = ~(u.abs() < 2 ** (self.source_bits - 1))
        centre = nested_codes(x, step, self.source_bits, self.bits).add_(0.5).mul_(2 ** (self.source_bits - self.bits))
        grad_x = (grad * r).masked_fill_(outside, 0.0).to(x.dtype) if needs[0] else None
        grad_step = grad_extra = None
        if needs[1]:
            terms = (centre - u.masked_fill(outside, 0.0)).mul_(r).mul_(grad)
            grad_step = sum_to(terms, step.shape).mul_(factor).to(step.dtype)
        if needs[2]:
            grad_extra = sum_to(centre * divisor * grad, extra.shape).mul_(factor).to(extra.dtype)
        return grad_x, grad_step, grad_extra

    def rule(self) -> Rule:
        half = 2 ** (self.source_bits - 1)
        return Rule("nested", -half, half - 1, shift=self.source_bits - self.bits, open_range=True)


def nested_scale(step: Tensor, ratio: Tensor, source_bits: int, bits: int) -> Tensor:
    """S_b = r_b * D * 2^(n-b), one rounding (the power of two is exact); shape of step."""
    return ratio.clamp_min(EPS) * step.clamp_min(EPS) * 2.0 ** (source_bits - bits)


def nested_fake_quantize(
    w: Tensor, step: Tensor, ratio: Tensor, source_bits: int, bits: int, *, grad_scale: float = 1.0
) -> Tensor:
    """Fake-quantize onto the nested symmetric grid at `bits` bits; gradients as in `Nested`.

    Args:
        w: any shape, floating; the result has its shape and dtype.
        step: source step D > 0, one element or one a channel (broadcastable to w).
        ratio: r_b > 0, same shape as step; a constant 1 at the source width.
        source_bits: n in 1..8; bits: b in 1..n.
        grad_scale: factor on the gradients of step and ratio only.
    """
    return fake_quantize(w, step, ratio, Nested(source_bits, bits), grad_scale=grad_scale)
