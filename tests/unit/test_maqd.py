"""MaQD's quantizers: worked examples of eqs. 6, 7, 8, 10 and 11, gradients, switches, identities of its inference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitstrata.functional.multi_state import surrogate_slope
from bitstrata.nn.layer_batch_norm import LayerBatchNorm1d, fold
from bitstrata.quantizers import build, build_transform
from bitstrata.quantizers.maqd import MaQDActivation, MaQDWeight, width_of

WEIGHTS = [-4, -3, -1.6, -1.4, 0, 0.2, 1.4, 1.6, 2.9, 3.1]
INPUTS = [-0.3, 0, 0.1, 0.16, 0.17, 0.4, 0.49, 0.5, 0.51, 0.8, 0.84, 1, 1.7]
HALF = (torch.float16, torch.bfloat16)


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weight(states: int, **options: object) -> MaQDWeight:
    width = width_of(states, str(options.get("delta_mode", "(M-1)/2")))
    made = build("maqd", "weight", {"states": states, **options}, bits={1: width})
    assert isinstance(made, MaQDWeight)
    return made


def activation(states: int, **options: object) -> MaQDActivation:
    made = build("maqd", "activation", {"states": states, **options}, bits={1: (states - 1).bit_length()}, signed=True)
    assert isinstance(made, MaQDActivation)
    return made


def gradient(quantizer: torch.nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(quantizer(x).sum(), x)[0]


# ---- weights


@pytest.mark.parametrize(
    ("states", "codes"),
    [
        (3, [-1, -1, -1, 0, 0, 0, 0, 1, 1, 1]),
        (15, [-7, -7, -4, -3, 0, 0, 3, 4, 7, 7]),
        (255, [-127, -127, -68, -59, 0, 8, 59, 68, 123, 127]),
    ],
)
def test_weight_codes(states, codes):
    quantizer, x = weight(states), double(WEIGHTS)
    assert quantizer.codes(x).tolist() == codes
    grid = quantizer.grid(x)
    assert (grid.lo, grid.hi, grid.valid, grid.offset) == (-(states // 2), states // 2, None, 0.0)
    torch.testing.assert_close(quantizer(x), double(codes) / (states // 2), rtol=1e-15, atol=0)


def test_weight_codes_with_half_integer_d():
    quantizer, x = weight(3, delta_mode="M/2"), double(WEIGHTS)
    expected = double([-1, -1, -2 / 3, -2 / 3, 0, 0, 2 / 3, 2 / 3, 2 / 3, 1])
    torch.testing.assert_close(quantizer(x), expected, rtol=1e-15, atol=0)
    assert quantizer.codes(x).tolist() == [-3, -3, -2, -2, 0, 0, 2, 2, 2, 3]
    assert quantizer.grid().valid == (-3, -2, 0, 2, 3)


@pytest.mark.parametrize("states", [3, 15, 255])
@pytest.mark.parametrize("mode", ["(M-1)/2", "M/2"])
def test_numbers_of_states(states, mode):
    quantizer, z = weight(states, delta_mode=mode), torch.linspace(-1.3, 1.3, 40001, dtype=torch.float64)
    codes, grid = quantizer.codes(3 * z), quantizer.grid(z)
    found = codes.unique().tolist()
    assert len(found) == (states if mode == "(M-1)/2" else states + 2)
    assert (found[0], found[-1]) == (grid.lo, grid.hi)
    assert found == list(grid.valid or range(grid.lo, grid.hi + 1))
    assert torch.equal(quantizer(3 * z), grid.dequantize(codes))


def test_default_states_fill_the_width():
    assert build("maqd", "weight", {}, bits={2: 2, 4: 4, 8: 8}).states == {2: 3, 4: 15, 8: 255}
    assert build("maqd", "weight", {"delta_mode": "M/2"}, bits={3: 3, 8: 8}).states == {3: 3, 8: 127}
    quantizer = build("maqd", "weight", {"states": {2: 3, 4: 9}}, bits={2: 2, 4: 4}, channels=2)
    for precision, top in ((2, 1), (4, 4)):
        quantizer.precision = precision
        grid = quantizer.grid()
        assert (grid.hi, grid.scale.tolist(), grid.scale.dtype) == (top, [1 / top] * 2, torch.float64)


def test_widths():
    assert [width_of(m) for m in (3, 15, 255)] == [2, 4, 8]
    assert [width_of(m, "M/2") for m in (3, 15, 127, 255)] == [3, 5, 8, 8]
    assert width_of(5) == 3
    assert int(weight(255, delta_mode="M/2").codes(double([9.0]))) == 255  # beyond 8 bits, for training alone


def test_straight_through_mask():
    x = double(WEIGHTS)
    mask = double([0, 0, 1, 1, 1, 1, 1, 1, 1, 0])
    for states in (3, 15):
        torch.testing.assert_close(gradient(weight(states), x), mask / 3, rtol=1e-15, atol=0)
        assert torch.equal(gradient(weight(states, weight_ste="literal"), x), mask)
    assert gradient(weight(3, s=0.5), x).tolist() == [0, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0, 0]
    assert weight(3, s=0.5).codes(double([1.2, 0.9])).tolist() == [1, 0]


def test_gradient_through_standardization():
    expected = double([[0.08272372, -0.06999699, -0.04454354, 0.03181681]])
    for ste, factor in (("chain", 1), ("literal", 3)):
        w = double([[1.0, 2, 3, 6]]).requires_grad_()
        q = weight(3, weight_ste=ste)(build_transform("standardize", {"eps_ws": 0.0})(w))
        assert q.tolist() == [[0, 0, 0, 1]]
        (grad,) = torch.autograd.grad(q[0, 0], w)
        torch.testing.assert_close(grad, expected * factor, rtol=0, atol=3e-8)
        assert abs(float(grad.sum())) < 1e-12
        assert abs(float((grad * w.detach()).sum())) < 1e-12


PAPER = {  # nonzero weights in percent, smallest and largest over the paper's networks and data sets
    3: (13.36, 12.32, 12.95),
    15: (83.03, 82.04, 82.78),
    255: (99.06, 98.99, 99.04),
}


@pytest.mark.parametrize("states", PAPER)
def test_share_of_nonzero_weights(states):
    """Only D = (M-1)/2 gives the shares that the paper's tables show."""
    w = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = 100 * float((weight(states).codes(w) != 0).double().mean())
    gaussian, low, high = PAPER[states]
    assert abs(share - gaussian) < 0.2
    assert max(abs(share - low), abs(share - high)) < 1.1
    if states < 255:
        other = 100 * float((weight(states, delta_mode="M/2").codes(w) != 0).double().mean())
        assert other - high > 1.1


