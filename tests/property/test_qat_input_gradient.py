"""The input gradient of a fused quantization-aware step's convolution, in bfloat16, on every instruction set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers_guarded import guarded_copy, guarded_engine
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.fused import qat_products, qat_units
from bitstrata_runtime import _engine

CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 65)
ISAS = tuple(_engine.available_isas())


@dataclass(frozen=True)
class Layer:
    batch: int
    size: tuple[int, int]
    channels: tuple[int, int]  # in, out
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]

    def result(self) -> tuple[int, ...]:
        sides = zip(self.size, self.kernel, self.stride, self.dilation, self.padding, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, d, p in sides)


def drawn(rng: np.random.Generator) -> Layer:
    """A random one whose windows fit."""
    while True:

        def pair(least: int, most: int) -> Any:
            return tuple(int(v) for v in rng.integers(least, most + 1, 2))

        channels = tuple(int(v) for v in rng.choice(CHANNELS, 2))
        layer = Layer(int(rng.integers(1, 4)), pair(1, 20), channels, pair(1, 4), pair(1, 3), pair(1, 2), pair(0, 3))
        if min(layer.result()) >= 1:
            return layer


def bfloat16(values: Tensor) -> np.ndarray[Any, Any]:
    """As the engine takes it."""
    return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)


def exact(layer: Layer, g: Tensor, weight: np.ndarray[Any, Any]) -> Tensor:
    """The gradient in float64, (N, H, W, C)."""
    x = torch.zeros(layer.batch, layer.channels[0], *layer.size, dtype=torch.float64, requires_grad=True)
    y = torch.conv2d(x, torch.from_numpy(weight.astype(np.float64)), None, layer.stride, layer.padding, layer.dilation)
    (gradient,) = torch.autograd.grad(y, x, g.double().permute(0, 3, 1, 2))
    return gradient.permute(0, 2, 3, 1)


def computed(layer: Layer, g: Tensor, weight: np.ndarray[Any, Any], isa: str, threads: int) -> Tensor:
    """By the engine; weight: integers, in two parts if they do not fit into 8 bits."""
    wide = int(np.abs(weight).max()) > 127
    high = guarded_copy((weight >> 1 if wide else weight).astype(np.int8))
    low = guarded_copy((weight & 1).astype(np.int8)) if wide else None
    out = guarded_copy(np.full((layer.batch, *layer.size, layer.channels[0]), 0x7FC0, np.uint16))
    geometry = (layer.stride, layer.dilation, layer.padding)
    _engine.qat_input_gradient(guarded_copy(bfloat16(g)), high, low, *geometry, out, isa, threads)
    return torch.from_numpy(out.copy().view(np.int16)).view(torch.bfloat16)


def by_tiles(layer: Layer, g: Tensor, weight: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
    """The gradient by F(2, 3) with factors of g rounded to bfloat16, and the sum of its products' magnitudes; float64.

    Dense kernels of 3x3; rows of g are padded so that they give whole tiles.
    """
    (height, width), (top, left) = layer.size, layer.padding
    out_height, out_width = layer.result()
    padded = torch.zeros(layer.batch, height + 2, width + 5, layer.channels[1], dtype=torch.float64)
    rows, columns = slice(2 - top, 2 - top + out_height), slice(2 - left, 2 - left + out_width)
    padded[:, rows, columns] = g.double()
    d = [padded[:, :, i : i + width + 1 : 2] for i in range(4)]
    factors = [f.to(torch.bfloat16).double() for f in (d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3])]
    h2, h1, h0 = torch.from_numpy(weight.astype(np.float64)).unbind(3)  # (out, in, 3) each
    terms = (h0, (h0 + h1 + h2) / 2, (h0 - h1 + h2) / 2, h2)

    def products(f: Tensor, h: Tensor) -> Tensor:
        sums = [f[:, 2 - ky : 2 - ky + height] @ h[:, :, ky] for ky in range(3)]
        return torch.stack(sums).sum(0)

    def pixels(m: list[Tensor], signs: tuple[int, int]) -> Tensor:
        even, odd = m[0] + m[1] + m[2], m[1] + signs[0] * m[2] + signs[1] * m[3]
        return torch.stack((even, odd), 3).flatten(2, 3)[:, :, :width]

    pairs = list(zip(factors, terms, strict=True))
    value = pixels([products(f, h) for f, h in pairs], (-1, -1))
    return value, pixels([products(f.abs(), h.abs()) for f, h in pairs], (1, 1))


def integers(rng: np.random.Generator, most: int, *shape: int) -> np.ndarray[Any, Any]:
    return rng.integers(-most, most + 1, shape)


@pytest.mark.parametrize("seed", range(40))
def test_sums_of_integers_are_exact_whatever_the_shape_and_the_threads(seed):
    rng = np.random.default_rng(seed)
    layer = drawn(rng)
    inputs, outputs = layer.channels
    weight = integers(rng, 200 if seed % 4 == 0 else 8, outputs, inputs, *layer.kernel)
    g = torch.from_numpy(integers(rng, 15, layer.batch, *layer.result(), outputs))
    wanted = exact(layer, g, weight).to(torch.bfloat16)
    with guarded_engine():
        for isa in ISAS:
            for threads in (1, 3):
                assert torch.equal(computed(layer, g, weight, isa, threads), wanted), (layer, isa, threads)


@pytest.mark.parametrize("seed", range(20))
def test_dense_sums_of_integers_are_exact_whatever_the_size_and_the_threads(seed):
    rng = np.random.default_rng(seed)
    padding = (int(rng.integers(0, 4)), int(rng.integers(0, 4)))
    size = (int(rng.integers(3, 15)), int(rng.integers(3, 40)))
    channels = (int(rng.integers(15, 70)), int(rng.integers(15, 70)))
    layer = Layer(int(rng.integers(1, 4)), size, channels, (3, 3), (1, 1), (1, 1), padding)
    weight = integers(rng, (1, 8, 85, 86, 200)[seed % 5], channels[1], channels[0], 3, 3)
    g = torch.from_numpy(integers(rng, 15, layer.batch, *layer.result(), channels[1]))
    wanted = exact(layer, g, weight).to(torch.bfloat16)
    with guarded_engine():
        for isa in ISAS:
            for threads in (1, 3):
                assert torch.equal(computed(layer, g, weight, isa, threads), wanted), (layer, isa, threads)


@pytest.mark.parametrize("width", [4, 7, 8, 11, 14, 16, 28, 32])
@pytest.mark.parametrize("channels", [(8, 8), (16, 16), (32, 24), (64, 40)])
@pytest.mark.parametrize("most", [8, 120])
def test_sums_of_floats_are_rounded_once(width, channels, most):
    """Within half a unit of bfloat16's last place, and what float32 sums in any order lose; or so are those of tiles,
    whose factors are rounded before."""
    rng = np.random.default_rng(width)
    layer = Layer(2, (6, width), channels, (3, 3), (1, 1), (1, 1), (1, 1))
    weight = integers(rng, most, channels[1], channels[0], 3, 3)
    weight.flat[0] = most
    g = torch.from_numpy(rng.normal(0, 3e-4, (2, 6, width, channels[1]))).to(torch.bfloat16)
    forms = [(exact(layer, g, weight), exact(layer, g.abs(), np.abs(weight)))]
    if 3 * most <= 256 and min(channels) > 16:
        forms.append(by_tiles(layer, g, weight))
    count = 9 * channels[1]
    for isa in ISAS:
        got = [computed(layer, g, weight, isa, threads) for threads in (1, 2)]
        assert torch.equal(got[0], got[1])
        assert any(
            ((got[0].double() - wanted).abs() <= 2.0**-8 * wanted.abs() + count * 2.0**-24 * magnitude).all()
            for wanted, magnitude in forms
        ), isa


@pytest.mark.parametrize("size", [(6, 9), (7, 14)])
def test_tiles_lose_little_more_than_the_rounding_of_the_result(size):
    """The error's root mean square, in that of the result, is at most twice what rounding the result alone costs."""
    rng = np.random.default_rng(0)
    layer = Layer(2, size, (48, 64), (3, 3), (1, 1), (1, 1), (1, 1))
    weight = integers(rng, 8, 64, 48, 3, 3)
    g = torch.from_numpy(rng.normal(0, 1, (2, *size, 64))).to(torch.bfloat16)
    wanted = exact(layer, g, weight)
    least = (wanted.to(torch.bfloat16).double() - wanted).square().mean()
    for isa in ISAS:
        lost = (computed(layer, g, weight, isa, 1).double() - wanted).square().mean()
        assert lost <= 4 * least, isa


