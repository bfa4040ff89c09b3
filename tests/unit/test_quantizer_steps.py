"""How quantizers set and train their steps, and the pixel grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitstrata.functional import rectified_step
from bitstrata.quantizers import build, names
from bitstrata.quantizers.base import ActivationQuantizer
from bitstrata.quantizers.pixels import PixelInput

DTYPES = (torch.float32, torch.float64)


def from_data(name: str) -> bool:
    """Whether the quantizer's steps come from data."""
    quantizer = build(name, "activation", {}, bits={2: 2})
    return isinstance(quantizer, ActivationQuantizer) and not bool(quantizer.initialized.all())


LEARNED = [name for name in names("activation") if from_data(name)]
PLAIN = [name for name in LEARNED if name in ("lsq", "uniq")]  # unsigned for positive inputs, with a `numel`


def test_which_quantizers_set_steps_from_data():
    assert {"lsq", "uniq", "lsq_plus", "int8"} <= set(LEARNED)
    assert not {"pact", "cg_pact", "dorefa", "maqd"} & set(LEARNED)


def test_lsq_weight_init():
    quantizer = build("lsq", "weight", {}, bits={2: 2}).double()
    quantizer.init_(torch.tensor([-3, -0.9, -0.4, 0.1, 0.3, 0.8, 1.4], dtype=torch.float64))
    assert quantizer.step.item() == pytest.approx(1.97142857, abs=1e-8)


def test_nested_init_is_uniqs_constant_times_the_deviation():
    w = torch.tensor([0.3, -0.1, 0.5, -0.7, 0.2, 0.0], dtype=torch.float64)
    for bits, step in ((2, 0.41612874), (1, 0.66692205)):
        quantizer = build("nested", "weight", {"scales": "tied"}, bits={bits: bits}).double()
        quantizer.init_(w)
        assert quantizer.step.item() == pytest.approx(step, rel=2e-4)


