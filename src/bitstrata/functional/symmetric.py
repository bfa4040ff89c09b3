"""UniQ's symmetric weight grid without a zero: +-D/2, +-3D/2, ... +-(2^b - 1)D/2.

Source: Pham, Abraham, Chung, "UniQ", eqs. 3, 4 and 6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reduce import sum_to
from .uniform import positive


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


class _Symmetric(torch.autograd.Function):
    """value = D * (code + 1/2). G = dL/dvalue; in range means |w/D| < (N-1)/2, strictly, before rounding.

    In range: dw = G, dD = g G (code + 1/2 - w/D). Outside: dw = 0, dD = g G sign(w) (N-1)/2.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, step: Tensor, bits: int, grad_scale: float) -> Tensor:
        ctx.save_for_backward(w, step)
        ctx.config = (bits, grad_scale)
        return symmetric_codes(w, step, bits).add_(0.5).mul_(positive(step)).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, step = ctx.saved_tensors
        bits, grad_scale = ctx.config
        u = w.div(positive(step))
        bound = (2**bits - 1) / 2
        inside = u.abs() < bound
        grad_w = grad * inside if ctx.needs_input_grad[0] else None
        grad_step = None
        if ctx.needs_input_grad[1]:
            level = symmetric_codes(w, step, bits).add_(0.5)  # outside the range it is sign(w) (N-1)/2 already
            residual = level.sub_(u.masked_fill_(~inside, 0.0)).mul_(grad)
            grad_step = sum_to(residual, step.shape).mul_(grad_scale).to(step.dtype)
        return grad_w, grad_step, None, None


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
    return _Symmetric.apply(w, step, bits, grad_scale)
