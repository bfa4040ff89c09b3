"""Codes that are powers of two: the definition, mean and variance, the engine's kernels, layers and networks."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata.integer import CounterGenerator, IntegerRule, power_quantize
from bitstrata.integer.powers import largest_power, power_quantize_reference, power_variance, product_bits


@pytest.fixture(params=runtime.available_isas())
def each_isa(request, monkeypatch):
    monkeypatch.setenv("BITSTRATA_ISA", request.param)


def heavy(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Most elements small, few large, as in gradients."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(0.5 * torch.randn(shape, generator=generator))


@pytest.mark.parametrize(("bits", "powers"), [(2, {1}), (3, {1, 2, 4}), (4, {1, 2, 4, 8, 16, 32, 64})])
def test_codes_are_powers_of_two(bits, powers):
    x = heavy((40, 30))
    for rounding in ("nearest", "stochastic"):
        found = power_quantize(x, bits, rounding=rounding, generator=CounterGenerator(3))
        assert set(found.codes.abs().unique().tolist()) <= {0} | powers
        assert bool((found.codes * x.sign() >= 0).all())
        assert (found.groups, found.bits, found.exponents.unique().tolist()) == (1, product_bits(bits), [0])
        assert int(found.codes.flatten()[x.abs().argmax()].abs()) == largest_power(bits) == max(powers)
    assert largest_power(bits) <= found.largest


def test_to_nearest():
    values = [0.0, 0.49, 0.5, 1.0, 1.49, 1.5, 2.99, 3.0, 5.9, 6.0, 47.9, 48.0, 64.0]
    codes = [0, 0, 1, 1, 1, 2, 2, 4, 4, 8, 32, 64, 64]
    x = torch.tensor([values, [-v for v in values]])
    assert power_quantize(x, 4).codes.tolist() == [codes, [-c for c in codes]]


def test_the_mean_is_the_value_and_the_variance_what_two_points_have():
    x = torch.tensor([0.0, 0.3, 0.75, 1.0, 1.25, 2.5, 3.0, 5.0, 11.0, 40.0, 64.0]).expand(40000, -1).contiguous()
    codes = power_quantize(x, 4, rounding="stochastic", generator=CounterGenerator(1)).codes.double()
    value = x[0].double()
    lower = torch.where(value < 1, torch.zeros_like(value), torch.exp2(value.clamp(min=1).log2().floor()))
    gap = lower.clamp(min=1)
    variance = (value - lower) * (lower + gap - value)
    assert bool(((codes.mean(0) - value).abs() <= 5 * (variance / len(x)).sqrt() + gap * 2**-15).all())
    torch.testing.assert_close(codes.var(0, correction=0), variance, rtol=0.05, atol=1e-9)


def test_less_variance_than_uniform_codes_of_as_many_bits():
    x = heavy((4000, 64))

    def variance(quantized):
        return float((quantized.dequantize() - x).square().sum() / x.square().sum())

    options = {"rounding": "stochastic", "generator": CounterGenerator(2)}
    uniform = variance(bs.integer.shift_quantize(x, 4, 4, 1, **options))
    found = variance(power_quantize(x, 4, **options))
    assert found < 0.1
    assert uniform > 0.4
    assert found == pytest.approx(power_variance(x, 4) / float(x.square().sum()), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.usefixtures("each_isa")
def test_kernels_compute_the_definition(dtype, rounding, bits):
    for shape in ((3, 5, 7, 2), (1, 64, 9, 9), (2, 33, 11)):
        x = heavy(shape).to(dtype)
        for view in (x, x.movedim(1, -1).contiguous().movedim(-1, 1), torch.zeros_like(x)):
            found = power_quantize(view, bits, rounding=rounding, generator=CounterGenerator(5, 2))
            wanted = power_quantize_reference(view, bits, rounding=rounding, generator=CounterGenerator(5, 2))
            assert torch.equal(found.codes, wanted.codes)
            assert torch.equal(found.scale, wanted.scale)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.third, self.norm3 = nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.first(x)).relu()
        y = self.norm3(self.third(self.norm2(self.second(y)).relu())) + y
        return self.last(self.inner(y.relu().mean((2, 3))).relu())


@pytest.mark.parametrize("norm", ["l1_quantized", "l2_quantized"])
@pytest.mark.usefixtures("each_isa")
def test_fused_steps_equal_unfused_ones(norm):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 9, 8)
    model = bs.integer_(Network(), x, grad_grid="powers", norm=norm).train()
    twin = copy.deepcopy(model)
    for network in (bs.fuse(model), twin):
        for _ in range(2):
            network(x).square().sum().backward()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)
    grids = {name: layer.rule.grad_grid for name, layer in model.named_modules() if hasattr(layer, "rule")}
    assert grids == {name: "uniform" if name in ("first", "last") else "powers" for name in grids}


def test_the_recipe_and_other_forward_quantizers():
    recipe = bs.recipes.shiftquant(grad_grid="powers")
    x = torch.randn(2, 3, 9, 8)
    model = bs.quantize_(Network(), recipe, x)
    assert model.second.rule.grad_grid == "powers"
    part = bs.recipes.Part("shiftquant", "gradient", {"grid": "powers", "edge_bits": 8})
    composed = bs.quantize_(Network(), dataclasses.replace(bs.recipes.uniq(), gradient=part), x)
    bs.calibrate_(composed, [x])
    composed.train()(x).sum().backward()
    assert composed.second.grad_quant.rule.grad_grid == "powers"
    assert "powers" in repr(composed.second.grad_quant)
    assert composed.first.grad_quant.rule == IntegerRule(g=8)


def test_bad_input():
    with pytest.raises(ValueError, match=r"power_quantize: codes that are powers of two have 2..4 bits, got 5"):
        power_quantize(torch.ones(2, 2), 5)
    with pytest.raises(ValueError, match=r"grad_grid 'powers': codes that are powers of two have 2..4 bits, got 6"):
        IntegerRule(g=6, grad_grid="powers")
    with pytest.raises(ValueError, match="grad_grid must be one of uniform, powers, got 'log'"):
        IntegerRule(grad_grid="log")
    with pytest.raises(ValueError, match="power_quantize: x contains NaN or infinity"):
        power_quantize(torch.tensor([[1.0, float("nan")]]), 4)