# ---- activations


@pytest.mark.parametrize(
    ("states", "codes"),
    [
        (2, [0] * 8 + [1] * 5),
        (4, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
        (8, [0, 0, 1, 1, 1, 3, 3, 4, 4, 6, 6, 7, 7]),
    ],
)
def test_activation_codes(states, codes):
    quantizer, x = activation(states), double(INPUTS)
    assert quantizer.codes(x).tolist() == codes
    grid = quantizer.grid(x)
    assert (grid.lo, grid.hi, grid.offset, grid.valid) == (0, states - 1, 0.0, None)
    torch.testing.assert_close(quantizer(x), double(codes) / (states - 1), rtol=1e-15, atol=0)
    assert not quantizer.signed
    assert not list(quantizer.parameters())
    assert not quantizer.state_dict()


def test_activation_states():
    assert build("maqd", "activation", {}, bits={1: 1, 3: 3}).states == {1: 2, 3: 8}
    assert activation(3).codes(double([0.2, 0.3, 0.8])).tolist() == [0, 1, 2]  # no power of two
    assert int(activation(256).codes(double([7.0]))) == 255
    quantizer = build("maqd", "activation", {"states": {1: 2, 2: 3}}, bits={1: 1, 2: 2}, shared=True)
    assert float(quantizer(double([0.5]))) == 0.5
    quantizer.precision = 1
    assert float(quantizer(double([0.5]))) == 0.0


SURROGATE = {
    2: [0.07065082, 0.41997434, 0.78644773, 1, 0.41997434, 0.07065082],
    4: [0.1109234, 0.48321293, 0.69383902, 0.77357603, 0.48321293, 0.1109234],
    8: [0.11567289, 0.48224372, 0.68543907, 0.76377515, 0.48224372, 0.11567289],
}


@pytest.mark.parametrize("states", SURROGATE)
def test_surrogate_gradient(states):
    x = double([-0.5, 0, 0.25, 0.5, 1, 1.5])
    normalised, literal = gradient(activation(states), x), gradient(activation(states, act_surrogate="literal"), x)
    torch.testing.assert_close(normalised, double(SURROGATE[states]), rtol=0, atol=1e-8)
    torch.testing.assert_close(literal, normalised * (states - 1), rtol=1e-12, atol=0)
    line = torch.linspace(-12, 13, 100001, dtype=torch.float64)
    assert abs(float(torch.trapezoid(gradient(activation(states), line), line)) - 1) < 1e-9


@pytest.mark.parametrize("states", [2, 3, 8, 256])
@pytest.mark.parametrize("alpha", [0.25, 0.05])
def test_surrogate_is_the_derivative_of_a_sum_of_sigmoids(states, alpha):
    x = torch.cat([torch.randn(40, dtype=torch.float64), double([0.0, 0.5, 1.0, -60.0, 60.0])]).requires_grad_()
    thresholds = (torch.arange(1, states, dtype=torch.float64) - 0.5) / (states - 1)
    smooth = torch.sigmoid((x[:, None] - thresholds) / alpha).sum(dim=1) / (states - 1)
    (expected,) = torch.autograd.grad(smooth.sum(), x)
    found = gradient(activation(states, alpha=alpha), x.detach())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    step = 1e-5
    centers = x.detach()[:, None] - thresholds
    rise = torch.sigmoid((centers + step) / alpha) - torch.sigmoid((centers - step) / alpha)
    torch.testing.assert_close(found, rise.sum(dim=1) / (states - 1) / (2 * step), rtol=0, atol=1e-6)


def test_incoming_gradients_are_multiplied_in():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 4, dtype=torch.float64)
    activation(4)(x).backward(g)
    torch.testing.assert_close(x.grad, g * surrogate_slope(x, 4) / 3, rtol=1e-14, atol=0)


