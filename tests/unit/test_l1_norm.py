"""L1 normalization in float: worked values, gradients, running statistics, conversion, folding."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from bitstrata.functional.l1norm import l1_normalize
from bitstrata.nn import (
    L1BatchNorm1d,
    L1BatchNorm2d,
    L1LayerNorm,
    QuantizedL1BatchNorm1d,
    QuantizedL1BatchNorm2d,
    l1_batch_norm_from,
)
from bitstrata.nn.l1_norm import L1BatchNorm
from bitstrata.nn.layer_batch_norm import fold

ROOT = math.sqrt(math.pi / 2)


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scalar_gradient(x: list[float], g: list[float], eps: float, factor: float) -> list[float]:
    """dL/dx of one channel for g = dL/dh, term by term."""
    n = len(x)
    mu = sum(x) / n
    spread = factor * sum(abs(v - mu) for v in x) / n + eps
    s = [(v > mu) - (v < mu) for v in x]
    together = sum(a * (v - mu) / spread for a, v in zip(g, x, strict=True)) / n
    return [(g[i] - sum(g) / n - factor * (s[i] - sum(s) / n) * together) / spread for i in range(n)]


def test_worked_example():
    x = double([1, 2, 4, 9]).requires_grad_()
    h, mean, deviation = l1_normalize(x, (0,), eps=0)
    assert (mean.item(), deviation.item()) == (4, 2.5)
    torch.testing.assert_close(h, double([-1.2, -0.8, 0, 2]), rtol=1e-14, atol=0)
    h.backward(double([1, 0, 0, 0]))
    torch.testing.assert_close(x.grad, double([0.21, -0.19, -0.07, 0.05]), rtol=1e-13, atol=0)
    h, mean, deviation = l1_normalize(x, (0,), eps=0, l1_scale="sqrt(pi/2)")
    assert deviation.item() == pytest.approx(2.5 * ROOT, rel=1e-15)
    torch.testing.assert_close(h, double([-0.95746147, -0.63830765, 0, 1.59576912]), rtol=1e-8, atol=0)


@pytest.mark.parametrize("l1_scale", ["1", "sqrt(pi/2)"])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_gradients_are_the_scalar_formula(l1_scale, eps):
    x = double([[1, 2, 4, 9], [0, 0, 0, 0], [-1, 3, 1, 1], [5, 5, 5, 5]]).requires_grad_()  # elements at the mean, too
    g = randn(4, 4)
    h, _, _ = l1_normalize(x, (1,), eps=eps, l1_scale=l1_scale)
    h.backward(g)
    factor = {"1": 1.0, "sqrt(pi/2)": ROOT}[l1_scale]
    want = [scalar_gradient(row, to, eps, factor) for row, to in zip(x.tolist(), g.tolist(), strict=True)]
    torch.testing.assert_close(x.grad, double(want), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("l1_scale", ["1", "sqrt(pi/2)"])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (L1BatchNorm1d, (5, 3)),
        (L1BatchNorm1d, (3, 3, 4)),
        (L1BatchNorm2d, (1, 3, 3, 2)),
        (L1LayerNorm, (4, 3)),
        (lambda _, **options: L1LayerNorm((2, 3), **options), (2, 2, 3)),
    ],
)
def test_gradcheck(norm, shape, l1_scale):
    module = norm(3, eps=1e-3, l1_scale=l1_scale).double()
    x = randn(*shape).mul_(3).requires_grad_()  # away from the kinks, at the means
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(randn(*parameter.shape, seed=1), alpha=0.3)
    inputs = (x, module.weight, module.bias)
    assert torch.autograd.gradcheck(lambda *_: module(x), inputs, eps=1e-6, atol=1e-6, rtol=1e-6)
    module.eval()
    assert torch.autograd.gradcheck(lambda *_: module(x), inputs, eps=1e-6, atol=1e-6, rtol=1e-6)


def test_each_channel_is_normalized_over_batch_and_positions():
    x, norm = randn(4, 3, 5, 2), L1BatchNorm2d(3, eps=0).double()
    with torch.no_grad():
        norm.weight.copy_(double([2, -1, 0]))
        norm.bias.copy_(double([0, 1, 5]))
    y = norm(x)
    for c in range(3):
        centered = x[:, c] - x[:, c].mean()
        want = norm.weight[c] * centered / centered.abs().mean() + norm.bias[c]
        torch.testing.assert_close(y[:, c], want, rtol=1e-12, atol=1e-12)
    flat = L1BatchNorm1d(3, eps=0, affine=False).double()(x.flatten(2))
    torch.testing.assert_close(flat.view_as(x)[:, 0] * 2, y[:, 0].detach(), rtol=1e-12, atol=1e-12)


def test_scale_makes_the_deviation_of_gaussians_their_standard_deviation():
    x = randn(200_000, 1) * 3 + 1
    norm = L1BatchNorm1d(1, momentum=1.0, l1_scale="sqrt(pi/2)").double()
    norm(x)
    assert norm.running_deviation.item() == pytest.approx(3, rel=5e-3)
    plain = L1BatchNorm1d(1, momentum=1.0).double()
    plain(x)
    assert plain.running_deviation.item() * ROOT == pytest.approx(norm.running_deviation.item(), rel=1e-12)


def test_running_statistics():
    norm = L1BatchNorm2d(2, momentum=0.25).double()
    x = double([[1, 2, 4, 9], [0, 0, 4, 4]]).view(1, 2, 2, 2)
    norm(x)
    assert norm.running_mean.tolist() == [1.0, 0.5]
    assert norm.running_deviation.tolist() == [0.75 + 0.625, 0.75 + 0.5]
    assert norm.num_batches_tracked == 1
    y = norm.eval()(x)
    spread = (norm.running_deviation + 1e-5).view(1, 2, 1, 1)
    torch.testing.assert_close(y, (x - norm.running_mean.view(1, 2, 1, 1)) / spread, rtol=1e-14, atol=0)
    assert norm.num_batches_tracked == 1  # evaluation counts nothing
    norm.reset_running_stats()
    assert norm.running_mean.tolist() == [0, 0]
    assert norm.running_deviation.tolist() == [1, 1]
    assert norm.num_batches_tracked == 0


def test_cumulative_average():
    norm = L1BatchNorm1d(3, momentum=None).double()
    batches = [randn(n, 3, seed=n) for n in (4, 7, 5)]
    for x in batches:
        norm(x)
    want = torch.stack([(x - x.mean(0)).abs().mean(0) for x in batches]).mean(0)
    torch.testing.assert_close(norm.running_deviation, want)
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = (randn(8, 4, 5, 5) * 30 + 100).to(dtype)
    half, full = L1BatchNorm2d(4), L1BatchNorm2d(4)
    y = half(x.requires_grad_())
    assert y.dtype == dtype
    assert torch.equal(y, full(x.float()).to(dtype))
    assert torch.equal(half.running_deviation, full.running_deviation)
    y.float().square().sum().backward()
    assert x.grad.dtype == dtype
    layer = L1LayerNorm(5)
    assert torch.equal(layer(x), layer(x.float()).to(dtype))
    assert torch.equal(l1_normalize(x, (0,))[0], l1_normalize(x.float(), (0,))[0].to(dtype))
    converted = L1BatchNorm2d(4).to(dtype)
    converted(x)
    assert torch.equal(converted.running_deviation, full.running_deviation.to(dtype))


def test_memory_formats():
    x = randn(3, 4, 5, 6)
    norm, twin = L1BatchNorm2d(4).double(), L1BatchNorm2d(4).double()
    want = norm(x)
    got = twin(x.to(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    spread_out = torch.stack([x, x], dim=-1)[..., 0]
    assert not spread_out.is_contiguous()
    torch.testing.assert_close(norm(spread_out), want, rtol=1e-12, atol=1e-12)
    layer = L1LayerNorm(3).double()
    torch.testing.assert_close(layer(x.view(3, 4, 10, 3)[:, ::2]), layer(x.view(3, 4, 10, 3))[:, ::2])


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_constant_channels_become_their_bias(eps):
    x = double([[0, 7, 1], [0, 7, 2]]).requires_grad_()
    norm = L1BatchNorm1d(3, eps=eps, momentum=1.0).double()
    with torch.no_grad():
        norm.bias.copy_(double([1, 2, 3]))
    y = norm(x)
    assert y[:, :2].tolist() == [[1, 2], [1, 2]]
    y.backward(randn(2, 3))
    assert torch.isfinite(x.grad).all()
    assert norm.running_deviation.tolist() == [0, 0, 0.5]
    assert norm.eval()(x)[:, :2].tolist() == [[1, 2], [1, 2]]
    layer = L1LayerNorm(4, eps=eps)
    assert layer(torch.zeros(2, 4)).tolist() == [[0] * 4] * 2


def test_not_a_number_is_not_hidden():
    x = randn(4, 2)
    x[1, 0] = math.nan
    assert L1BatchNorm1d(2).double()(x).isnan().all(0).tolist() == [True, False]


def test_batch_of_one_and_too_few_elements():
    assert L1BatchNorm2d(3)(torch.randn(1, 3, 1, 2)).isfinite().all()
    for norm, shape in ((L1BatchNorm2d(3), (1, 3, 1, 1)), (L1BatchNorm1d(3), (1, 3)), (L1BatchNorm1d(3), (0, 3))):
        with pytest.raises(ValueError, match=r"L1BatchNorm.d: training needs more than one element a channel, got sha"):
            norm(torch.zeros(shape))
        assert norm.num_batches_tracked == 0
        assert norm.eval()(torch.zeros(shape)).shape == shape


def test_state_and_copies():
    norm = L1BatchNorm1d(3, momentum=0.5).double()
    norm(randn(4, 3))
    state = norm.state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_deviation", "num_batches_tracked"]
    twin = L1BatchNorm1d(3).double()
    twin.load_state_dict(state)
    x = randn(5, 3, seed=1)
    assert torch.equal(twin.eval()(x), norm.eval()(x))
    copied = copy.deepcopy(norm).train()
    copied(x)
    assert not torch.equal(copied.running_deviation, norm.running_deviation)
    assert torch.equal(norm.running_var, norm.running_deviation.square())
    with pytest.raises(RuntimeError, match="running_var"):
        norm.load_state_dict(nn.BatchNorm1d(3).state_dict())
    copied.reset_parameters()
    assert torch.equal(copied.eval()(x), L1BatchNorm1d(3).double().eval()(x))
    assert repr(norm) == "L1BatchNorm1d(3, eps=1e-05, momentum=0.5, affine=True, l1_scale='1')"
    assert L1BatchNorm1d(2, affine=False).weight is None


def test_layer_norm():
    x = randn(2, 3, 4)
    y = L1LayerNorm((3, 4), eps=0).double()(x)
    for row, out in zip(x, y, strict=True):
        centered = row - row.mean()
        torch.testing.assert_close(out, centered / centered.abs().mean(), rtol=1e-12, atol=1e-12)
    norm = L1LayerNorm(4, bias=False)
    assert norm.bias is None
    assert [k for k, _ in L1LayerNorm(4, elementwise_affine=False).named_parameters()] == []
    assert list(norm.state_dict()) == ["weight"]
    assert repr(norm) == "L1LayerNorm((4,), eps=1e-05, elementwise_affine=True, l1_scale='1')"
    with torch.no_grad():
        norm.weight.fill_(3)
    norm.reset_parameters()
    assert norm.weight.tolist() == [1] * 4


def test_bad_input():
    with pytest.raises(ValueError, match=r"L1BatchNorm2d: input must be \(N, C, H, W\), got shape \(2, 3, 4\)"):
        L1BatchNorm2d(3)(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"L1BatchNorm1d: input must be \(N, C\) or \(N, C, L\), got shape \(3,\)"):
        L1BatchNorm1d(3)(torch.zeros(3))
    with pytest.raises(ValueError, match=r"L1BatchNorm1d: input has 4 channels \(shape .*\), expected num_features=3"):
        L1BatchNorm1d(3)(torch.zeros(2, 4))
    with pytest.raises(TypeError, match=r"L1BatchNorm: use L1BatchNorm1d or L1BatchNorm2d"):
        L1BatchNorm(3)
    with pytest.raises(ValueError, match=r"L1BatchNorm1d: num_features must be at least 1, got 0"):
        L1BatchNorm1d(0)
    with pytest.raises(ValueError, match=r"L1BatchNorm1d: eps must be at least 0, got -1"):
        L1BatchNorm1d(1, eps=-1)
    with pytest.raises(ValueError, match=r"L1BatchNorm1d: momentum must be in 0\.\.1 or None, got 2"):
        L1BatchNorm1d(1, momentum=2)
    for make in (L1BatchNorm1d, L1LayerNorm):
        with pytest.raises(ValueError, match=rf"{make.__name__}: l1_scale must be one of '1', 'sqrt\(pi/2\)', got '2'"):
            make(3, l1_scale="2")
    with pytest.raises(ValueError, match=r"L1LayerNorm: eps must be at least 0, got -1"):
        L1LayerNorm(3, eps=-1)
    for shape in (1, 0, (), (2, 0)):
        with pytest.raises(ValueError, match=r"L1LayerNorm: normalized_shape must hold at least two elements, got \("):
            L1LayerNorm(shape)
    with pytest.raises(ValueError, match=r"L1LayerNorm: input must end in \(3,\), got shape \(3, 4\)"):
        L1LayerNorm(3)(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"l1_normalize: the input has no elements, shape \(0, 3\)"):
        L1LayerNorm(3)(torch.zeros(0, 3))


def batch_norm(affine: bool = True) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(3, eps=1e-3, momentum=0.2, affine=affine).double()
    for seed, tensor in enumerate((norm.running_mean, norm.weight, norm.bias) if affine else (norm.running_mean,)):
        tensor.data.copy_(randn(3, seed=seed))
    norm.running_var.copy_(double([0.5, 2, 1e-6]))
    norm.num_batches_tracked.fill_(7)
    return norm


@pytest.mark.parametrize(
    "options",
    [{"l1_scale": "1"}, {}, {"quantized": True}, {"quantized": True, "l1_scale": "1"}, {"quantized": True, "l2": True}],
)
def test_converted_batch_norm_evaluates_to_the_same(options):
    norm, x = batch_norm(), randn(4, 3, 2, 2)
    made = l1_batch_norm_from(norm.eval(), **options)
    assert type(made) is (QuantizedL1BatchNorm2d if options.get("quantized") else L1BatchNorm2d)
    assert not made.training
    assert (made.momentum, made.num_batches_tracked.item(), made.weight.dtype) == (0.2, 7, torch.float64)
    if options.get("quantized"):
        # the channel of the smallest deviation is clamped or rounded: only the others are near
        error = (made(x) - norm(x))[:, :2].abs().max()
        assert error < 0.1 * norm(x).abs().max()
        assert error > 0
    else:
        torch.testing.assert_close(made(x), norm(x), rtol=1e-10, atol=1e-10)


def test_converted_batch_norm_trains_on_gaussians_as_before():
    norm, x = batch_norm().train(), randn(50_000, 3, 1, 1) * double([1, 3, 2]).view(3, 1, 1)
    torch.testing.assert_close(l1_batch_norm_from(norm)(x), norm(x), rtol=0.02, atol=0.05)
    torch.testing.assert_close(l1_batch_norm_from(norm, l1_scale="1")(x), norm(x), rtol=0.02, atol=0.05)
    frozen = nn.BatchNorm1d(2)
    frozen.weight.requires_grad_(False)
    made = l1_batch_norm_from(frozen)
    assert type(made) is L1BatchNorm1d
    assert (made.weight.requires_grad, made.bias.requires_grad, made.training) == (False, True, True)
    without = batch_norm(affine=False).eval()
    torch.testing.assert_close(l1_batch_norm_from(without)(x), without(x), rtol=1e-10, atol=1e-10)


def test_conversion_errors():
    with pytest.raises(TypeError, match=r"l1_batch_norm_from: norm must be BatchNorm1d or BatchNorm2d, got LayerNorm"):
        l1_batch_norm_from(nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r"l1_batch_norm_from: BatchNorm1d.* has no running statistics; use track_run"):
        l1_batch_norm_from(nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"l2=True is for quantized=True"):
        l1_batch_norm_from(nn.BatchNorm1d(3), l2=True)
    with pytest.raises(ValueError, match=r"l1_scale='1' needs an affine that takes the factor up"):
        l1_batch_norm_from(nn.BatchNorm1d(3, affine=False), l1_scale="1")
    with pytest.raises(ValueError, match=r"l1_scale must be one of '1', 'sqrt\(pi/2\)', got '2'"):
        l1_batch_norm_from(nn.BatchNorm1d(3), l1_scale="2")


@pytest.mark.parametrize("affine", [True, False])
def test_fold_is_the_evaluation(affine):
    norm = L1BatchNorm2d(3, eps=0.1, affine=affine, l1_scale="sqrt(pi/2)").double()
    if affine:
        with torch.no_grad():
            norm.weight.copy_(double([2, -1, 0]))
            norm.bias.copy_(double([1, 0, 3]))
    norm(randn(4, 3, 2, 2))
    gain, shift = fold(norm)
    assert gain.dtype == shift.dtype == torch.float64
    x = randn(2, 3, 4, 4, seed=1)
    got = gain.view(3, 1, 1) * x + shift.view(3, 1, 1)
    torch.testing.assert_close(got, norm.eval()(x), rtol=1e-12, atol=1e-12)


def test_fold_of_a_constant_channel_without_eps():
    norm = L1BatchNorm1d(2, eps=0, momentum=1.0).double()
    norm(double([[3, 1], [3, 5]]))
    gain, shift = fold(norm)
    assert (gain.tolist(), shift.tolist()) == ([1, 0.5], [-3, -1.5])
    x = randn(4, 2)
    torch.testing.assert_close(gain * x + shift, norm.eval()(x), rtol=1e-14, atol=1e-14)


def test_a_fully_quantized_form_does_not_fold():
    text = r"fold: QuantizedL1BatchNorm1d quantizes .* no affine map; freeze_ the model first, or use L1"
    with pytest.raises(TypeError, match=text):
        fold(QuantizedL1BatchNorm1d(3))
