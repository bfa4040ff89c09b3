"""Products with gradients from integer codes: equal to sums of integers, to the last bit where factors are exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers_integer import gradient, whole
from torch import Tensor

from bitstrata.integer import shift_quantize
from bitstrata.nn.gradient_product import Coded, Window, coded_product
from bitstrata.quantizers.gradient import GradientQuantizer, ShiftQuantGradient

NONE = torch.zeros(1, dtype=torch.float64)


def values(coded: Coded) -> Tensor:
    """Float64 values of codes; scales an output channel, offsets an input channel."""
    rank = coded.codes.dim()
    scale, offset = coded.scale, coded.offset
    scale = scale if scale.numel() == 1 else scale.reshape(-1, *[1] * (rank - 1))
    offset = offset if offset.numel() == 1 or rank == 2 else offset.reshape(1, -1, *[1] * (rank - 2))
    return scale * (coded.codes + offset)


def convolution_sums(g: Tensor, x: Tensor, w: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """int64 input gradient (of the padded input) and weight gradient of a 2-d convolution, tap by tap."""
    (sh, sw), (dh, dw), groups = window.stride, window.dilation, window.groups
    gx, gw = torch.zeros_like(x), torch.zeros_like(w)
    outs, ins = w.shape[0] // groups, w.shape[1]
    for o in range(w.shape[0]):
        first = o // outs * ins
        for i in range(ins):
            for ky in range(w.shape[2]):
                for kx in range(w.shape[3]):
                    rows = slice(ky * dh, ky * dh + sh * (g.shape[2] - 1) + 1, sh)
                    columns = slice(kx * dw, kx * dw + sw * (g.shape[3] - 1) + 1, sw)
                    gx[:, first + i, rows, columns] += g[:, o] * w[o, i, ky, kx]
                    gw[o, i, ky, kx] = (g[:, o] * x[:, first + i, rows, columns]).sum()
    return gx, gw


def differentiated(
    xc: Coded, wc: Coded, window: Window | None, g: Tensor, quantizer: GradientQuantizer
) -> tuple[Tensor, ...]:
    """Result, and gradients of input, weight and bias, in float64."""
    x, w = values(xc).requires_grad_(), values(wc).requires_grad_()
    b = torch.ones(w.shape[0], dtype=torch.float64, requires_grad=True)
    y = coded_product(x, w, b, xc, wc, window, quantizer)
    return y.detach(), *torch.autograd.grad(y, (x, w, b), g)


WINDOWS = [
    (Window((1, 1), (1, 1), (1, 1), 1), (5, 4, 3, 3)),
    (Window((2, 1), (0, 2), (1, 2), 1), (6, 4, 3, 2)),
    (Window((1, 2), (1, 0), (1, 1), 2), (6, 2, 3, 1)),
    (Window((1, 1), (1, 1), (1, 1), 4), (4, 1, 3, 3)),
]


@pytest.mark.parametrize(("window", "shape"), WINDOWS)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_a_convolution_equals_sums_of_integers(
    window: Window, shape: tuple[int, ...], rows: bool, offset: float
) -> None:
    """Scales are powers of two, so every factor is exact and nothing may differ."""
    channels = shape[1] * window.groups
    xc = Coded(whole(2, channels, 6, 7, low=0, high=15, seed=1), torch.tensor([0.25], dtype=torch.float64), NONE)
    scale = torch.exp2(torch.arange(shape[0], dtype=torch.float64) - 3) if rows else torch.full((1,), 0.5).double()
    wc = Coded(whole(*shape, low=-8, high=7, seed=2), scale, torch.tensor(offset, dtype=torch.float64))
    size = F.conv2d(values(xc), values(wc), None, window.stride, window.padding, window.dilation, window.groups).shape
    g = gradient(*size, axis=1)
    _, gx, gw, gb = differentiated(xc, wc, window, g, ShiftQuantGradient(g=8, rounding="nearest"))

    steps = scale if rows else torch.ones(shape[0], dtype=torch.float64)
    coded = shift_quantize(g * steps.reshape(-1, 1, 1), 8, 4, 1)
    codes, unit = coded.codes.long(), coded.scale.double() / 8
    ph, pw = window.padding
    padded = F.pad(xc.codes, (pw, pw, ph, ph))
    doubled = 2 * wc.codes + (1 if offset else 0)
    sums, _ = convolution_sums(codes << coded.shifts().reshape(-1, 1, 1), padded, doubled, window)
    _, weight_sums = convolution_sums(codes, padded, doubled, window)
    sums = sums[:, :, ph : padded.shape[2] - ph, pw : padded.shape[3] - pw]
    assert torch.equal(gx, sums * (unit / 2 * (1 if rows else scale)))
    outer = (coded.scale.double() * coded.factors(torch.float64) / steps).reshape(-1, 1, 1, 1)
    assert torch.equal(gw, weight_sums * outer * 0.25)
    assert torch.equal(gb, codes.sum((0, 2, 3)) * outer.flatten())


def test_a_linear_layer_equals_sums_of_integers() -> None:
    xc = Coded(whole(2, 3, 7, low=-8, high=7, seed=1), torch.tensor([0.5], dtype=torch.float64), NONE)
    wc = Coded(whole(5, 7, low=-8, high=7, seed=2), torch.tensor([0.25], dtype=torch.float64), torch.tensor(0.5))
    g = gradient(2, 3, 5, axis=2)
    _, gx, gw, _ = differentiated(xc, wc, None, g, ShiftQuantGradient(g=8, rounding="nearest"))
    coded = shift_quantize(g, 8, 4, 2)
    codes = coded.codes.long()
    assert torch.equal(gx, ((codes << coded.shifts()) @ (2 * wc.codes + 1)) * (coded.scale.double() / 8 / 2 * 0.25))
    sums = codes.reshape(-1, 5).T @ xc.codes.reshape(-1, 7)
    assert torch.equal(gw, sums * (coded.scale.double() * coded.factors(torch.float64))[:, None] * 0.5)


@pytest.mark.parametrize("offset", [-0.3, 1 / 3])
def test_real_offsets_of_both_operands_are_sums_of_gradient_codes(offset: float) -> None:
    """Without padding; the reference multiplies the dequantized gradient in float64."""
    window = Window((1, 1), (0, 0), (1, 1), 2)
    per_channel = torch.tensor([0.1, -0.7, 2.5, 0.0], dtype=torch.float64)
    xc = Coded(whole(2, 4, 5, 5, low=0, high=15, seed=1), torch.tensor([0.3], dtype=torch.float64), per_channel)
    wc = Coded(whole(4, 2, 3, 3, low=-8, high=7, seed=2), torch.tensor([0.7]).double(), torch.tensor(offset).double())
    g = gradient(2, 4, 3, 3, axis=1)
    y, gx, gw, gb = differentiated(xc, wc, window, g, ShiftQuantGradient(g=6, rounding="nearest"))
    x, w = values(xc).requires_grad_(), values(wc).requires_grad_()
    b = torch.ones(4, dtype=torch.float64, requires_grad=True)
    real = F.conv2d(x, w, b, groups=2)
    assert torch.equal(y, real)
    expected = torch.autograd.grad(real, (x, w, b), shift_quantize(g, 6, 4, 1).dequantize(torch.float64))
    for found, wanted in zip((gx, gw, gb), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * float(wanted.abs().max()))


def test_offsets_of_linear_inputs_may_differ_by_feature() -> None:
    offsets = torch.tensor([0.5, -1.5, 3.25], dtype=torch.float64)
    xc = Coded(whole(6, 3, low=0, high=3, seed=1), torch.ones(1, dtype=torch.float64), offsets)
    wc = Coded(whole(2, 3, low=-2, high=1, seed=2), torch.ones(1, dtype=torch.float64), NONE)
    g = gradient(6, 2, axis=1)
    _, _, gw, _ = differentiated(xc, wc, None, g, ShiftQuantGradient(g=8, rounding="nearest"))
    wanted = shift_quantize(g, 8, 4, 1).dequantize(torch.float64).T @ (xc.codes + offsets)
    torch.testing.assert_close(gw, wanted, rtol=1e-13, atol=1e-10)


def test_wide_sums_leave_float32_and_stay_exact() -> None:
    """2^15 samples of the largest codes exceed 2^24 by far; float32 would lose the last one."""
    n = 1 << 15
    codes = torch.full((n, 1), 255)
    codes[-1] = 254
    xc = Coded(codes, torch.ones(1), torch.zeros(1))
    wc = Coded(torch.ones(1, 1, dtype=torch.long), torch.ones(1), torch.zeros(1))
    w = torch.ones(1, 1, requires_grad=True)
    y = coded_product(codes.float(), w, None, xc, wc, None, ShiftQuantGradient(g=8, groups=1, rounding="nearest"))
    (gw,) = torch.autograd.grad(y, w, torch.full((n, 1), 127.0))
    assert float(gw) == float(torch.tensor(127 * (255 * n - 1), dtype=torch.float64).float())


def test_reduced_precision_of_torch_is_no_matter() -> None:
    xc = Coded(whole(64, 32, low=0, high=255, seed=1), torch.ones(1), torch.zeros(1))
    wc = Coded(whole(16, 32, low=-128, high=127, seed=2), torch.ones(1), torch.zeros(1))
    g = gradient(64, 16, axis=1).float()

    def run() -> tuple[Tensor, ...]:
        x, w = xc.codes.float().requires_grad_(), wc.codes.float().requires_grad_()
        y = coded_product(x, w, None, xc, wc, None, ShiftQuantGradient(g=4, rounding="nearest"))
        return torch.autograd.grad(y, (x, w), g)

    before, first = torch.get_float32_matmul_precision(), run()
    torch.set_float32_matmul_precision("medium")
    try:
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_mean_over_draws_is_the_float_gradient() -> None:
    xc = Coded(whole(4, 6, low=0, high=15, seed=1), torch.tensor([0.1]).double(), NONE)
    wc = Coded(whole(5, 6, low=-8, high=7, seed=2), torch.rand(5).double() + 0.1, torch.tensor(0.5).double())
    g = gradient(4, 5, axis=1)
    x, w = values(xc), values(wc)
    quantizer = ShiftQuantGradient(g=3, groups=2, seed=7)
    draws = [differentiated(xc, wc, None, g, quantizer)[1:3] for _ in range(600)]
    for which, wanted in ((0, g @ w), (1, g.T @ x)):
        found = torch.stack([draw[which] for draw in draws])
        error = (found.mean(0) - wanted).abs()
        assert bool((error <= 4.5 * found.std(0) / 600**0.5 + 1e-9).all())
        assert bool((found.std(0) > 0).any())
