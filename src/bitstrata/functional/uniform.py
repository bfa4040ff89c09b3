"""Uniform grids with a zero: LSQ (weights and activations) and UniQ's unsigned activations.

Source: Esser et al., "Learned step size quantization", eqs. 1-3; Pham et al., "UniQ", eq. 5 and its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reduce import sum_to

EPS = 1e-8  # smallest step used: a step that training drives through zero must not flip or blow up the grid


def positive(step: Tensor) -> Tensor:
    """The step as a divisor: at least 1e-8, and 0-d when it is one number.

    A 0-d float32 step keeps bfloat16 inputs in bfloat16 while each operation still computes in float32 and rounds once.
    """
    safe = step.clamp_min(EPS)
    return safe.reshape(()) if safe.numel() == 1 else safe


def uniform_codes(x: Tensor, step: Tensor, lo: int, hi: int) -> Tensor:
    """round_half_even(clamp(x / step, lo, hi)), in x's floating dtype.

    Args:
        x: any shape, floating.
        step: one element, or broadcastable to x (one step a channel); steps below 1e-8 count as 1e-8.
        lo, hi: smallest and largest code.
    """
    return x.div(positive(step)).clamp_(lo, hi).round_()


def _masked(values: Tensor, u: Tensor, lo: int, hi: int, open_range: bool) -> Tensor:
    """`values` where u is in range, 0 elsewhere."""
    if open_range:  # hardtanh's backward is this very mask, in one pass over memory
        return torch.ops.aten.hardtanh_backward(values, u, lo, hi)
    return values.masked_fill((u < lo) | (u > hi), 0.0)


class _Uniform(torch.autograd.Function):
    """value = s * round(clamp(x/s, lo, hi)).

    dx = G inside the range, 0 outside; ds = g * sum G * (code - x/s inside, lo below, hi above). The range is decided
    on the unrounded x/s; a value on a bound is inside (LSQ) unless `open_range` (UniQ).
    """

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd functions take positional arguments only)
        ctx: Any, x: Tensor, step: Tensor, lo: int, hi: int, grad_scale: float, open_range: bool
    ) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.config = (lo, hi, grad_scale, open_range)
        return uniform_codes(x, step, lo, hi).mul_(positive(step)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step = ctx.saved_tensors
        lo, hi, grad_scale, open_range = ctx.config
        u = x.div(positive(step))
        grad_x = grad_step = None
        if ctx.needs_input_grad[0]:
            grad_x = _masked(grad, u, lo, hi, open_range)
        if ctx.needs_input_grad[1]:
            residual = u.clamp(lo, hi).round_().sub_(_masked(u, u, lo, hi, open_range))
            grad_step = sum_to(residual.mul_(grad), step.shape).mul_(grad_scale).to(step.dtype)
        return grad_x, grad_step, None, None, None, None


def uniform_fake_quantize(
    x: Tensor, step: Tensor, lo: int, hi: int, *, grad_scale: float = 1.0, open_range: bool = False
) -> Tensor:
    """Fake-quantize onto the grid step * {lo..hi} with the straight-through estimator (LSQ eqs. 1-3, UniQ eq. 5).

    Args:
        x: any shape, floating; the result has its shape and dtype.
        step: one element or broadcastable; gets a gradient of its own shape, multiplied by `grad_scale`.
        lo, hi: smallest and largest code.
        grad_scale: factor on the step's gradient only (LSQ section 2.2).
        open_range: values on a bound count as outside (UniQ), else inside (LSQ).
    """
    return _Uniform.apply(x, step, lo, hi, grad_scale, open_range)