def test_what_is_not_finite_stays_so():
    layer = Layer(1, (5, 9), (5, 3), (3, 3), (2, 2), (1, 1), (1, 1))
    rng = np.random.default_rng(0)
    weight = integers(rng, 7, 3, 5, 3, 3)
    g = torch.from_numpy(rng.normal(0, 1, (1, *layer.result(), 3)))
    g[0, 1, 2, 2], g[0, 0, 0, 1] = float("nan"), float("inf")
    wanted = exact(layer, g, weight)
    for isa in ISAS:
        assert torch.equal(computed(layer, g, weight, isa, 1).isfinite(), wanted.isfinite())


def test_in_tiles_what_is_not_finite_stays_so_and_reaches_two_columns_further_at_most():
    layer = Layer(1, (9, 20), (20, 18), (3, 3), (1, 1), (1, 1), (1, 1))
    rng = np.random.default_rng(0)
    weight = integers(rng, 7, 18, 20, 3, 3) | 1
    g = torch.from_numpy(rng.normal(0, 1, (1, 9, 20, 18)))
    g[0, 2, 4, 2], g[0, 6, 15, 1] = float("nan"), float("inf")
    broken = ~exact(layer, g, weight).isfinite()
    near = broken.clone()
    for shift in (-2, -1, 1, 2):
        near |= broken.roll(shift, 2)
    for isa in ISAS:
        got = ~computed(layer, g, weight, isa, 1).isfinite()
        assert got[broken].all()
        assert not got[~near].any()


