"""Shared by the tests of layers that train in integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bitstrata as bs
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


def spread(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian with channels (axis 1) of 1, 1/2, 1/4, ... their range, over and over."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    sizes = torch.exp2(-(torch.arange(shape[1]) % 4).float())
    return x * sizes.reshape([-1 if d == 1 else 1 for d in range(len(shape))])


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = bs.zoo.create("digits_resnet", width=8)
    return bs.integer_(model, torch.randn(2, 1, 8, 8), **options)


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(10 + i)) for i in range(count)]


def trained(**options: Any) -> nn.Module:
    """After a few steps, so that statistics are other than initial."""
    model = network(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(8)).backward()
        optimizer.step()
    return model.eval()


def whole(*shape: int, low: int, high: int, seed: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def gradient(*shape: int, axis: int, seed: int = 0) -> Tensor:
    """Float64 with channels of very different ranges, among them zeros, and a largest magnitude of 127."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sizes = torch.exp2(-torch.arange(shape[axis], dtype=torch.float64))
    sizes[-1] = 0
    g = g * sizes.reshape([-1 if d == axis % len(shape) else 1 for d in range(len(shape))])
    return g * (127 / g.abs().max())