def test_straight_through_switch():
    x = double([-0.1, 0.0, 0.01, 0.5, 0.99, 1.0, 1.1])
    assert gradient(activation(4, act_surrogate="ste"), x).tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert torch.equal(activation(4, act_surrogate="ste")(x), activation(4)(x))


# ---- both


@pytest.mark.parametrize("make", [weight, activation])
def test_layouts_and_dtypes(make):
    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(1))
    quantizer = make(15)
    for view in (x[:, ::2], x.to(memory_format=torch.channels_last), x.transpose(1, 2)):
        assert torch.equal(quantizer(view), quantizer(view.contiguous()))
        found = gradient(quantizer, view)
        torch.testing.assert_close(found, gradient(quantizer, view.contiguous()), rtol=1e-5, atol=1e-6)
    for dtype in (torch.float32, torch.float64):
        cast = x.to(dtype)
        assert torch.equal(quantizer(cast), quantizer.grid(cast).dequantize(quantizer.codes(cast)))
        assert quantizer(cast).dtype == dtype
    for dtype in HALF:
        cast = x.to(dtype)
        assert torch.equal(quantizer.codes(cast), quantizer.codes(cast.float()))
        assert torch.equal(quantizer(cast), quantizer(cast.float()).to(dtype))
        assert gradient(quantizer, cast).dtype == dtype
        torch.testing.assert_close(
            gradient(quantizer, cast).float(), gradient(quantizer, cast.float()), rtol=1e-2, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 10), (6, 2, 5), (6, 2, 3, 3), (1, 12)], ids=str)
@pytest.mark.parametrize("mode", ["(M-1)/2", "M/2"])
def test_one_scale_a_channel(mode, shape, dtype):
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    quantizer = build("maqd", "weight", {"delta_mode": mode}, bits={3: 3, 8: 8}, channels=shape[0])
    for precision in quantizer.bits:
        quantizer.precision = precision
        codes, grid = quantizer.codes(x), quantizer.grid(x)
        assert codes.dtype == torch.int32
        assert grid.scale.shape == shape[:1]
        assert torch.equal(quantizer(x), grid.dequantize(codes))
        assert set(codes.unique().tolist()) <= set(grid.valid or range(grid.lo, grid.hi + 1))


@pytest.mark.parametrize("make", [weight, activation])
def test_special_values(make):
    quantizer = make(15)
    out = quantizer(double([float("nan"), float("inf"), -float("inf"), -0.0, -0.001]))
    assert bool(out[0].isnan())
    assert out[1:].tolist() == [1.0, -1.0 if make is weight else 0.0, 0.0, 0.0]
    assert not bool(torch.signbit(out[3:]).any())
    zeros = torch.zeros(3, 4)
    assert quantizer(zeros).abs().max() == 0
    assert bool(gradient(quantizer, zeros).isfinite().all())
    assert quantizer(torch.zeros(0, 4)).shape == (0, 4)


# ---- inference


