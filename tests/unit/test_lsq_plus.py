"""LSQ+: values, gradients and initial step and offset of activations, and the initial step of weights."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from bitstrata.functional.affine import SAMPLE, affine_codes, affine_fake_quantize, best_affine, sampled
from bitstrata.quantizers import build

GAUSS = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
WORKED = [-0.5, -0.2, 0.1, 0.45, 0.85, 2]  # the worked example: s = 0.4, beta = -0.3, two bits


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def activation(bits: int = 2, step: float | None = None, beta: float = 0.0, **options: object):
    quantizer = build("lsq_plus", "activation", options, bits={bits: bits}).double()
    if step is not None:
        with torch.no_grad():
            quantizer.step.fill_(step)
            quantizer.beta.fill_(beta)
        quantizer.initialized.fill_(True)
    return quantizer


def error(x: Tensor, step: float, beta: float, hi: int) -> float:
    return float((x - ((((x - beta) / step).clamp(0, hi).round()) * step + beta)).square().mean())


def gradients(x: Tensor, step: float, beta: float, hi: int, upstream: Tensor | None = None):
    leaves = [x.clone().requires_grad_(), double(step).requires_grad_(), double(beta).requires_grad_()]
    value = affine_fake_quantize(*leaves, hi)
    value.backward(torch.ones_like(value) if upstream is None else upstream)
    return value.detach(), *[leaf.grad for leaf in leaves]


def test_worked_example():
    x = double(*WORKED)
    value, dx, ds, dbeta = gradients(x, 0.4, -0.3, 3)
    torch.testing.assert_close(value, double(-0.3, -0.3, 0.1, 0.5, 0.9, 0.9), rtol=0, atol=1e-15)
    assert dx.tolist() == [0, 1, 1, 1, 1, 0]
    assert ds.item() == pytest.approx(3.0)
    assert dbeta.item() == 2
    each = [gradients(v.reshape(1), 0.4, -0.3, 3) for v in x]
    assert [e[2].item() for e in each] == pytest.approx([0, -0.25, 0, 0.125, 0.125, 3], abs=1e-12)
    assert [e[3].item() for e in each] == [1, 0, 0, 0, 0, 1]


def scalar(x: float, s: float, beta: float, hi: int) -> tuple[float, float, float, float]:
    """Value and derivatives by x, s and beta of one number, from LSQ+ eqs. 5-8."""
    u = (x - beta) / s
    code = round(min(max(u, 0), hi))  # Python rounds ties to even as well
    inside = 0 <= u <= hi
    return code * s + beta, float(inside), code - u if inside else float(code), float(not inside)


@pytest.mark.parametrize("hi", [1, 3, 15, 255])
@pytest.mark.parametrize(("step", "beta"), [(0.25, -0.5), (0.25, 0.75), (0.125, 0.0)])
def test_against_the_scalar_form(hi, step, beta):
    ties = double(*[k * step / 2 + beta for k in range(-3, 9)], 0.0, hi * step + beta, 99.0)
    x = torch.cat([ties, GAUSS[:100]])
    upstream = GAUSS[200 : 200 + x.numel()]
    value, dx, ds, dbeta = gradients(x, step, beta, hi, upstream)
    expected = double(*[v for row in x.tolist() for v in scalar(row, step, beta, hi)]).view(-1, 4)
    torch.testing.assert_close(value, expected[:, 0], rtol=0, atol=1e-14)
    torch.testing.assert_close(dx, upstream * expected[:, 1], rtol=0, atol=0)
    torch.testing.assert_close(ds, (upstream * expected[:, 2]).sum().reshape(1))
    torch.testing.assert_close(dbeta, (upstream * expected[:, 3]).sum().reshape(1))


def test_against_autograd():
    """beta + s round(clip((x - beta)/s)) with a straight-through rounding, off the bounds."""
    leaves = [GAUSS.clone().requires_grad_(), double(0.31).requires_grad_(), double(-0.4).requires_grad_()]
    x, s, beta = leaves
    u = ((x - beta) / s).clamp(0, 7)
    ((u + (u.round() - u).detach()) * s + beta).square().sum().backward()
    value = gradients(GAUSS, 0.31, -0.4, 7)[0]
    found = gradients(GAUSS, 0.31, -0.4, 7, 2 * value)[1:]
    for leaf, gradient in zip(leaves, found, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_forward_is_the_grid_of_the_codes(bits, dtype):
    quantizer = activation(bits).to(dtype)
    x = GAUSS.view(5, -1).to(dtype)
    value, grid = quantizer(x), quantizer.grid()
    codes = quantizer.codes(x)
    assert torch.equal(value, grid.dequantize(codes))
    assert (grid.lo, grid.hi) == (0, 2**bits - 1)
    assert (int(codes.min()), int(codes.max())) == (grid.lo, grid.hi)
    assert grid.offset.shape == (1,)
    assert grid.offset.item() == pytest.approx((quantizer.beta / quantizer.step).item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_value_once(dtype):
    x, step, beta = GAUSS.to(dtype), torch.tensor([0.1237]), torch.tensor([-0.77])
    exact = (affine_codes(x, step, beta, 15) + beta / step) * step
    assert exact.dtype == torch.float32
    assert torch.equal(affine_fake_quantize(x, step, beta, 15), exact.to(dtype))


def test_memory_layouts():
    x = GAUSS[:240].view(4, 5, 4, 3)
    quantizer = activation(3, 0.3, -0.5)
    twin = x.to(memory_format=torch.channels_last)
    assert torch.equal(quantizer(twin), quantizer(x))


@pytest.mark.parametrize(("numel", "count"), [("sample", 3), ("batch", 12)])
def test_step_and_offset_carry_the_gradient_scale(numel, count):
    quantizer = activation(2, 1.0, 0.0, numel=numel)
    quantizer(torch.full((4, 3), 9.0, dtype=torch.float64)).sum().backward()
    assert quantizer.step.grad.item() == pytest.approx(12 * 3 * (count * 3) ** -0.5)
    assert quantizer.beta.grad.item() == pytest.approx(12 * (count * 3) ** -0.5)


def test_codes_do_not_depend_on_the_sign_of_the_inputs():
    for signed in (False, True):
        quantizer = build("lsq_plus", "activation", {}, bits={1: 1, 3: 3}, signed=signed)
        assert quantizer.bits == {1: 1, 3: 3}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantizer(torch.linspace(-1, 2, 30).view(3, 10))
        assert quantizer.limits() == (0, 7)
        assert float(quantizer.beta.detach()) < -0.5


# ---- initial step and offset


def brute_force(x: Tensor, hi: int) -> float:
    """Least error over a dense grid of ranges, refined twice around the best."""
    low, high = float(x.min()), float(x.max())
    width, centre_a, centre_b = high - low, low, high
    best = math.inf
    for scale in (1.0, 0.1, 0.01):
        found = (best, centre_a, centre_b)
        for i in range(-40, 41):
            for j in range(-40, 41):
                a, b = centre_a + i * width * scale / 40, centre_b + j * width * scale / 40
                if b > a:
                    found = min(found, (error(x, (b - a) / hi, a, hi), a, b))
        best, centre_a, centre_b = found
    return best


@pytest.mark.parametrize("hi", [1, 3, 7])
@pytest.mark.parametrize("shape", ["relu", "normal", "skewed", "far"])
def test_the_search_finds_the_least_error(hi, shape):
    x = GAUSS[:60]
    x = {"relu": x.relu(), "normal": x, "skewed": x.exp(), "far": 1000 + 0.01 * x}[shape]
    step, beta = best_affine(x, hi)
    assert error(x, step, beta, hi) <= 1.05 * brute_force(x, hi)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_the_search_beats_the_range_and_gaussian_grids(bits):
    """On a Gaussian it comes to the symmetric optimal step, and is never worse than the grid of the whole range."""
    hi = 2**bits - 1
    step, beta = best_affine(GAUSS, hi)
    found = error(GAUSS, step, beta, hi)
    span = float(GAUSS.max() - GAUSS.min())
    assert found <= error(GAUSS, span / hi, float(GAUSS.min()), hi)
    for factor in (0.97, 1.03):
        assert found < 1.02 * error(GAUSS, step * factor, beta, hi)


def test_the_search_is_equivariant():
    step, beta = best_affine(GAUSS, 7)
    other = best_affine(3.0 * GAUSS - 11.0, 7)
    assert other == pytest.approx((3 * step, 3 * beta - 11), rel=1e-9)
    assert best_affine(GAUSS[torch.randperm(4000)], 7) == pytest.approx((step, beta), rel=1e-12)


@pytest.mark.parametrize("value", [2.0, -3.0, 1e-12, -1e30])
def test_constant_inputs_are_on_the_grid(value):
    for init in ("mse", "minmax"):
        quantizer = activation(2, init=init)
        x = torch.full((2, 3), value, dtype=torch.float64)
        quantizer(x)
        torch.testing.assert_close(quantizer(x).detach(), x, rtol=1e-6, atol=3e-8)
        assert 0.0 in quantizer.grid().dequantize(torch.arange(4)).tolist()


def test_two_values_are_exact_at_one_bit():
    assert best_affine(double(-1, 4, 4, -1, 4), 1) == pytest.approx((5.0, -1.0))


def test_large_batches_are_sampled_evenly():
    x = torch.arange(1024.0).repeat(300)  # 307 200 elements: rows that repeat
    seen = sampled(x)
    assert SAMPLE / 3 < seen.numel() <= SAMPLE
    assert seen.unique().numel() == 1024
    assert torch.equal(sampled(x[:5000]), x[:5000])
    wide = torch.randn(300_000, generator=torch.Generator().manual_seed(2)).double()
    step, beta = best_affine(wide, 7)
    assert error(wide, step, beta, 7) < 1.01 * error(wide, 0.5860194414434872, -3.5 * 0.5860194414434872, 7)


def test_calibration_keeps_the_widest_solution():
    narrow, wide = GAUSS[:600].view(2, -1), 2 * GAUSS[600:1200].view(2, -1)
    found = []
    for batches in ((narrow, wide), (wide, narrow), (wide,)):
        quantizer = activation(2)
        quantizer.observing = True
        for batch in batches:
            quantizer(batch)
        found.append((quantizer.step.item(), quantizer.beta.item()))
    assert found[0] == found[1] == found[2]
    alone = activation(2)
    alone(narrow)
    assert alone.step.item() < found[0][0]


def test_init_rules():
    x = double(-1.0, 0.0, 0.1, 0.2, 5.0).view(1, -1)
    found = {}
    for rule in ("mse", "minmax", 0.7):
        quantizer = activation(2, init=rule)
        quantizer(x)
        found[rule] = (quantizer.step.item(), quantizer.beta.item())
    assert found["minmax"] == pytest.approx((2.0, -1.0))
    assert found[0.7] == pytest.approx((0.7, 0.0))
    assert found["mse"] != pytest.approx(found["minmax"])
    with pytest.raises(ValueError, match=r"LSQPlusActivation: init must be one of mse, minmax .* got 'lsq'"):
        activation(2, init="lsq")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_are_an_error(bad):
    with pytest.raises(ValueError, match=r"LSQPlusActivation: cannot set the step from a batch of shape \(1, 2\)"):
        activation()(double(0.0, bad).view(1, 2))
    assert bool(torch.isnan(activation(2, 0.4, -0.3)(double(math.nan).view(1, 1))).all())


def test_zero_and_empty_batches():
    quantizer = activation()
    assert quantizer(torch.zeros(2, 3, dtype=torch.float64)).tolist() == [[0, 0, 0]] * 2
    assert quantizer.initialized.tolist() == [False]
    with pytest.raises(ValueError, match=r"batch of shape \(0, 3\)"):
        quantizer(torch.zeros(0, 3, dtype=torch.float64))
    assert activation(2, 0.4).eval()(torch.zeros(0, 3, dtype=torch.float64)).shape == (0, 3)


def test_parameters_belong_to_their_precision():
    quantizer = build("lsq_plus", "activation", {}, bits={1: 1, 4: 4})
    expected = {p: [quantizer.steps[str(p)], quantizer.betas[str(p)]] for p in (1, 4)}
    assert quantizer.precision_parameters() == expected
    shared = build("lsq_plus", "activation", {}, bits={1: 8, 4: 8}, shared=True)
    assert shared.precision_parameters() == {}
    assert shared.state_dict().keys() == {"steps.shared", "betas.shared", "initialized"}
    for p in (1, 4):
        shared.precision = p
        assert shared.beta is shared.betas["shared"]


def test_training_lowers_the_error():
    """Gradient descent on step and offset from a bad start comes near the best grid."""
    quantizer = activation(2, 0.2, 1.0, numel="batch")
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    x = GAUSS.view(1, -1)
    for _ in range(300):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    best = error(GAUSS, *best_affine(GAUSS, 3), 3)
    assert error(GAUSS, quantizer.step.item(), quantizer.beta.item(), 3) < 1.05 * best


# ---- weights


def test_weight_init_of_the_worked_example():
    quantizer = build("lsq_plus", "weight", {}, bits={4: 4}).double()
    quantizer.init_(double(0.3, -0.1, 0.5, -0.7, 0.2, 0))
    assert quantizer.step.item() == pytest.approx(0.16089095, abs=1e-8)


def test_weights_are_those_of_lsq_but_for_the_initial_step():
    w = GAUSS[:36].view(4, 9)
    for channels in (None, 4):
        plus = build("lsq_plus", "weight", {}, bits={3: 3}, channels=channels).double()
        lsq = build("lsq", "weight", {"init": "three_sigma"}, bits={3: 3}, channels=channels).double()
        other = build("lsq", "weight", {}, bits={3: 3}, channels=channels).double()
        for quantizer in (plus, lsq, other):
            quantizer.init_(w)
            quantizer(w).square().sum().backward()
        assert torch.equal(plus(w), lsq(w))
        assert torch.equal(plus.step.grad, lsq.step.grad)
        assert not torch.equal(plus.step, other.step)
    assert isinstance(plus.step, nn.Parameter)


def test_weights_need_one_width_of_two_bits_or_more():
    for bits, cause in (({2: 2, 3: 3}, "one width for all precisions"), ({1: 1}, "undefined at 1 bit")):
        with pytest.raises(ValueError, match=cause):
            build("lsq_plus", "weight", {}, bits=bits)
