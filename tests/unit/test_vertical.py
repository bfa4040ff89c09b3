"""Vertical layering's weight grid: worked examples, gradients against the definitions, compensation, storage counts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitstrata.functional.vertical import vertical_codes, vertical_fake_quantize, vertical_offset
from bitstrata.lowering.factors import integer_form
from bitstrata.quantizers import build, describe
from bitstrata.quantizers.lsq import LSQActivation
from bitstrata.quantizers.vertical import VerticalWeight
from bitstrata.zoo import resnet

BITS = {2: 2, 3: 3, 4: 4}


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


W = double(-5, -4.1, -2.3, -1.2, -0.6, -0.2, 0, 0.3, 0.6, 1.4, 2.2, 3.4, 3.6, 9)
STEP = 0.5
CODES = {
    4: [-8, -8, -5, -2, -1, 0, 0, 1, 1, 3, 4, 7, 7, 7],
    3: [-4, -4, -3, -1, -1, 0, 0, 0, 0, 1, 2, 3, 3, 3],
    2: [-2, -2, -2, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1],
}
VALUES = {
    4: [c * STEP for c in CODES[4]],
    3: [-3.75, -3.75, -2.75, -0.75, -0.75, *[0.25] * 4, 1.25, 2.25, *[3.25] * 3],
    2: [*[-3.25] * 3, *[-1.25] * 2, *[0.75] * 5, *[2.75] * 4],
}
MASK = [0, 0, *[1] * 10, 0, 0]
BY_ELEMENT = [-6.5, -6.5, -1.9, -0.1, -1.3, 1.9, 1.5, 0.9, 0.3, -1.3, 1.1, -1.3, 5.5, 5.5]


def gradients(w: Tensor, step: Tensor, bits: int, g: Tensor | None = None, **options: bool) -> tuple[Tensor, ...]:
    """Value, dw and ds of sum(g * value) at source width 4."""
    w, step = w.clone().requires_grad_(), step.clone().requires_grad_()
    value = vertical_fake_quantize(w, step, 4, bits, **options)
    value.backward(torch.ones_like(value) if g is None else g)
    return value.detach(), w.grad, step.grad


def quantizer(channels: int | None = None, step: float = STEP, **options: object) -> VerticalWeight:
    made = build("vertical", "weight", options, bits=BITS, channels=channels).double()
    assert isinstance(made, VerticalWeight)
    with torch.no_grad():
        made.step.fill_(step)
    return made


# ---- worked example: s = 0.5, widths 2, 3, 4


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_values_and_mask(bits):
    made = quantizer()
    made.precision = bits
    assert made.codes(W).tolist() == vertical_codes(W, double(STEP), 4, bits).tolist() == CODES[bits]
    assert made(W).tolist() == VALUES[bits]
    assert gradients(W, double(STEP), bits)[1].tolist() == MASK
    grid = made.grid()
    assert (grid.scale.item(), grid.lo, grid.hi) == (STEP * 2 ** (4 - bits), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert type(grid.offset) is float


def test_planes_are_the_differences_of_the_codes():
    four, three, two = (torch.tensor(CODES[b]) for b in (4, 3, 2))
    made = quantizer()
    found = {}
    for bits in (2, 3, 4):
        made.precision = bits
        found[bits] = made.codes(W)
    assert (found[4] - 2 * found[3]).tolist() == [0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1]
    assert (found[3] - 2 * found[2]).tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1, 1]
    assert torch.equal(found[4], 4 * two + 2 * (three - 2 * two) + (four - 2 * three))


def test_step_gradient_by_element():
    found = [gradients(w.reshape(1), double(STEP), 2)[2].item() for w in W]
    torch.testing.assert_close(double(*found), double(*BY_ELEMENT))


@pytest.mark.parametrize(("bits", "total", "printed"), [(2, -2.2, -5.8 * 4), (3, -2.2, -4.6 * 2), (4, -1.2, -1.2)])
def test_step_gradient_with_and_without_the_compensation(bits, total, printed):
    """The second column is eq. 8 as printed, without z, times ds_b/ds = 2^(n-b)."""
    assert gradients(W, double(STEP), bits)[2].item() == pytest.approx(total, abs=1e-12)
    found = gradients(W, double(STEP), bits, ste_include_z=False)
    assert found[2].item() == pytest.approx(printed, abs=1e-12)
    assert found[0].tolist() == VALUES[bits]  # a matter of the gradient alone
    assert found[1].tolist() == MASK


@pytest.mark.parametrize(
    ("bits", "levels", "offset"),
    [
        (2, [-6.5, -2.5, 1.5, 5.5], 0.375),
        (3, [-7.5, -5.5, -3.5, -1.5, 0.5, 2.5, 4.5, 6.5], 0.25),
        (4, list(range(-8, 8)), 0.0),
    ],
)
def test_levels_and_offsets(bits, levels, offset):
    made = quantizer(step=1.0)
    made.precision = bits
    w = torch.arange(-8, 8, dtype=torch.float64)
    assert made(w).unique().tolist() == levels
    assert made.grid().offset == vertical_offset(4, bits) == offset
    codes = made.codes(w)
    assert torch.equal(codes, torch.arange(-8, 8, dtype=torch.int32) >> (4 - bits))
    # the compensated value is the mean of the source codes that share the upper bits
    for code in codes.unique():
        assert made(w)[codes == code].unique().item() == w[codes == code].mean().item()


def test_integer_forms_of_the_compensated_codes():
    """8 c + 3 at two bits and 4 c + 1 at three, with a source of four."""
    assert [integer_form(vertical_offset(4, b), "w") for b in (2, 3, 4)] == [(8, 3), (4, 1), (1, 0)]
    assert integer_form(vertical_offset(8, 2), "w") == (128, 63)


def test_initial_steps():
    w = double(0.3, -0.1, 0.5, -0.7, 0.2, 0.0)
    made = quantizer()
    for p in BITS:  # the rule is for the source width, whatever the current one
        made.precision = p
        made.init_(w)
        assert made.step.item() == pytest.approx(0.15491933, abs=5e-9)
    for p, step in ((2, 1.0), (3, 0.46666667), (4, 0.22580645)):
        act = LSQActivation(BITS, init="paper_bits").double()
        act.precision = p
        act.init_(double(0.0, 1.0, 7.0, 3.0).reshape(1, 4))
        assert act.step.item() == pytest.approx(step, abs=5e-9)


def test_the_initial_step_of_gaussian_weights():
    w = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = quantizer()
    made.init_(w)
    assert made.step.item() == pytest.approx(2 * math.sqrt(2 / math.pi) / math.sqrt(15), rel=5e-3)  # .412 deviations


# ---- the definitions, number by number


def scalar(w: float, s: float, bits: int, z: float) -> tuple[float, float, float]:
    """Value, dvalue/dw and dvalue/ds of one number at source width 4."""
    u, factor = w / s, 2 ** (4 - bits)
    code = round(min(max(u, -8), 7)) // factor
    inside = -8 <= u <= 7
    return s * factor * (code + z), float(inside), factor * (code + z) - (u if inside else 0.0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("compensation", [True, False])
def test_against_the_scalar_form(bits, compensation):
    torch.manual_seed(0)
    ties = torch.arange(-20, 20, dtype=torch.float64) / 8  # bounds, zero and halves of a step of 1/4 among them
    w = torch.cat([ties, torch.randn(60, dtype=torch.float64)])
    g = torch.randn_like(w)
    z = 0.5 * (1 - 2.0 ** (bits - 4)) if compensation else 0.0
    expected = double(*[v for x in w.tolist() for v in scalar(x, 0.25, bits, z)]).view(-1, 3)
    value, dw, ds = gradients(w, double(0.25), bits, g, compensation=compensation)
    assert torch.equal(value, expected[:, 0])
    assert torch.equal(dw, g * expected[:, 1])
    torch.testing.assert_close(ds, (g * expected[:, 2]).sum().reshape(1), rtol=1e-12, atol=1e-12)


def test_the_bounds_are_inside():
    w = double(-8.25, -8, 0, 7, 7.25) * STEP
    for bits in (2, 3, 4):
        assert gradients(w, double(STEP), bits)[1].tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_against_autograd_of_the_straight_through_form(bits):
    """s (u + stop(level - u)) with u clamped: the code follows w/s with slope one inside the range."""
    torch.manual_seed(1)
    w, step = torch.randn(300, dtype=torch.float64).requires_grad_(), double(0.21).requires_grad_()
    g = torch.randn(300, dtype=torch.float64)
    factor = 2 ** (4 - bits)
    u = (w / step).clamp(-8, 7)
    level = factor * ((u.round() / factor).floor() + vertical_offset(4, bits))
    clamped = ((w / step) < -8) | ((w / step) > 7)
    form = step * torch.where(clamped, level.detach(), u + (level - u).detach())
    form.backward(g)
    value, dw, ds = gradients(w.detach(), step.detach(), bits, g)
    torch.testing.assert_close(value, form.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dw, w.grad, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(ds, step.grad, rtol=1e-6, atol=1e-12)


def test_the_gradient_scale_is_the_same_at_every_width():
    scale = (W.numel() * 7) ** -0.5
    for bits in (2, 3, 4):
        made = quantizer()
        made.precision = bits
        made(W).sum().backward()
        assert made.step.grad.item() == pytest.approx(scale * gradients(W, double(STEP), bits)[2].item(), rel=1e-12)


def test_channel_steps_equal_the_rows_by_themselves():
    w = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    w = w.to(memory_format=torch.channels_last)
    both = quantizer(channels=3)
    both.init_(w)
    for bits in (2, 3, 4):
        both.precision = bits
        both.step.grad = None
        value = both(w)
        value.square().sum().backward()
        for row in range(3):
            alone = quantizer()
            alone.init_(w[row])
            alone.precision = bits
            single = alone(w[row])
            single.square().sum().backward()
            assert torch.equal(single, value[row])
            torch.testing.assert_close(alone.step.grad[0], both.step.grad[row])


# ---- options


def test_without_compensation_the_values_are_plain_multiples():
    made = quantizer(compensation=False)
    for bits in (2, 3, 4):
        made.precision = bits
        assert made.grid().offset == 0.0
        assert made(W).tolist() == [c * STEP * 2 ** (4 - bits) for c in CODES[bits]]


def test_the_printed_gradient_reaches_the_step():
    grads = []
    for include in (True, False):
        made = quantizer(ste_include_z=include)
        made.precision = 2
        made(W).sum().backward()
        grads.append(made.step.grad.item() * (W.numel() * 7) ** 0.5)
    assert grads == pytest.approx([-2.2, -23.2])


def test_initial_rules():
    steps = {}
    for rule in ("vertical", "lsq", "mse", "minmax", 0.25):
        made = quantizer(init=rule)
        made.init_(W)
        steps[rule] = made.step.item()
    assert steps["lsq"] / steps["vertical"] == pytest.approx((15 / 7) ** 0.5)
    assert steps[0.25] == 0.25
    assert len({round(step, 9) for step in steps.values()}) == 5


def test_all_parameters_are_shared_and_the_codes_nest():
    made = quantizer()
    assert [name for name, _ in made.named_parameters()] == ["step"]
    assert made.precision_parameters() == {}
    assert describe("vertical", "weight").cls.nested


def test_bits_and_options_are_checked():
    with pytest.raises(ValueError, match=r"VerticalWeight: needs at least 2 bits, got 1 at precision 1 .*use the 'nes"):
        build("vertical", "weight", {}, bits={1: 1, 4: 4})
    with pytest.raises(ValueError, match=r"VerticalWeight: init must be one of .* or a positive step, got 'best'"):
        build("vertical", "weight", {"init": "best"}, bits={4: 4})


# ---- numbers of all kinds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 5, 7, 8])
def test_every_dtype_is_rounded_once(dtype, bits):
    w = torch.randn(500, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
    step = torch.tensor([0.0237]).requires_grad_()
    value = vertical_fake_quantize(w, step, 8, bits)
    value.sum().backward()
    assert (value.dtype, w.grad.dtype, step.grad.dtype) == (dtype, dtype, torch.float32)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    codes = (w.detach().to(work) / step.detach().to(work)).clamp(-128, 127).round().div(2 ** (8 - bits)).floor()
    exact = (codes + vertical_offset(8, bits)) * (step.detach() * 2 ** (8 - bits))
    assert torch.equal(value, exact.to(dtype))


@pytest.mark.parametrize("step", [0.0, -1.0, 1e-30])
def test_a_step_driven_through_zero_stays_finite(step):
    value, dw, ds = gradients(double(-1, 0, 1), double(step), 2)
    assert value.tolist() == pytest.approx([-6.5e-8, 1.5e-8, 5.5e-8])
    assert dw.tolist() == [0, 1, 0]
    assert math.isfinite(ds.item())


def test_infinite_weights_give_bounds_and_finite_step_gradients():
    value, dw, ds = gradients(double(math.inf, -math.inf), double(STEP), 2)
    assert value.tolist() == [2.75, -3.25]
    assert dw.tolist() == [0, 0]
    assert ds.item() == -1.0


def test_zero_weights_start_at_the_smallest_step():
    made = quantizer()
    made.init_(torch.zeros(5, dtype=torch.float64))
    assert made.step.item() == pytest.approx(1e-6)
    assert made(torch.zeros(5, dtype=torch.float64)).tolist() == [0.0] * 5


def test_gradients_only_where_asked():
    w = W.clone().requires_grad_()
    vertical_fake_quantize(w, double(STEP), 4, 2).sum().backward()
    assert w.grad.tolist() == MASK
    step = double(STEP).requires_grad_()
    vertical_fake_quantize(W, step, 4, 2).sum().backward()
    assert step.grad.item() == pytest.approx(-2.2)


# ---- compensation is a box filter of the input


def test_compensation_of_one_window():
    """Codes [[1, -2], [0, 1]] on inputs [[1, 2], [3, 0]]: -3, plus 3/8 of the inputs' sum 6."""
    a, codes = double(1, 2, 3, 0).view(1, 1, 2, 2), double(1, -2, 0, 1).view(1, 1, 2, 2)
    integer, box = F.conv2d(a, codes), F.conv2d(a, torch.ones_like(codes))
    assert (integer.item(), box.item()) == (-3, 6)
    assert F.conv2d(a, codes + vertical_offset(4, 2)).item() == (integer + vertical_offset(4, 2) * box).item() == -0.75


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_compensation_is_a_box_filter(groups):
    generator = torch.Generator().manual_seed(5)
    a = torch.randint(0, 4, (2, 4, 6, 5), generator=generator).double()
    w = torch.randn(8, 4 // groups, 3, 3, generator=generator, dtype=torch.float64)
    made = quantizer(step=0.25)
    for bits in (2, 3, 4):
        made.precision = bits
        codes, grid = made.codes(w).double(), made.grid()
        ones = torch.ones(groups, 4 // groups, 3, 3, dtype=torch.float64)
        whole = F.conv2d(a, made(w).detach(), padding=1, stride=2, groups=groups)
        box = F.conv2d(a, ones, padding=1, stride=2, groups=groups)
        parts = F.conv2d(a, codes, padding=1, stride=2, groups=groups)
        parts = parts + grid.offset * box.repeat_interleave(8 // groups, dim=1)
        assert torch.equal(whole, grid.scale * parts)  # binary fractions: no rounding anywhere


# ---- storage (Tables 4 and 5)


def shapes(network: str) -> tuple[int, int, int, int, int]:
    """All weights of convolutions; of the first; of the last layer and its bias; normalization channels."""
    with torch.device("meta"):
        model = getattr(resnet, network)(classes=1000)
    convs = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)]
    last = next(m for m in model.modules() if isinstance(m, nn.Linear))
    channels = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    return sum(convs), convs[0], last.weight.numel(), last.out_features, channels


def test_storage_of_resnet50():
    convs, first, last, bias, channels = shapes("resnet50")
    assert (convs, first, last + bias) == (23_454_912, 9_408, 2_049_000)
    assert round((4 * (convs - first) + 32 * (first + last + bias)) / 1e6, 2) == 159.65
    # one float weight for all widths instead, the batch normalizations left out of both
    assert round(32 * (convs + last + bias) / 1e6, 1) == 816.1
    assert channels == 26_560


@pytest.mark.parametrize(
    ("network", "channels", "millions", "permil"),
    [
        ("resnet18", 4_800, (0.0192, 0.0384, 0.0576), (1.64, 3.28, 4.93)),
        ("resnet34", 8_512, (0.0340, 0.0681, 0.1021), None),
    ],
)
def test_normalization_parameters(network, channels, millions, permil):
    """Four numbers a channel: shared, and a set more for each further level of three.

    The paper's Table 4 prints the count in millions ten times too large; its share of the network is right.
    """
    convs, _, last, bias, found = shapes(network)
    assert found == channels
    for count, (levels, expected) in enumerate(zip((1, 2, 3), millions, strict=True)):
        assert round(4 * levels * found / 1e6, 4) == expected
        if permil is not None:
            assert round(1000 * 4 * levels * found / (convs + last + bias + 2 * found), 2) == permil[count]
