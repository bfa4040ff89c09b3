"""Shared by the tests of layers that train in integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitstrata.integer import IntegerRule
from bitstrata.nn import IntegerLayer, to_integer

NEAREST = IntegerRule(grad_rounding="nearest")


def gauss(*shape: int, seed: int = 0, axis: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian with channels of very different ranges."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    scales = torch.exp2(-5 * torch.rand(shape[axis], generator=generator, dtype=torch.float64))
    return (x * scales.reshape([-1 if d == axis % len(shape) else 1 for d in range(len(shape))])).to(dtype)


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def made(layer: nn.Module, rule: IntegerRule | None = None, **options: Any) -> IntegerLayer:
    with torch.no_grad():
        layer.weight.copy_(gauss(*layer.weight.shape, seed=3))
        if layer.bias is not None:
            layer.bias.copy_(gauss(1, *layer.bias.shape, seed=4)[0])
    return to_integer(layer, rule, **options)


def gradients(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Result and gradients of input, weight and bias."""
    x = leaf(x)
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), g)


def same(left: Any, right: Any) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))
