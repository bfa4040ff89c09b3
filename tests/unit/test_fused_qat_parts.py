"""The parts of a fused quantization-aware step: exact sums, passes of the engine, what it leaves to the model."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitstrata as bs
from bitstrata.fused.qat_values import as_real
from bitstrata_runtime import _engine

CHANNELS = (1, 5, 16, 67)


def chain(inputs: int = 3) -> nn.Module:
    """All convolutions of it can be fused."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(inputs, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    x = torch.randn(4, inputs, 8, 8)
    return bs.calibrate_(bs.quantize_(nn.Sequential(*layers, nn.Linear(6, 3)), bs.recipes.lsq(4), x), [x]).train()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("layout", [(5, 1, 3, 1), (16, 2, 3, 2), (18, 1, 1, 1)])
def test_sums_and_their_moments_are_exact(wide, is_signed, layout):
    channels, groups, kernel, stride = layout
    rng = np.random.default_rng(7)
    lo, hi = (-128, 127) if is_signed else (0, 255)
    x = rng.integers(lo, hi + 1, (3, 9, 7, channels)).astype(np.int8 if is_signed else np.uint8)
    out = 2 * groups + groups
    integers = rng.integers(-256 if wide else -128, 256 if wide else 128, (out, channels // groups, kernel, kernel))
    high = (integers >> 1 if wide else integers).astype(np.int8)
    low = (integers & 1).astype(np.int8) if wide else None
    pad = kernel // 2
    maps = torch.from_numpy(x.astype(np.float64)).permute(0, 3, 1, 2)
    exact = F.conv2d(maps, torch.from_numpy(integers.astype(np.float64)), None, stride, pad, 1, groups)
    exact = exact.permute(0, 2, 3, 1).numpy().astype(np.int64)
    rows = exact.reshape(-1, out)
    for isa in _engine.available_isas():
        for threads in (1, 3):
            sums = np.empty(exact.shape, np.int32)
            arguments = ((stride, stride), (1, 1), (pad, pad), groups)
            fits, (mean, variance) = _engine.qat_convolution(
                x, (lo, hi), high, low, *arguments, sums, True, isa, threads
            )
            assert (sums == exact).all()
            short = np.empty(exact.shape, np.int16)
            assert fits == _engine.qat_convolution(x, (lo, hi), high, low, *arguments, short, False, isa, threads)[0]
            assert fits == bool((rows >= -(2**15)).all() and (rows < 2**15).all())
            assert not fits or (short == exact).all()
            for c in range(out):
                column = [int(v) for v in rows[:, c]]
                average = Fraction(sum(column), len(column))
                spread = Fraction(sum(v * v for v in column), len(column)) - average**2
                assert mean[c] == float(average)
                assert abs(variance[c] - float(spread)) <= 1e-14 * float(spread)


def test_sums_that_may_overflow_are_refused():
    x, w = np.zeros((1, 1, 1, 9000), np.uint8), np.full((1, 9000, 1, 1), -128, np.int8)
    with pytest.raises(ValueError, match=r"qat_convolution.*sums may reach 293760000, at most 268435456"):
        _engine.qat_convolution(
            x, (0, 255), w, None, (1, 1), (1, 1), (0, 0), 1, np.empty((1, 1, 1, 1), np.int32), True, "", 1
        )


def numbers(dtype: Any, rows: int, channels: int, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    if dtype in (np.int16, np.int32):
        return rng.integers(-90, 90, (rows, channels)).astype(dtype)
    values = torch.from_numpy(rng.normal(0, 30, (rows, channels)).astype(np.float32))
    return values.numpy() if dtype == np.float32 else values.bfloat16().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("real", [np.float32, np.uint16])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.uint16])
@pytest.mark.parametrize("channels", CHANNELS)
def test_passes_against_their_formulas(real, dtype, channels):
    """Forward and backward, for all instruction sets to the bit, and against the formulas in float64."""
    rows, step, lo, hi = 700, 3.0, 0.0, 15.0
    x, g, add = numbers(dtype, rows, channels), numbers(real, rows, channels, 1), numbers(real, rows, channels, 2)
    rng = np.random.default_rng(5)
    scale, offset = (rng.normal(0.3, 0.5, channels).astype(np.float32) for _ in range(2))
    center = rng.normal(0, 1, channels).astype(np.float32)
    line = rng.normal(0, 1, (4, channels)).astype(np.float32)
    rule, tiny = (lo, hi, lo, hi, 1.0), float(np.finfo(np.float32).tiny)
    found: list[list[Any]] = []
    for isa in _engine.available_isas():
        for threads in (1, 3):
            codes, values, passed, gradient = (np.empty((rows, channels), t) for t in (np.uint8, real, real, real))
            _engine.qat_codes(x, scale / step, offset / step, True, (lo, hi), codes, isa, threads)
            numbers_of = np.empty((rows, channels), real)
            _engine.qat_code_values(x, scale / step, offset / step, True, (lo, hi), numbers_of, isa, threads)
            _engine.qat_values(x, scale, offset, True, add, values, isa, threads)
            a = (x, scale / step, offset / step, True, rule, tiny, g, add)
            sums = _engine.qat_gradient_sums(*a, center, isa, threads)
            _engine.qat_gradient(*a, line, gradient, isa, threads)
            total = _engine.qat_pass(*a, passed, isa, threads)
            found.append([codes, numbers_of, values, passed, gradient, *sums, total])
    for other in found[1:]:
        assert all(np.array_equal(p, q) for p, q in zip(found[0], other, strict=True))
    codes, numbers_of, values, passed, gradient, total_g, moment, by_sums, by_pass = found[0]
    element, g64, add64 = (t.double().numpy() if isinstance(t, torch.Tensor) else t for t in map(wide, (x, g, add)))
    u = (element * scale + offset) / step
    clipped = np.maximum(u, 0)
    rounded = np.clip(np.rint(clipped), lo, hi)
    sure = np.abs(clipped - np.floor(clipped) - 0.5) > 1e-4
    assert (codes == rounded)[sure].all()
    assert (wide(numbers_of) == codes).all()
    inside = clipped <= hi
    kept = np.where(u > 0, np.where(inside, g64, 0) + add64, 0)
    tolerance = 1e-6 if real == np.float32 else 2**-8
    near = lambda p, q: np.abs(p - q).max() <= tolerance * max(np.abs(q).max(), 1)  # noqa: E731
    assert near(wide(values), np.maximum(u * step + add64, 0))
    assert near(wide(passed), kept)
    assert near(wide(gradient), kept * line[0] + (element - line[3]) * line[2] + line[1])
    assert np.allclose(total_g, kept.sum(0), rtol=1e-4, atol=1e-2)
    assert np.allclose(moment, (kept * (element - center)).sum(0), rtol=1e-4, atol=1)
    terms = g64 * np.where(inside, codes - clipped, codes)
    assert abs(by_sums - terms.sum()) <= 1e-5 * np.abs(terms).sum()
    assert abs(by_pass - by_sums) <= 1e-6 * np.abs(terms).sum()


def wide(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.dtype == np.uint16:
        return as_real(array).double().numpy()
    return array.astype(np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize(("kernel", "stride", "pad"), [((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 2), (0, 1))])
def test_pooling_is_torchs(dtype, kernel, stride, pad):
    x = numbers(dtype, 2 * 7 * 9, 5) // (1 if dtype == np.int32 else 10)  # with equal elements
    one, zero = np.ones(5, np.float32), np.zeros(5, np.float32)
    maps = torch.from_numpy(x.astype(np.float32)).view(2, 7, 9, 5).permute(0, 3, 1, 2).relu().requires_grad_()
    wanted = F.max_pool2d(maps, kernel, stride, pad)
    gradient = torch.randn_like(wanted)
    wanted.backward(gradient)
    n, c, h, w = wanted.shape
    out, places = np.empty((n, h, w, c), np.float32), np.empty((n, h, w, c), np.uint8)
    window = ((7, 9), kernel, stride, pad)
    _engine.qat_max_pool(x, one, zero, True, window, out, places, "", 2)
    assert np.array_equal(out, wanted.detach().permute(0, 2, 3, 1).numpy())
    back = np.empty_like(x, np.float32)
    _engine.qat_max_pool_gradient(gradient.permute(0, 2, 3, 1).contiguous().numpy(), places, window, back, "", 2)
    assert np.allclose(back, maps.grad.permute(0, 2, 3, 1).reshape(-1, 5).numpy(), atol=1e-6)


def test_pooled_networks_give_the_models_result():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = bs.quantize_(bs.zoo.create("resnet18", classes=5, width=8), bs.recipes.lsq(4), x)
    model = bs.calibrate_(model, [x]).train()
    reference, fused = copy.deepcopy(model).double(), bs.fuse(model)
    assert len(fused.fused) == 20
    torch.testing.assert_close(fused(x).double(), reference(x.double()), rtol=1e-4, atol=1e-5)


def test_forward_passes_do_not_depend_on_threads():
    x, here, found = torch.randn(5, 3, 9, 9), torch.get_num_threads(), []
    model = chain()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            one = copy.deepcopy(model)
            with torch.no_grad():
                found.append([bs.fuse(one)(x), *one.buffers()])
    finally:
        torch.set_num_threads(here)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_is_not_finite_names_its_layer():
    x = torch.randn(4, 3, 8, 8)
    for name, bad in (("0", "input"), ("3", "weight"), ("3", "normalized"), ("0", "gradient")):
        model = chain()
        fused, inputs = bs.fuse(model), x.clone()
        if bad == "input":
            inputs[1, 2, 3, 4] = float("nan")
        elif bad == "weight":
            model[3].weight.data[0, 0, 0, 0] = float("nan")
        elif bad == "normalized":
            model[4].level.bias.data[1] = float("nan")
        what = {"gradient": "the gradient of its result", "normalized": "its normalized result"}.get(bad, f"its {bad}")
        with pytest.raises(ValueError, match=rf"^{name if bad != 'gradient' else 3}: {what} contains NaN or infinity"):
            (fused(inputs).sum() * (float("nan") if bad == "gradient" else 1)).backward()


def test_evaluation_empty_batches_and_float16_are_the_models_own():
    model = chain()
    other, fused = copy.deepcopy(model), bs.fuse(model)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(fused.eval()(x), other.eval()(x))
    assert fused.train()(x).shape == (2, 3)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(fused(x), other.train()(x))
    with pytest.raises(ValueError, match="needs more than one value a channel"):
        bs.fuse(chain())(torch.randn(1, 3, 5, 5))


def test_a_step_runs_backward_once_and_is_differentiable_once():
    fused, x = bs.fuse(chain()), torch.randn(2, 3, 8, 8, requires_grad=True)
    result = fused(x).square().sum()
    (gradient,) = torch.autograd.grad(result, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match=r"the backward pass of a step runs once|second time"):
        result.backward()


def test_what_cannot_be_fused_stays_in_torch():
    model = chain()
    model[3].register_forward_hook(lambda *_: None)
    assert bs.fuse(model).fused == ("0",)

    def net() -> nn.Module:
        layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False)]
        return nn.Sequential(*layers, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))

    x = torch.randn(2, 3, 4, 4)
    assert bs.fuse(bs.quantize_(net(), bs.recipes.lsq_plus(4), x)).fused == ("0",)  # inner inputs have an offset
    with pytest.raises(bs.FuseError, match=r"has no convolution .QuantConv2d without bias, codes on both sides"):
        bs.fuse(bs.quantize_(net(), bs.recipes.maqd(), x))  # another normalization


def test_a_shared_quantized_weight_collects_its_gradient(monkeypatch):
    model, x = chain(), torch.randn(4, 3, 8, 8)
    leaf = model[3].quantized_weight().detach().requires_grad_()
    monkeypatch.setattr(model[3], "quantized_weight", lambda: leaf)
    model(x).square().sum().backward()
    wanted, leaf.grad = leaf.grad, None
    for times in (1, 2):
        bs.fuse(model)(x).square().sum().backward()
        torch.testing.assert_close(leaf.grad, times * wanted, rtol=1e-3, atol=1e-5)
    assert model[3].weight.grad is None


def test_hooks_of_parameters_run_once():
    model, x = chain(), torch.randn(2, 3, 8, 8)
    plain, fused = copy.deepcopy(model), bs.fuse(model)
    names = [n for n, _ in model.named_parameters()]
    for p in model.parameters():
        p.register_hook(lambda g: g * 2)
    fused(x).square().sum().backward()
    bs.fuse(plain)(x).square().sum().backward()
    for name, p, q in zip(names, model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 2 * q.grad, msg=name)
