"""Straight-through estimators as small composable pieces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _WithValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, value: Tensor) -> Tensor:
        return value.clone()  # never an alias of an input, which autograd would treat as the identity

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def with_value(surrogate: Tensor, value: Tensor) -> Tensor:
    """`value` going forward, the gradient of `surrogate` going back.

    Unlike ``surrogate + (value - surrogate).detach()`` it gives `value` to the last bit.

    Args:
        surrogate, value: same shape and dtype.
    """
    if surrogate.shape != value.shape or surrogate.dtype != value.dtype:
        raise ValueError(
            f"with_value: surrogate {tuple(surrogate.shape)} {surrogate.dtype} and value {tuple(value.shape)} "
            f"{value.dtype} must agree"
        )
    return _WithValue.apply(surrogate, value.detach())


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest, ties to even; the gradient passes straight through."""
    return with_value(x, x.detach().round())


def floor_ste(x: Tensor) -> Tensor:
    """Largest integer not above x; the gradient passes straight through."""
    return with_value(x, x.detach().floor())


class _GradScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, g: float) -> Tensor:
        ctx.g = g
        return p.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.g, None


def grad_scale(p: Tensor, g: float) -> Tensor:
    """p itself; its gradient is multiplied by g (LSQ section 2.2)."""
    return _GradScale.apply(p, g)
