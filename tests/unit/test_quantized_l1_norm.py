"""Fully quantized L1 normalization: worked codes, gradients against scalar loops, rounding, degenerate input."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bitstrata.functional.l1norm import (
    nearest,
    quantized_norm,
    quantized_norm_codes,
    stochastic,
    stochastic_rounding,
    symmetric_dynamic,
)
from bitstrata.nn import (
    L1BatchNorm1d,
    L1BatchNorm2d,
    L1LayerNorm,
    QuantizedL1BatchNorm1d,
    QuantizedL1BatchNorm2d,
    QuantizedL1LayerNorm,
)
from bitstrata.nn.l1_norm import QuantizedL1BatchNorm

ROOT = math.sqrt(math.pi / 2)
EXAMPLE = [[0.5, -1, 2, 0.25], [3, 1, -1, 1.6]]


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact(z: Tensor) -> Tensor:
    """No rounding: what the gradient is on average."""
    return z


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_example(dtype):
    x = torch.tensor(EXAMPLE, dtype=dtype)
    gamma, beta = torch.tensor([[1], [0.4]], dtype=dtype), torch.tensor([[0], [0.25]], dtype=dtype)
    out = quantized_norm_codes(x, gamma, beta, (1,), eps=0)
    assert out.x.codes.tolist() == [[21, -42, 85, 11], [127, 42, -42, 68]]
    assert out.mean.codes.tolist() == [[49], [127]]
    assert out.deviation.codes.tolist() == [[89], [127]]
    assert out.normalized.codes.tolist() == [[4, -117, 127, -15], [105, -9, -122, 26]]
    assert out.weight.codes.tolist() == [[127], [51]]
    assert out.bias.codes.tolist() == [[0], [127]]
    steps = [out.x.step, out.mean.step, out.deviation.step, out.normalized.step]
    assert [round(float(s), 8) for s in steps] == [0.02362205, 0.00906752, 0.00906752, 0.01525576]
    torch.testing.assert_close(
        out.batch_deviation.view(-1).double(), double([0.80905512, 1.15157480]), rtol=1e-7, atol=0
    )
    want = [[0.06102305, -1.78492436, 1.93748199, -0.22883646], [0.89326468, 0.19486303, -0.49741230, 0.40928459]]
    torch.testing.assert_close(out.result.double(), double(want), rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-8)
    norm = QuantizedL1BatchNorm1d(2, eps=0, momentum=1.0, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(gamma.view(-1))
        norm.bias.copy_(beta.view(-1))
    assert torch.equal(norm(x.T), out.result.T)
    assert torch.equal(norm.running_mean, out.batch_mean.view(-1))  # as they were before they were quantized
    assert torch.equal(norm.running_deviation, out.batch_deviation.view(-1))


def test_l2_twin_of_the_worked_example():
    x, gamma = double(EXAMPLE), double([[1], [0.4]])
    out = quantized_norm_codes(x, gamma, None, (1,), eps=0.5, l2=True)
    centered = [
        [c * out.x.step - m * out.mean.step for c in row]
        for row, m in zip([[21, -42, 85, 11], [127, 42, -42, 68]], [49, 127], strict=True)
    ]
    want = [math.sqrt(sum(float(v) ** 2 for v in row) / 4) for row in centered]
    assert out.batch_deviation.view(-1).tolist() == pytest.approx(want, rel=1e-14)
    spread = [math.sqrt(v * v + 0.5) for v in want]
    step = max(spread) / 127
    assert out.deviation.codes.view(-1).tolist() == [round(v / step) for v in spread]
    sharp = quantized_norm_codes(x, gamma, None, (1,), eps=0.5)
    assert not torch.equal(out.normalized.value, sharp.normalized.value)


def nearest_code(value: float, step: float, lowest: int = -127) -> int:
    return max(lowest, min(127, round(value / step)))


def scalar_reference(
    x: list[list[float]], gamma: list[float], g: list[list[float]], *, eps: float, factor: float, l2: bool
) -> tuple[list[list[float]], list[float], list[float]]:
    """Gradients of x, gamma and beta with everything rounded to nearest, one number at a time."""

    def quantize(values: list[float], lowest: int = -127) -> list[float]:
        step = max(abs(v) for v in values) / 127
        return [nearest_code(v, step, lowest) * step for v in values]

    rows, n = len(x), len(x[0])
    flat = quantize([v for row in x for v in row])
    xq = [flat[i * n : (i + 1) * n] for i in range(rows)]
    mu = quantize([sum(row) / n for row in xq])
    centered = [[v - mu[i] for v in xq[i]] for i in range(rows)]
    if l2:
        sigma = quantize([math.sqrt(sum(v * v for v in row) / n + eps) for row in centered], 1)
    else:
        sigma = quantize([factor * sum(abs(v) for v in row) / n + eps for row in centered], 1)
    flat = quantize([v / sigma[i] for i in range(rows) for v in centered[i]])
    h = [flat[i * n : (i + 1) * n] for i in range(rows)]
    gamma = quantize(gamma)
    flat = quantize([v for row in g for v in row])
    gq = [flat[i * n : (i + 1) * n] for i in range(rows)]
    dx = []
    for i in range(rows):
        to_h = [v * gamma[i] for v in gq[i]]
        slope = h[i] if l2 else [factor * ((v > 0) - (v < 0)) for v in centered[i]]
        together = sum(a * b for a, b in zip(to_h, h[i], strict=True)) / n
        means = sum(to_h) / n, sum(slope) / n
        dx.append([(to_h[j] - means[0] - (slope[j] - means[1]) * together) / sigma[i] for j in range(n)])
    dgamma = [sum(a * b for a, b in zip(gq[i], h[i], strict=True)) for i in range(rows)]
    return dx, dgamma, [sum(row) for row in gq]


@pytest.mark.parametrize(("l1_scale", "l2"), [("1", False), ("sqrt(pi/2)", False), ("1", True)])
def test_gradients_are_the_scalar_loop(l1_scale, l2):
    x = randn(3, 6).mul_(double([1, 0.01, 3]).view(3, 1)).add_(0.3)  # the middle channel's codes are few
    x[0, 0] = 0
    gamma, g = [1.0, -0.3, 0.01], randn(3, 6, seed=1)
    norm = QuantizedL1BatchNorm1d(3, eps=1e-3, l1_scale=l1_scale, l2=l2, rounding="nearest").double()
    with torch.no_grad():
        norm.weight.copy_(double(gamma))
    leaf = x.T.clone().requires_grad_()
    norm(leaf).backward(g.T)
    dx, dgamma, dbeta = scalar_reference(
        x.tolist(), gamma, g.tolist(), eps=1e-3, factor={"1": 1.0, "sqrt(pi/2)": ROOT}[l1_scale], l2=l2
    )
    torch.testing.assert_close(leaf.grad, double(dx).T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norm.weight.grad, double(dgamma), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norm.bias.grad, double(dbeta), rtol=1e-10, atol=1e-12)
    layer = QuantizedL1LayerNorm(6, eps=1e-3, elementwise_affine=False, l1_scale=l1_scale, l2=l2, rounding=nearest)
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(g)
    dx, _, _ = scalar_reference(
        x.tolist(), [1.0] * 3, g.tolist(), eps=1e-3, factor={"1": 1.0, "sqrt(pi/2)": ROOT}[l1_scale], l2=l2
    )
    torch.testing.assert_close(leaf.grad, double(dx), rtol=1e-10, atol=1e-12)


def test_gradients_come_near_those_in_float_as_bits_allow():
    x, g = randn(4, 3, 5, 5), randn(4, 3, 5, 5, seed=1)
    plain = x.clone().requires_grad_()
    y = L1BatchNorm2d(3).double()(plain)
    y.backward(g)
    errors = []
    for bits in (4, 6, 8):
        leaf = x.clone().requires_grad_()
        out = QuantizedL1BatchNorm2d(3, bits=bits, rounding="nearest").double()(leaf)
        out.backward(g)
        errors.append(((out - y).detach().abs().mean().item(), (leaf.grad - plain.grad).abs().mean().item()))
    for one, two in pairwise(errors):
        assert two[0] < one[0] / 2
        assert two[1] < one[1] / 2
    assert errors[-1][0] < 0.02
    assert errors[-1][1] < 0.02


def test_stochastic_rounding():
    z = double([0.3 / 0.125, 0.3, 2.6]).expand(400_000, 3)
    drawn = stochastic(z, generator())
    assert set(drawn.unique().tolist()) == {0, 1, 2, 3}
    for column, step, mean, var in ((0, 0.125, 0.3, 0.00375), (1, 1, 0.3, 0.21), (2, 1, 2.6, 0.24)):
        values = drawn[:, column] * step
        assert values.mean().item() == pytest.approx(mean, abs=3 * math.sqrt(var / 400_000))
        assert values.var().item() == pytest.approx(var, rel=0.01)
    whole = torch.arange(-127.0, 128).repeat(1000)
    assert torch.equal(stochastic(whole), whole)
    assert torch.equal(stochastic_rounding(generator(3))(z), stochastic(z, generator(3)))
    assert not torch.equal(stochastic(z, generator(3)), stochastic(z, generator(4)))


@pytest.mark.parametrize("l2", [False, True])
def test_gradients_are_unbiased(l2):
    x, g = randn(2, 5), randn(2, 5, seed=1)
    gamma, beta = double([[1], [0.4]]), double([[0], [0.25]])
    draws = stochastic_rounding(generator())

    def gradients(rounding) -> Tensor:
        leaves = [t.clone().requires_grad_() for t in (x, gamma, beta)]
        y, _, _ = quantized_norm(*leaves, (1,), bits=4, l2=l2, rounding=rounding)
        y.backward(g)
        return torch.cat([leaf.grad.flatten() for leaf in leaves])

    samples = torch.stack([gradients(draws) for _ in range(3000)])
    want = gradients(exact)
    error = samples.std(0) / math.sqrt(len(samples))
    assert (error > 0).all()
    assert ((samples.mean(0) - want).abs() < 3 * error).all()
    assert ((gradients(nearest) - want).abs() > 6 * error).any()  # which rounding to nearest is not


def test_default_draws_are_torchs():
    x, g = randn(8, 3), randn(8, 3, seed=1)

    def gradient(norm: torch.nn.Module) -> Tensor:
        leaf = x.clone().requires_grad_()
        norm(leaf).backward(g)
        return leaf.grad

    torch.manual_seed(1)
    one = gradient(QuantizedL1BatchNorm1d(3, bits=4).double())
    other = gradient(QuantizedL1BatchNorm1d(3, bits=4).double())
    torch.manual_seed(1)
    assert torch.equal(gradient(QuantizedL1BatchNorm1d(3, bits=4).double()), one)
    assert not torch.equal(one, other)
    own = QuantizedL1BatchNorm1d(3, bits=4, rounding=stochastic_rounding(generator(5))).double()
    copied, reread = copy.deepcopy(own), pickle.loads(pickle.dumps(own))
    want = gradient(own)
    assert torch.equal(gradient(copied), want)  # a copy goes on with the same draws
    assert torch.equal(gradient(reread), want)
    nearest_one = QuantizedL1BatchNorm1d(3, bits=4, rounding="nearest").double()
    assert torch.equal(gradient(nearest_one), gradient(nearest_one))


@pytest.mark.parametrize("l2", [False, True])
def test_evaluation_quantizes_the_running_statistics(l2):
    norm = QuantizedL1BatchNorm1d(3, eps=0.01, momentum=1.0, l2=l2, rounding="nearest").double()
    norm(randn(8, 3))
    mean, deviation, x = norm.running_mean.clone(), norm.running_deviation.clone(), randn(4, 3, seed=1) * 2
    norm.eval()
    leaf = x.clone().requires_grad_()
    y = norm(leaf)
    spread = (deviation.square() + 0.01).sqrt() if l2 else deviation + 0.01
    sigma = symmetric_dynamic(spread).value
    want = symmetric_dynamic((symmetric_dynamic(x).value - symmetric_dynamic(mean).value) / sigma).value
    torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-13)
    assert torch.equal(norm.running_mean, mean)
    assert torch.equal(norm.running_deviation, deviation)
    g = randn(4, 3, seed=2)
    y.backward(g)
    torch.testing.assert_close(leaf.grad, symmetric_dynamic(g).value / sigma, rtol=1e-12, atol=0)  # statistics fixed
    torch.testing.assert_close(norm.weight.grad, (symmetric_dynamic(g).value * want).sum(0), rtol=1e-12, atol=1e-12)


def test_running_statistics_move_as_in_float():
    norm = QuantizedL1BatchNorm2d(2, momentum=None, rounding="nearest").double()
    batches = [randn(3, 2, 4, 4, seed=s) for s in range(3)]
    seen = []
    for x in batches:
        norm(x)
        out = quantized_norm_codes(x, None, None, (0, 2, 3))
        seen.append((out.batch_mean.flatten(), out.batch_deviation.flatten()))
    torch.testing.assert_close(norm.running_mean, torch.stack([m for m, _ in seen]).mean(0))
    torch.testing.assert_close(norm.running_deviation, torch.stack([d for _, d in seen]).mean(0))


def test_options_change_the_result():
    x = randn(16, 3)
    plain = QuantizedL1BatchNorm1d(3).double()(x)
    for options in ({"bits": 6}, {"l2": True}, {"l1_scale": "sqrt(pi/2)"}, {"eps": 0.1}):
        assert not torch.equal(QuantizedL1BatchNorm1d(3, **options).double()(x), plain)
        ours, theirs = QuantizedL1LayerNorm(3).double(), QuantizedL1LayerNorm(3, **options).double()
        assert not torch.equal(ours(x), theirs(x))
    bare = QuantizedL1BatchNorm1d(3, affine=False).double()
    assert torch.equal(bare(x), quantized_norm_codes(x, None, None, (0,)).normalized.value)
    assert bare.weight is None


def test_a_deviation_rounded_to_zero_counts_as_one_step():
    x = randn(2, 6) * double([[1], [1e-4]])
    out = quantized_norm_codes(x, None, None, (1,), eps=0)
    assert out.deviation.codes.tolist() == [[127], [1]]
    assert out.result.isfinite().all()


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("value", [0.0, 3.3, -1e-30])
def test_zero_and_constant_input(eps, l2, value):
    for channels in ([value, value], [value, None]):  # None: a channel of ordinary numbers
        x = torch.stack([randn(5) if v is None else double([v] * 5) for v in channels], dim=1).float().requires_grad_()
        norm = QuantizedL1BatchNorm1d(2, eps=eps, l2=l2)
        y = norm(x)
        assert y.isfinite().all()
        y.backward(torch.randn(5, 2))
        assert x.grad.isfinite().all()
        assert norm.eval()(x).isfinite().all()
        if value == 0:
            assert y[:, 0].eq(0).all()
    x = torch.zeros(4, 2, requires_grad=True)
    norm = QuantizedL1BatchNorm1d(2, eps=eps, l2=l2)
    norm(x).backward(torch.zeros(4, 2))
    assert x.grad.eq(0).all()
    assert norm.weight.grad.eq(0).all()
    assert norm(torch.zeros(4, 2)).eq(0).all()
    assert QuantizedL1LayerNorm(3, eps=eps, l2=l2)(torch.zeros(2, 3)).eq(0).all()


def test_not_a_number_is_not_hidden():
    for bad in (math.nan, math.inf):
        x = randn(4, 2)
        x[1, 0] = bad
        leaf = x.requires_grad_()
        y = QuantizedL1BatchNorm1d(2).double()(leaf)
        assert y.isnan().any()
        y.backward(torch.ones_like(y))
        assert leaf.grad.isnan().any()
    leaf = randn(4, 2).requires_grad_()
    QuantizedL1BatchNorm1d(2).double()(leaf).backward(torch.full((4, 2), math.nan, dtype=torch.float64))
    assert leaf.grad.isnan().all()


def test_shapes_and_memory_formats():
    x, g = randn(1, 3, 2, 4), randn(1, 3, 2, 4, seed=1)
    norm = QuantizedL1BatchNorm2d(3, rounding="nearest").double()
    results = []
    formats = (x, x.to(memory_format=torch.channels_last), torch.stack([x, x], dim=-1)[..., 1])
    for given in formats:  # a batch of one, too
        leaf = given.detach().requires_grad_()
        y = norm(leaf)
        y.backward(g)
        results.append((y.detach(), leaf.grad))
    for y, grad in results[1:]:
        torch.testing.assert_close(y, results[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-12, atol=1e-12)
    flat = QuantizedL1BatchNorm1d(3).double()(x.flatten(2))
    torch.testing.assert_close(flat.view_as(x), results[0][0], rtol=1e-12, atol=1e-12)
    columns = x.permute(0, 2, 3, 1).reshape(-1, 3)
    torch.testing.assert_close(QuantizedL1BatchNorm1d(3).double()(columns).T.reshape(3, 2, 4), flat.view(3, 2, 4))
    layer = QuantizedL1LayerNorm((2, 4)).double()(x[0])  # statistics a row of the very same tensor
    torch.testing.assert_close(layer, flat.view(3, 2, 4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = (randn(8, 4) * 30 + 100).to(dtype).requires_grad_()
    half, full = QuantizedL1BatchNorm1d(4, rounding="nearest"), QuantizedL1BatchNorm1d(4, rounding="nearest")
    y = half(x)
    assert y.dtype == dtype
    assert torch.equal(y, full(x.float()).to(dtype))
    assert torch.equal(half.running_deviation, full.running_deviation)
    y.sum().backward()
    assert x.grad.dtype == dtype
    layer = QuantizedL1LayerNorm(4)
    assert torch.equal(layer(x), layer(x.float()).to(dtype))
    assert torch.equal(quantized_norm(x, None, None, (1,))[0], layer(x))


def test_state_and_copies():
    norm = QuantizedL1BatchNorm1d(3, l2=True, bits=6).double()
    norm(randn(5, 3))
    plain = L1BatchNorm1d(3).double()
    plain.load_state_dict(norm.state_dict())  # the two forms have the same state
    assert torch.equal(plain.running_deviation, norm.running_deviation)
    x = randn(5, 3, seed=1)
    assert torch.equal(copy.deepcopy(norm).eval()(x), norm.eval()(x))
    assert repr(norm).endswith("l1_scale='1', bits=6, l2=True)")
    layer = QuantizedL1LayerNorm(3)
    L1LayerNorm(3).load_state_dict(layer.state_dict())
    assert repr(layer).endswith("l1_scale='1', bits=8)")
    biasless = QuantizedL1LayerNorm(3, bias=False)
    biasless(x.float()).sum().backward()
    assert (biasless.bias, biasless.weight.grad.shape) == (None, (3,))


def test_bad_input():
    with pytest.raises(ValueError, match=r"QuantizedL1BatchNorm2d: input must be \(N, C, H, W\), got shape \(2, 3\)"):
        QuantizedL1BatchNorm2d(3)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"QuantizedL1BatchNorm1d: training needs more than one element a channel"):
        QuantizedL1BatchNorm1d(3)(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"quantized_norm_codes: the input has no elements, shape \(0, 3\)"):
        QuantizedL1BatchNorm1d(3).eval()(torch.zeros(0, 3))
    with pytest.raises(TypeError, match=r"QuantizedL1BatchNorm: use QuantizedL1BatchNorm1d or QuantizedL1BatchNorm2d"):
        QuantizedL1BatchNorm(3)
    for make in (QuantizedL1BatchNorm1d, QuantizedL1LayerNorm):
        name = make.__name__
        with pytest.raises(ValueError, match=rf"{name}: bits must be 2\.\.8, got 9"):
            make(3, bits=9)
        with pytest.raises(ValueError, match=rf"{name}: rounding must be 'stochastic', 'nearest' or .*, got 'up'"):
            make(3, rounding="up")
        with pytest.raises(
            ValueError, match=rf"{name}: l1_scale is for the mean absolute .*with l2=True it must be '1'"
        ):
            make(3, l2=True, l1_scale="sqrt(pi/2)")
    with pytest.raises(ValueError, match=r"symmetric_dynamic: bits must be 2\.\.8, got 1"):
        quantized_norm(torch.ones(2, 2), None, None, (0,), bits=1)
    with pytest.raises(ValueError, match=r"l1_scale must be one of '1', 'sqrt\(pi/2\)', got 'pi'"):
        quantized_norm(torch.ones(2, 2), None, None, (0,), l1_scale="pi")
