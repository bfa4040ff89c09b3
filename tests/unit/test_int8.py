"""Symmetric integer grids of a maximum: weights that scale by their own, activations on a range that is fixed."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from bitstrata.quantizers import build

DTYPES = (torch.float32, torch.float64)
GAUSS = torch.randn(1200, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
WORKED, CODES = [-2, -0.035, 0.004, 0.5, 1.26, 2.54], [-100, -2, 0, 25, 63, 127]  # the worked example, d = 0.02


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weight(bits: int = 8, channels: int | None = None):
    return build("int8", "weight", {}, bits={bits: bits}, channels=channels)


def activation(bits: int = 8, signed: bool = False, **options: object):
    return build("int8", "activation", options, bits={bits: bits}, signed=signed)


def observed(quantizer, *batches: Tensor):
    quantizer.observing = True
    for batch in batches:
        quantizer(batch)
    quantizer.observing = False
    return quantizer


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_example(dtype):
    t = torch.tensor(WORKED, dtype=dtype)
    quantizer = weight().to(dtype)
    assert quantizer.codes(t).tolist() == CODES
    assert quantizer.grid(t).scale.item() == pytest.approx(0.02, rel=1e-6)
    for signed in (False, True):
        act = observed(activation(signed=signed).to(dtype), t.view(1, -1))
        assert act.codes(t).tolist() == CODES
        assert act.step.item() == pytest.approx(0.02, rel=1e-6)


# ---- weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_forward_is_the_grid_of_the_codes(bits, channels, dtype):
    w = GAUSS.view(6, 5, 4, 10).to(dtype)
    quantizer, largest = weight(bits, channels).to(dtype), 2 ** (bits - 1) - 1
    grid, codes = quantizer.grid(w), quantizer.codes(w)
    assert codes.dtype == torch.int32
    assert (grid.lo, grid.hi) == (-largest, largest)
    assert grid.scale.dtype == dtype
    assert torch.equal(quantizer(w), grid.dequantize(codes))
    rows = w.view(1 if channels is None else channels, -1)
    assert torch.equal(grid.scale, rows.abs().amax(1) / largest)
    reached = codes.view(rows.shape).abs().amax(1)
    assert reached.tolist() == [largest] * rows.shape[0]  # every maximum takes the last code
    assert torch.equal(codes.view(rows.shape), (rows / grid.scale.unsqueeze(1)).round().int())


def test_ties_round_to_even():
    assert weight().codes(double(0.5, 1.5, 2.5, -0.5, -1.5, 127)).tolist() == [0, 2, 2, 0, -2, 127]


def test_the_scale_follows_the_weight():
    w, quantizer = GAUSS[:40], weight()
    quantizer.init_(w)
    assert list(quantizer.parameters()) == []
    assert not quantizer.state_dict()
    torch.testing.assert_close(quantizer(8 * w), 8 * quantizer(w), rtol=0, atol=0)
    assert torch.equal(quantizer.codes(8 * w), quantizer.codes(w))


@pytest.mark.parametrize("channels", [None, 4])
def test_weight_gradients_pass_straight_through(channels):
    w = GAUSS[:40].view(4, 10).clone().requires_grad_()
    upstream = GAUSS[40:80].view(4, 10)
    weight(4, channels)(w).backward(upstream)
    assert torch.equal(w.grad, upstream)


@pytest.mark.parametrize("channels", [None, 3])
def test_all_zero_weights(channels):
    w = torch.zeros(3, 4)
    assert torch.equal(weight(8, channels)(w), w)
    w[1] = 1e-42  # denormal
    w[2] = 5.0
    value = weight(8, channels)(w)
    assert bool(torch.isfinite(value).all())
    assert value[2].tolist() == [5.0] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_show(bad):
    assert not bool(torch.isfinite(weight()(double(1.0, bad))).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_round_once(dtype):
    w = GAUSS.to(dtype)
    quantizer = weight()
    assert torch.equal(quantizer(w), quantizer(w.float()).to(dtype))
    assert torch.equal(quantizer.codes(w), quantizer.codes(w.float()))


def test_memory_layouts():
    w = GAUSS[:240].view(4, 5, 4, 3)
    twin = w.to(memory_format=torch.channels_last)
    for channels in (None, 4):
        assert torch.equal(weight(8, channels)(twin), weight(8, channels)(w))


def test_weight_errors():
    with pytest.raises(ValueError, match=r"Int8Weight: undefined at 1 bit \(the largest code is 0\)"):
        weight(1)
    with pytest.raises(ValueError, match=r"Int8Weight.grid: needs the weight, whose maximum sets the scale; got None"):
        weight().grid()


# ---- activations


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("form", ["symmetric", "full"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activation_is_the_grid_of_the_codes(bits, form, signed, dtype):
    x = (GAUSS if signed else GAUSS.relu()).view(4, -1).to(dtype)
    quantizer = observed(activation(bits, signed, range=form).to(dtype), x)
    grid, codes = quantizer.grid(), quantizer.codes(x)
    largest = 2**bits - 1 if form == "full" and not signed else 2 ** (bits - 1) - 1
    assert (grid.lo, grid.hi) == (0 if form == "full" and not signed else -largest, largest)
    assert torch.equal(quantizer(x), grid.dequantize(codes))
    assert grid.scale.item() == pytest.approx((x.abs().max() / largest).item(), rel=1e-6)
    assert int(codes.abs().max()) == largest


def test_the_full_range_halves_the_step():
    x = GAUSS.relu().view(1, -1)
    steps = [observed(activation(range=form), x).step.item() for form in ("symmetric", "full")]
    assert steps[0] / steps[1] == pytest.approx(255 / 127, rel=1e-6)


def test_symmetric_codes_hold_negative_inputs_without_a_warning():
    x = torch.tensor([[-1.0, 0.0, 2.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert observed(activation(), x).codes(x).tolist() == [[-64, 0, 127]]  # -63.5 to even
    with pytest.warns(UserWarning, match=r"inputs below zero meet an unsigned grid"):
        observed(activation(range="full"), x)


def test_the_range_is_the_largest_batch_and_then_fixed():
    small, large = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.25, 2.54]])
    for batches in ((small, large), (large, small)):
        assert observed(activation(), *batches).step.item() == pytest.approx(0.02, rel=1e-6)
    quantizer = activation()
    quantizer(small)  # the first training batch
    step = quantizer.step.item()
    assert step == pytest.approx(1 / 127)
    quantizer(large)
    assert quantizer.step.item() == step
    assert not quantizer.step.requires_grad


def test_activation_gradients_stop_outside_the_range():
    quantizer = observed(activation(), torch.tensor([[1.0, 1.0]]))
    x = torch.tensor([[-2.0, -1.0, -0.5, 0.0, 1.0, 1.01]], requires_grad=True)
    value = quantizer(x)
    value.sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 1, 1, 0]]
    assert value[0, 0].item() == pytest.approx(-1.0)
    assert quantizer.step.grad is None


def test_the_largest_input_is_in_range_whatever_the_rounding():
    for top in torch.linspace(0.1, 9.9, 200).tolist():
        x = torch.tensor([[top, -top]], requires_grad=True)
        observed(activation(), x)(x).sum().backward()
        assert x.grad.tolist() == [[1, 1]]


def test_the_range_is_saved():
    quantizer = observed(build("int8", "activation", {}, bits={2: 8, 4: 8}), torch.tensor([[3.0]]))
    twin = build("int8", "activation", {}, bits={2: 8, 4: 8}).eval()
    twin.load_state_dict(quantizer.state_dict())
    assert torch.equal(twin(torch.tensor([[1.0]])), quantizer(torch.tensor([[1.0]])))
    assert twin.precision_parameters() == {2: [twin.steps["2"]], 4: [twin.steps["4"]]}
    assert not any(p.requires_grad for p in twin.parameters())


def test_narrow_activations():
    assert activation(1, signed=True).bits == {1: 2}  # codes -1, 0, 1: at one bit a symmetric grid has only 0
    assert activation(1).limits() == (-1, 1)
    assert activation(1, range="full").limits() == (0, 1)


def test_activation_errors():
    with pytest.raises(ValueError, match=r"Int8Activation: range must be 'symmetric' or 'full', got 'wide'"):
        activation(range="wide")
    for bad in (torch.tensor([[0.0, math.nan]]), torch.tensor([[math.inf, 0.0]]), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match=r"Int8Activation: cannot set the step from a batch of shape .*not finite"):
            activation()(bad)
    with pytest.raises(RuntimeError, match=r"Int8Activation: no step size at precision 8"):
        activation().eval()(torch.ones(1, 2))


def test_zero_batches_set_nothing_and_nan_passes_through():
    quantizer = activation()
    assert quantizer(torch.zeros(1, 2)).tolist() == [[0, 0]]
    assert quantizer.initialized.tolist() == [False]
    observed(quantizer, torch.ones(1, 2))
    assert bool(torch.isnan(quantizer(torch.tensor([[math.nan]]))).all())
