"""The nested symmetric grid: UniQ's symmetric grid whose narrower widths are the upper bit-planes of one code.

At source width n and source step D: u = w/D, c_n = clamp(floor(u), -2^(n-1), 2^(n-1)-1); at b bits c_b = c_n >> (n-b)
and the value is S_b * (c_b + 1/2) with S_b = r_b * D * 2^(n-b). Equals UniQ (Pham et al., eq. 3) at b = n, and UniQ
with step 2^(n-b) D at every other width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reduce import sum_to
from .uniform import EPS, positive


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


class _Nested(torch.autograd.Function):
    """value = S * (c_b + 1/2), S = r * D * 2^(n-b).

    G = dL/dvalue. Inside |u| < 2^(n-1), decided on the unrounded u at the source width for every b:
    dw = r G; dD = g r G (2^(n-b) (c_b + 1/2) - u). Outside: dw = 0; dD = g r G 2^(n-b) (c_b + 1/2).
    dr = g G D 2^(n-b) (c_b + 1/2).
    """

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd functions take positional arguments only)
        ctx: Any, w: Tensor, step: Tensor, ratio: Tensor, source_bits: int, bits: int, grad_scale: float
    ) -> Tensor:
        codes = nested_codes(w, step, source_bits, bits)
        ctx.save_for_backward(w, step, ratio, codes)
        ctx.config = (source_bits, bits, grad_scale)
        scale = nested_scale(step, ratio, source_bits, bits)
        return (codes + 0.5).mul_(scale.reshape(()) if scale.numel() == 1 else scale).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, step, ratio, codes = ctx.saved_tensors
        source_bits, bits, grad_scale = ctx.config
        divisor = positive(step)
        u = w / divisor
        inside = u.abs() < 2 ** (source_bits - 1)
        centre = (codes + 0.5).mul_(2 ** (source_bits - bits))
        r = positive(ratio)
        grad_w = grad * inside * r if ctx.needs_input_grad[0] else None
        grad_step = grad_ratio = None
        if ctx.needs_input_grad[1]:
            terms = (centre - u * inside).mul_(r).mul_(grad)
            grad_step = sum_to(terms, step.shape).mul_(grad_scale).to(step.dtype)
        if ctx.needs_input_grad[2]:
            grad_ratio = sum_to(centre * divisor * grad, ratio.shape).mul_(grad_scale).to(ratio.dtype)
        return grad_w, grad_step, grad_ratio, None, None, None


def nested_scale(step: Tensor, ratio: Tensor, source_bits: int, bits: int) -> Tensor:
    """S_b = r_b * D * 2^(n-b), one rounding (the power of two is exact); shape of step."""
    return ratio.clamp_min(EPS) * step.clamp_min(EPS) * 2.0 ** (source_bits - bits)


def nested_fake_quantize(
    w: Tensor, step: Tensor, ratio: Tensor, source_bits: int, bits: int, *, grad_scale: float = 1.0
) -> Tensor:
    """Fake-quantize onto the nested symmetric grid at `bits` bits; gradients as in `_Nested`.

    Args:
        w: any shape, floating; the result has its shape and dtype.
        step: source step D > 0, one element or one a channel (broadcastable to w).
        ratio: r_b > 0, same shape as step; a constant 1 at the source width.
        source_bits: n in 1..8; bits: b in 1..n.
        grad_scale: factor on the gradients of step and ratio only.
    """
    return _Nested.apply(w, step, ratio, source_bits, bits, grad_scale)
