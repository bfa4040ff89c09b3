"""UniQ: the symmetric weight grid, its gradients and steps, and what the activation grid does with signed inputs."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from bitstrata.functional.steps import rectified_sqnr_db, rectified_step, symmetric_sqnr_db, symmetric_step
from bitstrata.functional.symmetric import symmetric_codes, symmetric_fake_quantize
from bitstrata.quantizers import build

WORKED = [-3, -1.2, -0.7, -0.2, 0.1, 0.4, 0.9, 2.6]  # the worked example of a weight, D = 0.5
TIES = [-3, -2, -1.5, -1.25, -1, -0.75, -0.6, -0.5, -0.25, -0.1, 0, 0.2, 0.25, 0.5, 0.75, 1, 1.4, 1.5, 2, 9]
GAUSS = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weight(bits: int, step: float = 0.5, **options: object):
    quantizer = build("uniq", "weight", options, bits={bits: bits}).double()
    with torch.no_grad():
        quantizer.step.fill_(step)
    return quantizer


def gradients(w: Tensor, step: Tensor, bits: int, upstream: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    w, step = w.clone().requires_grad_(), step.clone().requires_grad_()
    value = symmetric_fake_quantize(w, step, bits)
    value.backward(torch.ones_like(value) if upstream is None else upstream)
    return value.detach(), w.grad, step.grad


@pytest.mark.parametrize(
    ("bits", "values", "mask", "by_element", "total_and_scale"),
    [
        (
            1,
            [-0.25] * 4 + [0.25] * 4,
            [0, 0, 0, 1, 1, 0, 0, 0],
            [-0.5, -0.5, -0.5, -0.1, 0.3, 0.5, 0.5, 0.5],
            (0.2, 0.35355339),
        ),
        (
            2,
            [-0.75, -0.75, -0.75, -0.25, 0.25, 0.25, 0.75, 0.75],
            [0, 0, 1, 1, 1, 1, 0, 0],
            [-1.5, -1.5, -0.1, -0.1, 0.3, -0.3, 1.5, 1.5],
            (-0.2, 0.35355339),
        ),
        (
            3,
            [-1.75, -1.25, -0.75, -0.25, 0.25, 0.25, 0.75, 1.75],
            [0, 1, 1, 1, 1, 1, 1, 0],
            [-3.5, -0.1, -0.1, -0.1, 0.3, -0.3, -0.3, 3.5],
            (-0.6, 0.20412415),
        ),
    ],
)
def test_worked_example(bits, values, mask, by_element, total_and_scale):
    total, scale = total_and_scale
    w = double(*WORKED)
    quantizer = weight(bits)
    x = w.clone().requires_grad_()
    value = quantizer(x)
    value.sum().backward()
    assert value.tolist() == values
    assert x.grad.tolist() == mask
    assert (2 * quantizer.codes(w) + 1).tolist() == [int(v / 0.25) for v in values]  # the odd integers of eq. 4
    g = (8 * max(2 ** (bits - 1) - 1, 1)) ** -0.5
    assert g == pytest.approx(scale, abs=1e-8)
    assert quantizer.step.grad.item() == pytest.approx(g * total, abs=1e-12)
    found = [gradients(v.reshape(1), double(0.5), bits)[2].item() for v in w]
    assert found == pytest.approx(by_element, abs=1e-12)


def test_the_odd_codes_of_two_bits():
    assert (2 * weight(2).codes(double(*WORKED)) + 1).tolist() == [-3, -3, -3, -1, 1, 1, 3, 3]


def scalar(w: float, d: float, bits: int) -> tuple[float, float, float]:
    """Value, dvalue/dw and dvalue/dD of one number, from eq. 3 as printed and the derivative of eq. 3."""
    n = 2**bits
    u = w / d + (n - 1) / 2
    level = round(min(max(u, 0), n - 1)) - (n - 1) / 2  # Python rounds ties to even as well
    if 0 < u < n - 1:
        return level * d, 1.0, level - w / d
    return level * d, 0.0, math.copysign((n - 1) / 2, w)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("step", [0.5, 0.125])
def test_against_the_scalar_form(bits, step):
    w = torch.cat([double(*TIES), GAUSS[:100]])
    upstream = GAUSS[200 : 200 + w.numel()]
    value, dw, dd = gradients(w, double(step), bits, upstream)
    expected = double(*[v for x in w.tolist() for v in scalar(x, step, bits)]).view(-1, 3)
    torch.testing.assert_close(value, expected[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(dw, upstream * expected[:, 1], rtol=0, atol=0)
    torch.testing.assert_close(dd, (upstream * expected[:, 2]).sum().reshape(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_equation_6_and_autograd_on_gaussians(bits):
    """Eq. 6, with (N-1)/2 where it prints alpha, and autograd of eq. 3 through a straight-through rounding agree."""
    step, n = double(0.37), 2**bits
    u = GAUSS / step
    eq6 = torch.where(u.abs() < (n - 1) / 2, -u + (u - 0.5).round() + 0.5, GAUSS.sign() * (n - 1) / 2)
    leaf = step.expand(GAUSS.numel()).clone().requires_grad_()
    t = (GAUSS / leaf + (n - 1) / 2).clamp(0, n - 1)
    ((t + (t.round() - t).detach()) * leaf - leaf * (n - 1) / 2).sum().backward()
    assert float((eq6 - leaf.grad).abs().max()) < 1e-12
    own = leaf.detach().clone().unsqueeze(1).requires_grad_()  # a step a row: the gradient of each element by itself
    symmetric_fake_quantize(GAUSS.unsqueeze(1), own, bits).sum().backward()
    assert float((eq6 - own.grad[:, 0]).abs().max()) < 1e-12


@pytest.mark.parametrize("bits", range(1, 9))
def test_symmetry(bits):
    step = double(symmetric_step(bits))
    value = symmetric_fake_quantize(GAUSS, step, bits)
    assert torch.equal(symmetric_fake_quantize(-GAUSS, step, bits), -value)
    assert bool((value != 0).all())
    levels = (symmetric_codes(torch.linspace(-999, 999, 99_999).double(), step, bits) + 0.5).unique()
    assert levels.numel() == 2**bits
    assert levels.sum().item() == 0


def test_entropy_of_the_codes_of_a_gaussian():
    """Bits of information a code holds at the optimal step: cells between multiples of c_w, computed by erf."""
    for bits in (1, 2, 3, 4):
        step, half = symmetric_step(bits), 2 ** (bits - 1)
        borders = [-math.inf, *[k * step for k in range(1 - half, half)], math.inf]
        cdf = [0.5 * (1 + math.erf(b / math.sqrt(2))) for b in borders]
        expected = -sum((b - a) * math.log2(b - a) for a, b in pairwise(cdf))
        share = symmetric_codes(GAUSS, double(step), bits).unique(return_counts=True)[1] / GAUSS.numel()
        assert float(-(share * share.log2()).sum()) == pytest.approx(expected, abs=0.02)
        assert bits - 0.45 < expected <= bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sign_of_small_weights_survives(dtype):
    w = torch.tensor([-1e-30, -1e-12, 0.0, 1e-12, 1e-30], dtype=dtype)
    assert weight(1).to(dtype)(w).tolist() == [-0.25, -0.25, -0.25, 0.25, 0.25]
    assert weight(2).to(dtype)(w).tolist() == [-0.25, -0.25, 0.25, 0.25, 0.25]  # the tie at 0 rounds to even: 1.5 to 2


def test_bounds_are_outside():
    value, dw, dd = gradients(double(-0.75, 0.75, 0.75 - 1e-12), double(0.5), 2)
    assert value.tolist() == [-0.75, 0.75, 0.75]
    assert dw.tolist() == [0, 0, 1]
    assert dd.item() == pytest.approx(0.0, abs=1e-9)  # -3/2 + 3/2 + nearly 0


def test_initial_steps_of_the_worked_example():
    w = double(0.3, -0.1, 0.5, -0.7, 0.2, 0)
    for bits, expected in ((2, 0.41612874), (1, 0.66692205)):
        quantizer = weight(bits)
        quantizer.init_(w)
        assert quantizer.step.item() == pytest.approx(expected, abs=1e-8)


def test_initial_rules():
    w = double(0.3, -0.1, 0.5, -0.7, 0.2, 0)
    steps = {}
    for rule in ("mse", "lsq", "minmax", "vertical", "three_sigma", 0.1, 0.2):
        quantizer = weight(2, init=rule)
        quantizer.init_(w)
        steps[rule] = quantizer.step.item()
    assert len({round(s, 9) for s in steps.values()}) == 7
    assert steps[0.1] == 0.1
    assert steps["lsq"] == pytest.approx(2 * 0.3)
    with pytest.raises(ValueError, match=r"weight_step: init='lsq' divides by sqrt\(Q_P\), which is 0 at 1 bit"):
        weight(1, init="lsq").init_(w)
    with pytest.raises(ValueError, match=r"UniqWeight: init must be one of mse, .* got 'best'"):
        weight(2, init="best")


def test_one_width_serves_all_precisions():
    with pytest.raises(ValueError, match=r"UniqWeight: one width for all precisions, got \[2, 3\].*use the 'nested'"):
        build("uniq", "weight", {}, bits={2: 2, 3: 3})
    assert build("uniq", "weight", {}, bits={1: 8, 4: 8}).width == 8


def test_channels_have_steps_and_gradient_scales_of_their_own():
    w = GAUSS[:24].view(3, 2, 2, 2) * double(0.1, 1, 10).view(3, 1, 1, 1)
    both = build("uniq", "weight", {}, bits={3: 3}, channels=3).double()
    both.init_(w)
    value = both(w)
    value.square().sum().backward()
    for row in range(3):
        alone = weight(3)
        with torch.no_grad():
            alone.step.copy_(both.step[row])
        single = alone(w[row])
        single.square().sum().backward()
        assert torch.equal(value[row], single)
        torch.testing.assert_close(both.step.grad[row], alone.step.grad[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_half_precision_rounds_the_value_once(dtype, bits):
    w, step = GAUSS[:2000].to(dtype), torch.tensor([0.1237])
    exact = (symmetric_codes(w, step, bits).float() + 0.5) * step
    assert torch.equal(symmetric_fake_quantize(w, step, bits), exact.to(dtype))


def test_memory_layouts():
    w = GAUSS[:240].view(4, 5, 4, 3)
    quantizer = weight(3)
    for twin in (w.to(memory_format=torch.channels_last), w.transpose(0, 3).contiguous().transpose(0, 3)):
        assert not twin.is_contiguous()
        assert torch.equal(quantizer(twin), quantizer(w))
        assert torch.equal(quantizer.codes(twin), quantizer.codes(w))


def test_extreme_weights_and_steps_stay_finite():
    w = double(-math.inf, -1e300, 0, 1e300, math.inf)
    assert weight(2)(w).tolist() == [-0.75, -0.75, 0.25, 0.75, 0.75]
    assert bool(torch.isnan(weight(2)(double(math.nan))).all())
    quantizer = weight(2, step=-1.0)  # training drove D through zero: it counts as 1e-8
    assert quantizer(double(1.0)).item() == pytest.approx(1.5e-8)
    assert torch.equal(quantizer(double(1.0)), quantizer.grid().dequantize(quantizer.codes(double(1.0))))


# ---- Table 1

X = (np.arange(2_000_000) + 0.5) / 2_000_000 * 20 - 10
P = np.exp(-0.5 * X * X)
P /= P.sum()
WEIGHT_DB = [4.396, 9.250, 14.267, 19.377]
ACTIVATION_DB = [5.544, 11.628, 17.234, 22.662]


@pytest.mark.parametrize("bits", range(1, 9))
def test_table_1_by_integration(bits):
    step, half = symmetric_step(bits), 2 ** (bits - 1)
    error = (P * (X - step * (np.clip(np.floor(X / step), -half, half - 1) + 0.5)) ** 2).sum()
    assert symmetric_sqnr_db(bits) == pytest.approx(-10 * math.log10(error), abs=5e-4)
    step, relu = rectified_step(bits), np.maximum(X, 0)
    error = (P * (relu - step * np.clip(np.round(relu / step), 0, 2 * half - 1)) ** 2).sum()
    variance = (P * relu**2).sum() - (P * relu).sum() ** 2
    assert rectified_sqnr_db(bits) == pytest.approx(10 * math.log10(variance / error), abs=5e-4)


def test_table_1_as_printed():
    assert [round(symmetric_sqnr_db(b), 3) for b in (1, 2, 3, 4)] == WEIGHT_DB
    assert [round(rectified_sqnr_db(b), 3) for b in (1, 2, 3, 4)] == ACTIVATION_DB


@pytest.mark.parametrize("function", [symmetric_sqnr_db, rectified_sqnr_db])
@pytest.mark.parametrize("bits", [0, 9, -1])
def test_table_1_has_eight_widths(function, bits):
    with pytest.raises(ValueError, match=rf"^{function.__name__}: bits must be 1..8, got {bits}$"):
        function(bits)


# ---- activations


def activation(signed: bool, **options: object):
    return build("uniq", "activation", options, bits={1: 1, 2: 2}, signed=signed)


def test_signed_inputs_are_cut_on_request():
    x = torch.tensor([[-2.0, -0.5, 0.0, 0.5, 1.0, 2.0]])
    cut, signed = activation(True, signed_input="cut"), activation(True)
    for quantizer in (cut, signed):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantizer(x)
    assert (cut.limits(), cut.bits) == ((0, 3), {1: 1, 2: 2})
    assert (signed.limits(), signed.bits) == ((-2, 1), {1: 2, 2: 2})
    assert cut(x)[0, :3].tolist() == [0, 0, 0]
    assert float(signed(x)[0, 0].detach()) < -0.5
    # the step is eq. 10's for the whole input, as in the authors' code
    assert cut.step.item() == pytest.approx(rectified_step(2) * math.sqrt(2 * float(x.square().mean())), rel=1e-6)
    unsigned = activation(False)
    unsigned(x.clamp_min(0))
    with torch.no_grad():
        unsigned.step.copy_(cut.step)
    assert torch.equal(cut(x), unsigned(x.clamp_min(0)))


def test_only_cutting_silences_the_warning():
    x = torch.tensor([[-1.0, 0.0, 2.0]])
    with pytest.warns(UserWarning, match=r"inputs below zero meet an unsigned grid"):
        activation(False)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        activation(False, signed_input="cut")(x)


def test_cut_inputs_get_no_gradient_below_zero():
    quantizer = activation(True, signed_input="cut")
    x = torch.tensor([[-2.0, -0.1, 0.5, 1.0]], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [[0, 0, 1, 1]]


def test_signed_input_is_checked():
    with pytest.raises(ValueError, match=r"UniqActivation: signed_input must be 'signed' or 'cut', got 'clip'"):
        activation(True, signed_input="clip")
