"""The fused quantization-aware step against the fake-quantized network itself, in float64 and in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs

SIZE = 12


class Net(nn.Module):
    """Residual sums of several kinds, odd channels, strides, groups, and layers that stay in torch."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(8)
        self.two, self.norm2 = nn.Conv2d(8, 13, (3, 1), stride=2, padding=(1, 0), bias=False), nn.BatchNorm2d(13)
        self.side, self.norm3 = nn.Conv2d(8, 13, 1, stride=2, bias=False), nn.BatchNorm2d(13, affine=False)
        self.biased = nn.Conv2d(13, 13, 3, padding=2, dilation=2)
        self.last, self.norm4 = nn.Conv2d(13, 5, 2, dilation=2, bias=False), nn.BatchNorm2d(5, momentum=None)
        self.relu, self.head = nn.ReLU(), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm0(self.stem(x)))
        x = F.relu(x + self.norm1(self.one(x)))
        y = self.norm2(self.two(x)) + self.norm3(self.side(x))
        y = torch.tanh(self.biased(y)) + y
        return self.head(self.relu(self.norm4(self.last(y))).mean((2, 3)))


def batch(samples: int = 6, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, SIZE, SIZE, generator=generator), torch.arange(samples) % 5


def quantized(recipe: bs.Recipe, model: nn.Module | None = None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = Net() if model is None else model
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    x, _ = batch()
    return bs.calibrate_(bs.quantize_(net, recipe, x), [x]).train()


def step(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    result = network(x)
    F.cross_entropy(result, y).backward()
    return result.detach()


def same(fused: nn.Module, reference: nn.Module, rtol: float = 1e-5) -> None:
    """Gradients agree relative to the largest of a tensor.

    Those of one number are sums that nearly cancel: a normalization undoes the scale before it.
    """
    largest = max(float(q.grad.abs().max()) for q in reference.parameters() if q.grad is not None)
    for (name, p), q in zip(fused.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            error, own = (p.grad.double() - q.grad.double()).abs().max(), q.grad.abs().max()
            allowed = rtol * own if p.dim() > 1 else 100 * rtol * own + rtol * largest
            assert error <= allowed + 1e-8, f"{name}: {error:.1e} of {own:.1e}"
    for (name, b), c in zip(fused.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(b.double(), c.double(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


RECIPES: dict[str, Any] = {
    "lsq, 4 bits": lambda: bs.recipes.lsq(4),
    "lsq, 2 bits a channel": lambda: bs.recipes.lsq(2, per_channel=True),
    "lsq, 8 bits by batch": lambda: bs.recipes.lsq(8, numel="batch"),
    "lsq, 3 and 1 bits, inner edges": lambda: bs.recipes.lsq(3, 1, edges="inner"),
    "uniq, 1 bit": lambda: bs.recipes.uniq(1, per_channel=True),
    "uniq, 4 bits": lambda: bs.recipes.uniq(4),
    "uniq, 2 and 8 bits": lambda: bs.recipes.uniq(2, 8),
    "sat": lambda: bs.recipes.sat(4),
    "pact": lambda: bs.recipes.sat(3, gradient="pact", alpha=1.5),
    "vertical": bs.recipes.vertical,
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_gradients_and_statistics_are_those_of_the_formula(recipe):
    model = quantized(recipe())
    reference = copy.deepcopy(model).double()
    fused = bs.fuse(model)
    assert {"one", "two", "side", "last"} <= set(fused.fused)
    x, y = batch()
    for seed in (3, 4):  # gradients accumulate
        x, y = batch(seed=seed)
        torch.testing.assert_close(step(fused, x, y).double(), step(reference, x.double(), y), rtol=1e-4, atol=1e-5)
    same(model, reference)


def test_every_precision_of_one_model():
    model = quantized(bs.recipes.strata((1, 2, 4, 8)))
    reference, fused = copy.deepcopy(model).double(), bs.fuse(model)
    x, y = batch()
    for precision in (8, 1, 4, 2):
        bs.set_precision(fused, precision)
        bs.set_precision(reference, precision)
        torch.testing.assert_close(step(fused, x, y).double(), step(reference, x.double(), y), rtol=1e-4, atol=1e-5)
    same(model, reference)


def test_joint_training():
    model = quantized(bs.recipes.strata((2, 4)))
    other, fused = copy.deepcopy(model), bs.fuse(model)
    x, y = batch()
    bs.joint_backward(fused, x, y)
    bs.joint_backward(other, x, y)
    same(model, other, rtol=1e-4)


@pytest.mark.parametrize("samples", [1, 2, 17])
def test_batches_groups_and_channels_last(samples):
    model = quantized(bs.recipes.lsq(4), Net(groups=4)).to(memory_format=torch.channels_last)
    reference, fused = copy.deepcopy(model).double(), bs.fuse(model)
    x, y = batch(samples)
    step(fused, x.contiguous(memory_format=torch.channels_last), y)
    step(reference, x.double(), y)
    same(model, reference)


@pytest.mark.parametrize(("name", "options"), [("resnet20", {"width": 8}), ("resnet20", {"shortcut": "B", "width": 4})])
def test_networks_of_the_zoo(name, options):
    model = quantized(bs.recipes.lsq(4), bs.zoo.create(name, classes=5, **options))
    reference, fused = copy.deepcopy(model).double(), bs.fuse(model)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, bs.QuantConv2d)]
    assert list(fused.fused) == convolutions
    x, y = batch(3)
    torch.testing.assert_close(step(fused, x, y).double(), step(reference, x.double(), y), rtol=1e-4, atol=1e-5)
    same(model, reference, rtol=1e-4)


def test_bfloat16_rounds_gradients_alone():
    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(3, 8, 1), *block(8, 16, 2), *block(16, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = quantized(bs.recipes.lsq(4), nn.Sequential(*layers, nn.Linear(12, 5)))
    exact, fused = copy.deepcopy(model), bs.fuse(model)
    x, y = batch(16)
    with torch.autocast("cpu", torch.bfloat16):
        result = fused(x)
    assert result.dtype == torch.bfloat16
    F.cross_entropy(result.float(), y).backward()
    step(exact, x, y)
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        if p.dim() == 4:
            assert (p.grad - q.grad).norm() < 0.03 * q.grad.norm(), name
    for a, b in zip(model.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_of_the_input():
    model = quantized(bs.recipes.lsq(4))
    reference, fused = copy.deepcopy(model).double(), bs.fuse(model)
    x, y = batch()
    inputs = x.clone().requires_grad_(), x.double().requires_grad_()
    step(fused, inputs[0], y)
    step(reference, inputs[1], y)
    torch.testing.assert_close(inputs[0].grad.double(), inputs[1].grad, rtol=1e-3, atol=1e-8)
    same(model, reference)


def test_frozen_parameters_get_no_gradient():
    model = quantized(bs.recipes.lsq(4))
    frozen = [p for n, p in model.named_parameters() if n.startswith(("one", "norm2", "two.act_quant"))]
    for p in frozen:
        p.requires_grad_(False)
    reference, fused = copy.deepcopy(model).double(), bs.fuse(model)
    x, y = batch()
    step(fused, x, y)
    step(reference, x.double(), y)
    assert all(p.grad is None for p in frozen)
    same(model, reference)


def test_first_steps_are_set_by_the_model():
    torch.manual_seed(0)
    x, y = batch()
    model = bs.quantize_(Net(), bs.recipes.lsq(4), x).train()  # no step of an activation is set yet
    other, fused = copy.deepcopy(model), bs.fuse(model)
    for _ in range(2):
        step(fused, x, y)
        step(other, x, y)
    same(model, other, rtol=1e-4)


def test_training_goes_on_as_without():
    model = quantized(bs.recipes.lsq(4))
    other, fused = copy.deepcopy(model), bs.fuse(model)
    for network in (fused, other):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
        for seed in range(6):
            optimizer.zero_grad()
            step(network, *batch(seed=seed))
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=0, atol=0.02, msg=lambda m, n=name: f"{n}: {m}")
    loss = [F.cross_entropy(n(batch()[0]), batch()[1]).item() for n in (fused.eval(), other.eval())]
    assert abs(loss[0] - loss[1]) < 0.05
