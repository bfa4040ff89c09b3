"""The vertical grid: LSQ's codes at the source width, whose narrower widths are their upper bits plus a compensation.

At source width n and source step s: c_n = clip(round(w/s), -2^(n-1), 2^(n-1)-1); at b bits c_b = floor(c_n / 2^(n-b))
and the value is s 2^(n-b) (c_b + z_b), z_b = (1 - 2^-(n-b)) / 2 (Wu et al., "Vertical layering", section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .fake_quantize import fake_quantize
from .formula import EPS, Formula, Gradients, Needs, Rule, positive, register_formula
from .reduce import sum_to


def vertical_offset(source_bits: int, bits: int) -> float:
    """z_b = (1 - 2^-(n-b)) / 2, the mean of the dropped low bits in units of the step at b bits; exact.

    The dropped bits r of a code take the values 0 .. 2^(n-b)-1, whose mean is (2^(n-b)-1)/2 source steps.
    """
    return 0.5 * (1.0 - 2.0 ** (bits - source_bits))


def _ratio(w: Tensor, step: Tensor) -> Tensor:
    """w / s, in float32 at least: a half-precision quotient would round twice, and to other codes."""
    dtype = torch.promote_types(torch.promote_types(w.dtype, step.dtype), torch.float32)
    return w.to(dtype) / positive(step).to(dtype)


def vertical_codes(w: Tensor, step: Tensor, source_bits: int, bits: int) -> Tensor:
    """Codes at `bits` bits: the rounded source code, shifted right by source_bits - bits (floor).

    Args:
        w: any shape, floating.
        step: source step s, one element or broadcastable to w; steps below 1e-8 count as 1e-8.
        source_bits: n, width of the stored code; bits: b <= n.

    Returns:
        Integers of w's shape in the wider of the dtypes of w, step and float32.
    """
    return _codes(_ratio(w, step), source_bits, bits)


def _codes(u: Tensor, source_bits: int, bits: int) -> Tensor:
    half = 2 ** (source_bits - 1)
    source = u.clamp(-half, half - 1).round_()
    return source.div_(2 ** (source_bits - bits)).floor_() if bits < source_bits else source


@register_formula
@dataclass(frozen=True)
class Vertical(Formula):
    """value = s 2^(n-b) (c_b + z), z = `offset`.

    G = dL/dvalue, u = w/s. Inside, -2^(n-1) <= u <= 2^(n-1)-1, decided on the unrounded u at the source width for every
    b: dw = G; ds = g G (2^(n-b) (c_b + z') - u). Outside: dw = 0; ds = g G 2^(n-b) (c_b + z'), c_b being the bound.
    z' = `grad_offset`: z, or 0 for the gradient as it is printed.
    """

    source_bits: int
    bits: int
    offset: float
    grad_offset: float

    name = "vertical"
    half_steps = True

    def value(self, x: Tensor, step: Tensor, extra: Tensor | None) -> Tensor:
        codes = vertical_codes(x, step, self.source_bits, self.bits)
        scale = vertical_scale(step, self.source_bits, self.bits)
        return (codes + self.offset).mul_(scale.reshape(()) if scale.numel() == 1 else scale).to(x.dtype)

    def gradients(
        self, grad: Tensor, x: Tensor, step: Tensor, extra: Tensor | None, *, needs: Needs, factor: float
    ) -> Gradients:
        half = 2 ** (self.source_bits - 1)
        u = _ratio(x, step)
        outside = (u < -half) | (u > half - 1)
        grad_x = grad.masked_fill(outside, 0.0) if needs[0] else None
        if not needs[1]:
            return grad_x, None, None
        centre = _codes(u, self.source_bits, self.bits).add_(self.grad_offset).mul_(2 ** (self.source_bits - self.bits))
        terms = centre.sub_(u.masked_fill(outside, 0.0)).mul_(grad)
        return grad_x, sum_to(terms, step.shape).mul_(factor).to(step.dtype), None

    def rule(self) -> Rule:
        half, shift = 2 ** (self.source_bits - 1), self.source_bits - self.bits
        return Rule("vertical", -half, half - 1, shift=shift, add=self.offset, slope_add=self.grad_offset)


def vertical_scale(step: Tensor, source_bits: int, bits: int) -> Tensor:
    """s_b = s 2^(n-b), exact but for the guard s >= 1e-8; shape of step."""
    return step.clamp_min(EPS) * 2.0 ** (source_bits - bits)


def vertical_fake_quantize(
    w: Tensor,
    step: Tensor,
    source_bits: int,
    bits: int,
    *,
    compensation: bool = True,
    ste_include_z: bool = True,
    grad_scale: float = 1.0,
) -> Tensor:
    """Fake-quantize onto the vertical grid at `bits` bits (vertical layering, eqs. 1-8); gradients as in `Vertical`.

    Args:
        w: any shape, floating; the result has its shape and dtype.
        step: source step s > 0, one element or one a channel (broadcastable to w).
        source_bits: n in 2..8; bits: b in 2..n.
        compensation: add z_b to the codes; else 0.
        ste_include_z: the step's gradient holds the z_b of the value, its true derivative; else none (as printed).
        grad_scale: factor on the step's gradient only.
    """
    offset = vertical_offset(source_bits, bits) if compensation else 0.0
    grad_offset = offset if ste_include_z else 0.0
    formula = Vertical(source_bits, bits, offset, grad_offset)
    return fake_quantize(w, step, None, formula, grad_scale=grad_scale)