@pytest.mark.parametrize("states", [3, 15, 255])
def test_two_states_fire_by_an_integer_threshold(states):
    """Norm and binary activation of integer sums, by additions and one comparison a channel (MaQD section 3.3)."""
    generator = torch.Generator().manual_seed(states)
    quantizer, d = weight(states), states // 2
    codes = quantizer.codes(torch.randn(12, 40, generator=generator, dtype=torch.float64))
    x = torch.randint(0, 2, (200, 40), generator=generator)
    sums = x @ codes.long().T
    norm = LayerBatchNorm1d(12).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(12, generator=generator))
        norm.bias.copy_(torch.randn(12, generator=generator))
        norm.weight[3], norm.weight[4], norm.weight[5] = 0.0, -0.7, 0.9
        norm.running_mean.fill_(0.1)
        norm.running_var.fill_(3.7)
    g, b = norm.weight.detach(), norm.bias.detach()
    sd, mean = (norm.running_var + norm.eps).sqrt(), norm.running_mean
    threshold = d * (mean + (0.5 - b) * sd / g)
    expected = activation(2).codes(norm.eval()(sums.double() / d).detach()).bool()
    for t, up in ((threshold, threshold), (threshold.floor(), threshold.ceil())):
        fires = torch.where(g > 0, sums > t, sums < up)
        fires = torch.where(g == 0, (b > 0.5).expand_as(sums), fires)
        assert torch.equal(fires, expected)
    assert 0.05 < float(expected.double().mean()) < 0.95
    gain, shift = fold(norm)
    assert torch.equal(activation(2).codes(sums.double() / d * gain + shift).bool(), expected)


def test_average_pooling_of_two_states_is_a_sum_against_a_fourfold_threshold():
    spikes = activation(2)(double([[[[0.9, 0.1], [0.7, 3.0]]]]))
    assert spikes.tolist() == [[[[1, 0], [1, 1]]]]
    q = weight(3)(double([[[[-2.0]]]]))
    assert float(q) == -1.0
    assert float(F.conv2d(F.avg_pool2d(spikes, 2), q)) == -0.75
    adds = int(spikes.sum()) * int(weight(3).codes(double(-2.0)))
    assert adds == -3
    for t in (-1.0, -0.76, -0.75, -0.5):
        assert (adds > 4 * t) == (t < -0.75)


# ---- errors


def test_weight_errors():
    for bad in (4, 1, -3, 2.5, True):
        with pytest.raises(ValueError, match=rf"MaQDWeight: states must be an odd integer of at least 3, got {bad}"):
            build("maqd", "weight", {"states": bad}, bits={8: 8})
    with pytest.raises(ValueError, match=r"width_of: states must be an odd integer of at least 3, got 2"):
        width_of(2)
    with pytest.raises(ValueError, match=r"MaQDWeight: 15 states with delta_mode='\(M-1\)/2' need 4 bits, got 2 at pr"):
        build("maqd", "weight", {"states": 15}, bits={2: 2})
    with pytest.raises(ValueError, match=r"MaQDWeight: 3 states with delta_mode='M/2' need 3 bits, got 2 at precision"):
        build("maqd", "weight", {"states": 3, "delta_mode": "M/2"}, bits={2: 2})
    with pytest.raises(ValueError, match=r"MaQDWeight: 1 bits hold no grid of 3 states .* which needs 2 bits"):
        build("maqd", "weight", {}, bits={1: 1})
    with pytest.raises(ValueError, match=r"MaQDWeight: states must have the precisions \[2, 4\] as keys, got \[2\]"):
        build("maqd", "weight", {"states": {2: 3}}, bits={2: 2, 4: 4})
    for s in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"MaQDWeight: s must be positive and finite, got"):
            build("maqd", "weight", {"s": s}, bits={2: 2})
    with pytest.raises(ValueError, match=r"MaQDWeight: delta_mode must be one of '\(M-1\)/2', 'M/2', got 'M'"):
        build("maqd", "weight", {"delta_mode": "M"}, bits={2: 2})
    with pytest.raises(ValueError, match=r"MaQDWeight: weight_ste must be one of 'chain', 'literal', got 'soft'"):
        build("maqd", "weight", {"weight_ste": "soft"}, bits={2: 2})


def test_activation_errors():
    for bad in (1, 257, 2.0, True):
        with pytest.raises(ValueError, match=rf"MaQDActivation: states must be an integer in 2\.\.256, got {bad}"):
            build("maqd", "activation", {"states": bad}, bits={8: 8})
    with pytest.raises(ValueError, match=r"MaQDActivation: 5 states need 3 bits, got 2 at precision 2"):
        build("maqd", "activation", {"states": 5}, bits={2: 2})
    with pytest.raises(ValueError, match=r"MaQDActivation: alpha must be positive and finite, got 0"):
        build("maqd", "activation", {"alpha": 0.0}, bits={2: 2})
    with pytest.raises(ValueError, match=r"MaQDActivation: act_surrogate must be one of .*'ste', got 'tanh'"):
        build("maqd", "activation", {"act_surrogate": "tanh"}, bits={2: 2})
