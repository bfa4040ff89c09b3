"""The variance of stochastic rounding on the steps of ShiftQuant and its peers, and the optimal groups."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from bitstrata.integer import (
    CounterGenerator,
    affine_quantize,
    channel_quantize,
    channel_steps,
    conv_input_grad,
    conv_weight_grad,
    group_exponents,
    grouping_cost,
    hadamard_quantize,
    linear_input_grad,
    linear_weight_grad,
    optimal_groups,
    quantization_variance,
    shift_quantize,
    tensor_quantize,
    variance_bounds,
    weight_codes,
)

DRAWS = 12_000


def gauss(*shape: int, seed: int = 0, spread: float = 6.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    scales = torch.exp2(-spread * torch.rand(shape[1], generator=generator))
    return x * scales.reshape([-1 if d == 1 else 1 for d in range(len(shape))])


def test_bound_on_random_ranges():
    generator = torch.Generator().manual_seed(0)
    for trial in range(2000):
        channels = int(torch.randint(2, 200, (1,), generator=generator))
        if trial % 2:
            ranges = torch.exp2(13 * torch.rand(channels, generator=generator, dtype=torch.float64) - 10)
        else:
            ranges = torch.randn(channels, generator=generator, dtype=torch.float64).abs() + 1e-6
        bounds = variance_bounds(ranges, 4, trial % 8 + 1)
        assert bounds.fine * (1 - 1e-12) <= bounds.shift <= bounds.limit * (1 + 1e-12)
        assert bounds.shift <= bounds.coarse * (1 + 1e-12)


@pytest.mark.parametrize("groups", range(1, 9))
def test_bound_for_every_number_of_groups(groups):
    ranges = gauss(1, 50, seed=groups, spread=10)[0].abs()
    bounds = variance_bounds(ranges, 4, groups, count=12)
    steps = channel_steps(ranges[None], "shift", groups=groups)
    assert bounds.shift == pytest.approx(3 * float(steps.square().sum()), rel=1e-6)
    assert bounds.fine == pytest.approx(3 * float((ranges.double() / 7).square().sum()))
    assert bounds.coarse == pytest.approx(3 * 50 * (float(ranges.max()) / 7) ** 2)
    assert bounds.limit == 4 * bounds.fine + 4.0 ** (1 - groups) * bounds.coarse
    if groups == 1:
        assert bounds.shift == bounds.coarse
    else:
        assert bounds.shift < variance_bounds(ranges, 4, groups - 1, count=12).shift


def brute_force(ranges: list[float], groups: int, power: int) -> float:
    """The least cost over every assignment of channels to groups."""
    best = math.inf
    for assignment in itertools.product(range(groups), repeat=len(ranges)):
        taus = [max((r for r, a in zip(ranges, assignment, strict=True) if a == g), default=0) for g in range(groups)]
        cost = sum(taus[a] / r if power == 1 else taus[a] ** 2 for r, a in zip(ranges, assignment, strict=True))
        best = min(best, cost)
    return best


@pytest.mark.parametrize("objective", ["ratio", "variance"])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_optimal_groups_against_every_assignment(groups, objective):
    for seed in range(3):
        ranges = gauss(1, 6, seed=seed, spread=4)[0].abs().double() + 0.01
        best = optimal_groups(ranges, groups, objective)
        assert best.cost == pytest.approx(brute_force(ranges.tolist(), groups, 1 if objective == "ratio" else 2))
        for g, tau in enumerate(best.thresholds):
            assert float(ranges[best.index == g].max()) == float(tau)


@pytest.mark.parametrize("objective", ["ratio", "variance"])
def test_power_of_two_groups_are_never_better_than_optimal(objective):
    for seed in range(20):
        ranges = gauss(1, 40, seed=seed, spread=(seed % 4) * 4.0)[0].abs()
        for groups in range(1, 9):
            taus = ranges.max() * torch.exp2(-group_exponents(ranges, groups).float())
            cost = grouping_cost(ranges, taus, objective)
            assert optimal_groups(ranges, groups, objective).cost <= cost * (1 + 1e-12)
            if groups == 1:
                assert optimal_groups(ranges, 1, objective).cost == pytest.approx(cost)


def test_optimal_groups_of_special_ranges():
    equal = optimal_groups(torch.full((5,), 3.0), 4)
    assert equal.cost == 5
    few = optimal_groups(torch.tensor([0.5, 0.0, 2.0]), 8)
    assert (few.cost, few.thresholds.tolist(), few.index.tolist()) == (2, [2, 0.5], [1, 1, 0])
    none = optimal_groups(torch.zeros(3), 4)
    assert (none.cost, none.thresholds.tolist(), none.index.tolist()) == (0, [0], [0, 0, 0])
    worked = optimal_groups(torch.tensor([8.0, 7, 1, 0.9]), 2)
    assert (worked.index.tolist(), worked.thresholds.tolist()) == ([0, 0, 1, 1], [8, 1])
    assert worked.cost == pytest.approx(1 + 8 / 7 + 1 + 1 / 0.9)


@pytest.mark.parametrize(
    ("x", "ranges", "expected"),
    [(0.3, 0.875, 0.00375), (0.3, 7, 0.21), (2.6, 7, 0.24), (6.5, 7, 0.25), (-6.5, 7, 0.25)],
)
def test_variance_of_one_number(x, ranges, expected):
    """Beside a number that sets the step to 1/8 or 1 and is itself exact."""
    assert quantization_variance(torch.tensor([[x, ranges]]), "tensor") == pytest.approx(expected, rel=1e-6)


def dequantized(x: Tensor, quantizer: str, draw: CounterGenerator) -> Tensor:
    options = {"rounding": "stochastic", "generator": draw}
    if quantizer == "shift":
        return shift_quantize(x, 4, **options).dequantize()
    if quantizer == "tensor":
        return tensor_quantize(x, 4, **options).dequantize()
    if quantizer == "channel":
        return channel_quantize(x, 4, 1, **options).dequantize()
    return hadamard_quantize(x, 4, 1, **options).dequantize()


@pytest.mark.parametrize("quantizer", ["shift", "tensor", "channel", "hadamard"])
def test_exact_variance_is_the_measured_squared_error(quantizer):
    x, draws, generator = gauss(64, 24), 60, CounterGenerator(7)
    errors = torch.stack([(dequantized(x, quantizer, generator) - x).double().square().sum() for _ in range(draws)])
    expected = quantization_variance(x, quantizer)
    assert abs(float(errors.mean()) - expected) < 3 * float(errors.std()) / math.sqrt(draws)
    assert float(errors.std()) / math.sqrt(draws) < 0.02 * expected


@pytest.mark.parametrize("per", ["tensor", "sample"])
def test_affine_rounding_is_unbiased(per):
    x, draws = gauss(3, 7), 4000
    q = affine_quantize(stacked(x, draws), 4, per, rounding="stochastic", generator=CounterGenerator(1))
    mean = q.dequantize(torch.float64).reshape(draws, 3, 7).mean(0)
    scale, zero = (t.double()[:3] if per == "sample" else t.double() for t in (q.scale, q.zero))
    z = ((x - zero) / scale).clamp(0, 15)
    f = z - z.floor()
    check_unbiased(mean, x.double(), scale.square() * f * (1 - f), draws)


def test_channels_of_differing_ranges_rank_the_quantizers():
    x = gauss(256, 64, spread=8)
    v = {q: quantization_variance(x, q) for q in ("shift", "tensor", "channel", "optimal")}
    assert v["channel"] < v["optimal"] < v["tensor"]
    assert v["channel"] < v["shift"] < 0.25 * v["tensor"]
    counts = [quantization_variance(x, groups=n) for n in range(1, 9)]
    assert counts[0] == v["tensor"]
    assert counts == sorted(counts, reverse=True)
    bounds = variance_bounds(x.abs().amax(0), 4, 4, count=256)
    assert v["shift"] < bounds.shift <= bounds.limit


def test_optimal_steps_bound_the_variance_at_least_as_well():
    for seed in range(10):
        x = gauss(8, 40, seed=seed, spread=seed)
        for groups in (1, 2, 4, 8):
            shift, optimal = (channel_steps(x, q, groups=groups).square().sum() for q in ("shift", "optimal"))
            assert float(optimal) <= float(shift) * (1 + 1e-6)
            assert bool((channel_steps(x, "optimal", groups=groups) >= channel_steps(x, "channel") * (1 - 1e-6)).all())


def test_variance_along_any_axis_and_of_zeros():
    x = gauss(5, 6, 7)
    for quantizer in ("shift", "tensor", "channel", "optimal", "hadamard"):
        moved = quantization_variance(x.movedim(1, 2), quantizer, axis=-1)
        assert moved == pytest.approx(quantization_variance(x, quantizer))
        assert quantization_variance(torch.zeros(3, 4), quantizer) == 0


def stacked(g: Tensor, draws: int) -> Tensor:
    """The gradient `draws` times over along the first axis: the steps of one, uniforms of its own for each copy."""
    return g.repeat(draws, *[1] * (g.dim() - 1))


def check_unbiased(mean: Tensor, exact: Tensor, variance: Tensor, draws: int) -> None:
    """Every element within 4.5 of its own standard errors, all but one or 3 % within 3, of the size predicted."""
    z = ((mean - exact) / (variance / draws).sqrt().clamp_min(1e-30))[variance > 1e-12 * variance.max()]
    assert z.numel() >= 10
    assert float(z.abs().max()) < 4.5
    assert int((z.abs() >= 3).sum()) <= max(1, 0.03 * z.numel())
    assert 0.6 < float(z.square().mean().sqrt()) < 1.4


def element_variance(g: Tensor) -> Tensor:
    steps = channel_steps(g).reshape([-1 if d == 1 else 1 for d in range(g.dim())])
    f = g.double() / steps - (g.double() / steps).floor()
    return steps.square() * f * (1 - f)


def test_linear_gradients_are_unbiased():
    g, x, w = gauss(6, 5, seed=1), shift_quantize(gauss(6, 8), 4), weight_codes(gauss(5, 8, seed=2), 4, "in")
    q = shift_quantize(stacked(g, DRAWS), 4, rounding="stochastic", generator=CounterGenerator(11))
    double = torch.float64
    wd, xd, v = w.dequantize(double), x.dequantize(double), element_variance(g)
    gx = linear_input_grad(q, w, form="float64", dtype=double).reshape(DRAWS, 6, 8).mean(0)
    check_unbiased(gx, g.double() @ wd, v @ wd.square(), DRAWS)
    copies = shift_quantize(stacked(x.dequantize(), DRAWS), 4)
    assert torch.allclose(copies.dequantize(), stacked(x.dequantize(), DRAWS), rtol=1e-6)
    gw = linear_weight_grad(q, copies, dtype=double) / DRAWS
    check_unbiased(gw, g.double().T @ xd, v.T @ xd.square(), DRAWS)


def test_convolution_gradients_are_unbiased():
    draws = 10_000
    g, x, w = gauss(1, 4, 3, 3, seed=1), shift_quantize(gauss(1, 3, 5, 5), 4), weight_codes(gauss(4, 3, 3, 3), 4, "in")
    q = shift_quantize(stacked(g, draws), 4, rounding="stochastic", generator=CounterGenerator(5))
    double = torch.float64
    wd, xd, v = w.dequantize(double), x.dequantize(double), element_variance(g)
    transposed = torch.nn.functional.conv_transpose2d
    gx = conv_input_grad(q, w, (5, 5), form="float64", dtype=double).mean(0, keepdim=True)
    check_unbiased(gx, transposed(g.double(), wd), transposed(v, wd.square()), draws)
    copies = shift_quantize(stacked(x.dequantize(), draws), 4)
    gw = conv_weight_grad(q, copies, (3, 3), dtype=double) / draws
    correlate = torch.nn.functional.conv2d
    exact, variance = (
        correlate(a.transpose(0, 1), b.transpose(0, 1)).transpose(0, 1) for a, b in ((xd, g.double()), (xd.square(), v))
    )
    check_unbiased(gw, exact, variance, draws)


def test_nearest_rounding_of_gradients_is_biased():
    """What stochastic rounding is for: the error of nearest rounding does not average out."""
    g, w = gauss(6, 5, seed=1), weight_codes(gauss(5, 8, seed=2), 4, "in")
    exact = g.double() @ w.dequantize(torch.float64)
    error = linear_input_grad(shift_quantize(g, 4), w, dtype=torch.float64) - exact
    v = element_variance(g) @ w.dequantize(torch.float64).square()
    assert float((error / (v / DRAWS).sqrt()).abs().median()) > 10


def test_errors():
    with pytest.raises(ValueError, match="quantizer must be one of shift, tensor, channel, optimal, hadamard, got 'x'"):
        quantization_variance(torch.ones(2, 2), "x")
    with pytest.raises(ValueError, match=r"channel_steps: bits must be an integer in 2\.\.8, got 1"):
        quantization_variance(torch.ones(2, 2), bits=1)
    with pytest.raises(ValueError, match=r"channel_steps: groups must be an integer in 1\.\.8, got 9"):
        channel_steps(torch.ones(2, 2), "tensor", groups=9)
    with pytest.raises(ValueError, match="axis 2 is out of range"):
        quantization_variance(torch.ones(2, 2), axis=2)
    with pytest.raises(ValueError, match="x contains NaN or infinity"):
        quantization_variance(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match=r"variance_bounds: bits must be an integer in 2\.\.8, got 9"):
        variance_bounds(torch.ones(2), 9)