def test_nested_ratios_minimise_the_squared_error():
    x = torch.randn(400, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    quantizer = build("nested", "weight", {}, bits={1: 1, 2: 2, 4: 4}).double()
    quantizer.init_(x)
    assert sorted(quantizer.ratios) == ["1", "2"]

    def error() -> float:
        return float((quantizer(x) - x).square().sum().detach())

    for p in (1, 2):
        quantizer.precision = p
        best = error()
        for factor in (0.98, 1.02):
            with torch.no_grad():
                quantizer.ratios[str(p)].mul_(factor)
            assert error() > best
            with torch.no_grad():
                quantizer.ratios[str(p)].div_(factor)


def test_tied_scales_have_no_ratios():
    quantizer = build("nested", "weight", {"scales": "tied"}, bits={1: 1, 3: 3})
    assert [name for name, _ in quantizer.named_parameters()] == ["step"]
    assert quantizer.precision_parameters() == {}


def test_precision_parameters():
    weight = build("nested", "weight", {}, bits={1: 1, 2: 2, 4: 4})
    assert weight.precision_parameters() == {1: [weight.ratios["1"]], 2: [weight.ratios["2"]]}
    activation = build("uniq", "activation", {}, bits={1: 1, 4: 4})
    assert activation.precision_parameters() == {1: [activation.steps["1"]], 4: [activation.steps["4"]]}
    assert build("lsq", "activation", {}, bits={1: 8, 4: 8}, shared=True).precision_parameters() == {}


def observed(quantizer: ActivationQuantizer, *batches: Tensor) -> float:
    quantizer.observing = True
    for batch in batches:
        quantizer(batch)
    quantizer.observing = False
    return quantizer.step.item()


def test_uniq_calibration_takes_the_largest_batch():
    first, second = torch.tensor([[0.0, 0, 1, 2]]), torch.tensor([[0.0, 1, 0, 1]])
    for batches in ((first, second), (second, first)):
        quantizer = build("uniq", "activation", {}, bits={2: 2}).double()
        assert observed(quantizer, *(b.double() for b in batches)) == pytest.approx(1.02895748, rel=1e-5)


def test_signed_uniq_uses_the_deviation_and_the_gaussian_step():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    quantizer = build("uniq", "activation", {}, bits={3: 3}, signed=True)
    step = observed(quantizer, x)
    errors = []
    for factor in (0.9, 1.0, 1.1):
        with torch.no_grad():
            quantizer.step.fill_(step * factor)
        errors.append(float((quantizer(x) - x).square().mean().detach()))
    assert errors[1] < min(errors[0], errors[2])


def test_lsq_activation_init():
    quantizer = build("lsq", "activation", {}, bits={2: 2})
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert observed(quantizer, x) == pytest.approx(2 * 1.5 / 3**0.5)


@pytest.mark.parametrize("name", LEARNED)
def test_first_training_batch_sets_the_step(name):
    quantizer = build(name, "activation", {}, bits={2: 2, 4: 4})
    x = torch.tensor([[0.0, 0.5, 1.0, 3.0]])
    quantizer(x)
    first = quantizer.step.item()
    assert first != 1.0
    quantizer(10 * x)
    assert quantizer.step.item() == first
    assert quantizer.initialized.tolist() == [False, True]
    quantizer.precision = 2
    quantizer(x)
    assert quantizer.step.item() not in (1.0, first)
    assert quantizer.initialized.tolist() == [True, True]


@pytest.mark.parametrize("name", LEARNED)
def test_evaluation_without_a_step_is_an_error(name):
    quantizer = build(name, "activation", {}, bits={2: 2}).eval()
    cls = type(quantizer).__name__
    for use in (quantizer, quantizer.codes, lambda _: quantizer.grid()):
        with pytest.raises(RuntimeError, match=rf"^{cls}: no step size at precision 2: run bitstrata.calibrate_"):
            use(torch.ones(1, 3))


@pytest.mark.parametrize("name", LEARNED)
def test_an_all_zero_batch_sets_no_step_and_passes(name):
    quantizer = build(name, "activation", {}, bits={2: 2})
    assert quantizer(torch.zeros(2, 3)).tolist() == [[0, 0, 0]] * 2
    assert quantizer.initialized.tolist() == [False]
    quantizer(torch.tensor([[0.0, 1.0, 2.0]]))
    assert quantizer.initialized.tolist() == [True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", LEARNED)
def test_a_batch_that_is_not_finite_is_an_error(name, bad):
    quantizer = build(name, "activation", {}, bits={2: 2})
    with pytest.raises(ValueError, match=r"cannot set the step from a batch of shape \(1, 2\): not finite"):
        quantizer(torch.tensor([[0.0, bad]]))


@pytest.mark.parametrize("name", PLAIN)
def test_negative_inputs_on_an_unsigned_grid_are_reported(name):
    quantizer = build(name, "activation", {}, bits={2: 2})
    with pytest.warns(UserWarning, match=r"inputs below zero meet an unsigned grid, which cuts them"):
        quantizer(torch.tensor([[-1.0, 0.0, 2.0]]))


@pytest.mark.parametrize("name", names("activation"))
def test_empty_batches_pass(name):
    quantizer = build(name, "activation", {}, bits={2: 2})
    quantizer(torch.ones(1, 3))
    assert quantizer.eval()(torch.ones(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("name", PLAIN)
def test_signed_inputs_get_two_bits_at_least(name):
    quantizer = build(name, "activation", {}, bits={1: 1, 4: 4}, signed=True)
    assert quantizer.bits == {1: 2, 4: 4}


@pytest.mark.parametrize("name", LEARNED)
def test_shared_steps(name):
    quantizer = build(name, "activation", {}, bits={1: 8, 4: 8}, shared=True)
    quantizer(torch.ones(1, 4))
    step = quantizer.step
    quantizer.precision = 1
    assert quantizer.step is step
    quantizer.eval()(torch.ones(1, 4))  # set for both


MENDED = {"weight": ("lsq", "uniq", "nested", "vertical"), "activation": ("lsq", "uniq")}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role in MENDED for name in MENDED[role]])
def test_a_step_that_is_not_positive_is_brought_back_by_its_gradient(role, name):
    """To where training from a good step ends; which is why it is a warning of the Trainer's, and no error."""
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    ends = []
    for start in (None, -0.05, 0.0):
        options = {"channels": None} if role == "weight" else {"signed": False}
        quantizer = build(name, role, {}, bits={3: 3}, **options)
        inputs = x if role == "weight" else x.relu()
        quantizer.init_(inputs)
        steps = [p for key, p in quantizer.named_parameters() if key.split(".")[0] in ("step", "steps")]
        if start is not None:
            for step in steps:
                step.data.fill_(start)
        optimizer = torch.optim.SGD(quantizer.parameters(), 0.05)
        for _ in range(300):
            optimizer.zero_grad()
            (quantizer(inputs) - inputs).square().sum().div(4).backward()
            optimizer.step()
        ends.append(torch.cat([step.detach() for step in steps]))
    assert bool((ends[0] > 0).all())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("numel", "count"), [("sample", 3), ("batch", 12)])
@pytest.mark.parametrize("name", PLAIN)
def test_what_the_gradient_scale_counts(name, numel, count):
    quantizer = build(name, "activation", {"numel": numel}, bits={2: 2})
    x = torch.full((4, 3), 9.0)
    quantizer(x)
    with torch.no_grad():
        quantizer.step.fill_(1.0)
    quantizer(x).sum().backward()
    assert quantizer.step.grad.item() == pytest.approx(12 * 3 * (count * 3) ** -0.5)  # each clipped: d value/d step = 3


def test_weight_gradient_scales():
    """1/sqrt(n max(2^(n-1)-1, 1)) for the nested grid (UniQ), 1/sqrt(N Q_P) for LSQ; per channel, n is a row."""
    for name, bits, channels, count in (
        ("nested", {1: 1, 4: 4}, None, 12 * 7),
        ("nested", {1: 1}, None, 12),
        ("nested", {3: 3}, 3, 4 * 3),
        ("lsq", {3: 3}, None, 12 * 3),
        ("lsq", {3: 3}, 3, 4 * 3),
    ):
        quantizer = build(name, "weight", {}, bits=bits, channels=channels)
        quantizer(torch.full((3, 4), 99.0)).sum().backward()  # all clipped: d value/d step is the top of the grid
        top = float(quantizer.grid().hi + quantizer.offset)
        elements = 12 if channels is None else 4
        assert quantizer.step.grad.tolist() == pytest.approx([elements * top * count**-0.5] * (channels or 1))


def test_calibration_constant_is_the_rectified_one():
    quantizer = build("uniq", "activation", {}, bits={4: 4})
    x = torch.tensor([[0.0, 1.0]])
    assert observed(quantizer, x) == pytest.approx(rectified_step(4))  # sqrt(2 mean x^2) = 1


# ---- pixels

STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pixel_is_its_own_code(dtype):
    mean, std = STATISTICS
    quantizer = PixelInput({2: 2}, mean=mean, std=std)
    quantizer.dims = 2
    pixels = torch.arange(256).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    m, s = (torch.tensor(v, dtype=dtype).view(3, 1, 1) for v in STATISTICS)
    x = (pixels.to(dtype) / 255 - m) / s
    assert torch.equal(quantizer.codes(x), pixels.int())
    torch.testing.assert_close(quantizer(x), x * s, rtol=0, atol=1e-6 if dtype is torch.float32 else 1e-15)
    assert quantizer.pad_codes == (125, 123, 114)


def test_pixels_saturate_and_pass_gradients():
    quantizer = PixelInput({2: 2}, mean=(0.5,), std=(0.25,))
    x = torch.tensor([[-9.0, 0.0, 9.0]], requires_grad=True)
    assert quantizer.codes(x).tolist() == [[0, 128, 255]]  # 127.5 rounds to even
    value = quantizer(x)
    assert torch.equal(value, quantizer.grid(x).dequantize(quantizer.codes(x)))
    value.sum().backward()
    assert x.grad.tolist() == [[0.25] * 3]
    assert not quantizer(x).detach().requires_grad


def test_pad_codes_stay_on_the_grid():
    assert PixelInput({2: 2}, mean=(0.0, 1.0, 0.5), std=(1.0, 1.0, 1.0)).pad_codes == (0, 255, 128)