def test_shapes_that_do_not_fit_are_refused_before_anything_is_written():
    g, out = np.zeros((1, 4, 4, 2), np.uint16), np.ones((1, 4, 4, 3), np.uint16)
    weight, geometry = np.zeros((2, 3, 3, 3), np.int8), ((1, 1), (1, 1), (1, 1))

    def call(g: Any = g, high: Any = weight, low: Any = None, geometry: Any = geometry, threads: int = 1) -> None:
        _engine.qat_input_gradient(g, high, low, *geometry, out, "", threads)

    with pytest.raises(ValueError, match="the weight does not fit input and output"):
        call(high=np.zeros((2, 1, 3, 3), np.int8))
    with pytest.raises(ValueError, match="both parts of the weight must have the same shape"):
        call(low=np.zeros((2, 3, 1, 3), np.int8))
    with pytest.raises(ValueError, match="different batches"):
        call(g=np.zeros((2, 4, 4, 2), np.uint16))
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        call(threads=0)
    with pytest.raises(ValueError, match=r"qat_input_gradient.*\b4\b"):
        call(geometry=((1, 1), (1, 1), (0, 0)))
    with pytest.raises(ValueError, match=r"taps of the kernel is 144, not in 1..128"):
        call(
            high=np.zeros((2, 3, 12, 12), np.int8),
            geometry=((1, 1), (1, 1), (6, 6)),
            g=np.zeros((1, 5, 5, 2), np.uint16),
        )
    assert (out == 1).all()


def test_what_the_engine_computes_is_chosen_by_reasons(monkeypatch):
    monkeypatch.setattr(qat_products, "multiplies_fast", lambda: True)
    takes = qat_products.takes_input_gradient
    assert takes(torch.bfloat16, 1, (3, 3))
    assert not takes(torch.float32, 1, (3, 3))
    assert not takes(torch.bfloat16, 2, (3, 3))
    assert not takes(torch.bfloat16, 1, (16, 16))
    monkeypatch.undo()
    monkeypatch.setenv("BITSTRATA_ISA", "generic")
    assert not qat_products.multiplies_fast()
    monkeypatch.setattr(_engine, "float_products", lambda isa: "avx512bf16")
    assert qat_products.multiplies_fast()
    monkeypatch.setattr(_engine, "chosen_isa", lambda isa: "amx")
    assert not qat_products.multiplies_fast()


@pytest.mark.parametrize("recipe", ["lsq", "uniq"])
def test_a_step_has_the_gradients_that_torch_computes(recipe, monkeypatch):
    """Both round sums of the same products to bfloat16, in other orders."""
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 8, 1), (8, 16, 2), (16, 16, 1)):
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    x = torch.randn(6, 3, 12, 12).to(memory_format=torch.channels_last)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    model = bs.calibrate_(bs.quantize_(model, getattr(bs.recipes, recipe)(4), x), [x]).train()
    called: list[bool] = []

    def gradients(own: bool) -> list[Tensor]:
        def takes(*arguments: Any) -> bool:
            called.append(own)
            return own

        monkeypatch.setattr(qat_units, "takes_input_gradient", takes)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = bs.fuse(model)(x).float().square().sum()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ours, theirs = gradients(True), gradients(False)
    assert called.count(True) == called.count(False) > 0
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()
