"""DoReFa's quantizers: worked examples of the papers' formulas, gradients, nesting, and the gradient quantizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitstrata.functional.dorefa import dorefa_codes, dorefa_gradient, tanh_normalize
from bitstrata.quantizers import Quantizer, build, build_transform

F64 = torch.float64
W = torch.tensor([[0.2, -0.5, 1.0], [-0.1, 0.3, -0.8]], dtype=F64)
CLAMPED = [[0.25916076, -0.60677613, 1.0], [-0.13086759, 0.38250374, -0.87190371]]
EXAMPLES = {
    1: [[1, -1, 1], [-1, 1, -1]],
    2: [[1 / 3, -1 / 3, 1], [-1 / 3, 1 / 3, -1]],
    3: [[1 / 7, -5 / 7, 1], [-1 / 7, 3 / 7, -1]],
    4: [[0.2, -0.6, 1.0], [-1 / 15, 1 / 3, -13 / 15]],
}


def near(actual: Tensor, expected: object, tolerance: float = 5e-8) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def weight(bits: int, **options: object) -> Quantizer:
    channels = options.pop("channels", None)
    return build("dorefa", "weight", options, bits={bits: bits}, channels=channels).double()


def gradient(quantizer: Quantizer, w: Tensor, upstream: Tensor) -> Tensor:
    w = w.clone().requires_grad_()
    quantizer(w).backward(upstream)
    return w.grad


def random_weight(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    w.view(-1)[:3] = torch.tensor([0.0, -1e-12, 1e-12], dtype=F64)
    return w.to(dtype)


# ---- weights


def test_clamp():
    near(tanh_normalize(W), CLAMPED)
    near(build_transform("tanh", {})(W), CLAMPED)


@pytest.mark.parametrize("bits", EXAMPLES)
def test_weight_values(bits):
    near(weight(bits)(W), EXAMPLES[bits], 1e-15)


@pytest.mark.parametrize("detach", [False, True])
def test_gradient_through_tanh_and_maximum(detach):
    upstream = torch.tensor([[1.0, 0, 0], [0, 1, 0]], dtype=F64)
    expected = [[1.26188335, 0, 0.0 if detach else -0.3538402], [0, 1.20160712, 0]]
    near(gradient(weight(2, detach_max=detach), W, upstream), expected)


@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("bits", [1, 2, 5])
def test_gradient_is_the_closed_form(bits, channels):
    """dw = (1 - t^2)(G/M - [argmax] sign(t) sum(G t)/M^2), over the tensor or each channel."""
    upstream = torch.tensor([[0.3, -1.2, 0.7], [2.0, 0.0, -0.4]], dtype=F64)
    t = torch.tanh(W)
    expected = torch.zeros_like(W)
    groups = [[0, 1]] if channels is None else [[0], [1]]
    for rows in groups:
        top = max(((r, c) for r in rows for c in range(3)), key=lambda at: abs(float(t[at])))
        peak = float(t[top].abs())
        for r in rows:
            for c in range(3):
                expected[r, c] = float(upstream[r, c]) / peak
        total = sum(float(upstream[r, c] * t[r, c]) for r in rows for c in range(3))
        expected[top] -= float(t[top].sign()) * total / peak**2
    near(gradient(weight(bits, channels=channels), W, upstream), (1 - t**2) * expected, 1e-12)


def test_tied_maxima_share_the_gradient():
    w = torch.tensor([[0.5, -0.5, 0.1]], dtype=F64)
    t = torch.tanh(w)
    upstream = torch.tensor([[0.0, 0.0, 1.0]], dtype=F64)
    share = -t[0, 2] / t[0, 0] ** 2 / 2
    expected = torch.stack([share, -share, 1 / t[0, 0]]).view(1, 3) * (1 - t**2)
    near(gradient(weight(2), w, upstream), expected, 1e-12)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("channels", [None, 4])
def test_gradient_is_that_of_the_quotient(channels, detach):
    w, upstream = random_weight(4, 2, 3).requires_grad_(), random_weight(4, 2, 3)
    quotient = tanh_normalize(w, per_channel=channels is not None, detach_max=detach)
    (expected,) = torch.autograd.grad(quotient, w, upstream)
    near(gradient(weight(3, channels=channels, detach_max=detach), w.detach(), upstream), expected, 1e-12)
    per_channel = channels is not None
    assert detach or torch.autograd.gradcheck(lambda v: tanh_normalize(v, per_channel=per_channel), (w,), atol=1e-6)


def test_channels_have_their_own_maximum():
    w = W * torch.tensor([[1.0], [0.01]], dtype=F64)
    apart, together = weight(4, channels=2), weight(4)
    assert apart.grid().scale.numel() == 2
    assert float(apart(w)[1].abs().max()) == pytest.approx(1.0)
    assert float(together(w)[1].abs().max()) == pytest.approx(1 / 15)
    assert torch.equal(apart(w)[1:], weight(4)(w[1:]))


@pytest.mark.parametrize(("scheme", "shift"), [("modified", 0.0), ("centered", 0.5)])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_floor_schemes(scheme, shift, bits):
    """AdaBits: floor(2^b (x + 1)/2), at most 2^b - 1, plus 0 or 1/2, over 2^b, on [-1, 1]."""
    x = torch.tanh(W) / torch.tanh(W).abs().max()
    levels = torch.floor(2**bits * (x + 1) / 2).clamp_max(2**bits - 1)
    near(weight(bits, scheme=scheme)(W), 2 * (levels + shift) / 2**bits - 1, 1e-15)
    assert not torch.equal(weight(bits, scheme=scheme)(W), weight(bits)(W)) or (scheme, bits) == ("centered", 1)


@pytest.mark.parametrize("one_bit", ["sat", "mean"])
@pytest.mark.parametrize("scheme", ["modified", "centered"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_floor_schemes_nest(scheme, one_bit, dtype):
    options = {"scheme": scheme, "one_bit": one_bit}
    quantizer = build("dorefa", "weight", options, bits={b: b for b in range(1, 9)}).to(dtype)
    w = random_weight(8, 40, dtype=dtype)
    assert quantizer.nested
    quantizer.precision = 8
    widest = quantizer.codes(w)
    assert (int(widest.min()), int(widest.max())) in {(-128, 126), (-127, 127), (-128, 127)}
    for b in range(1, 8):
        quantizer.precision = b
        assert torch.equal(quantizer.codes(w), widest >> (8 - b))


def test_the_rounding_scheme_does_not_nest():
    quantizer = build("dorefa", "weight", {}, bits={2: 2, 4: 4}).double()
    assert not quantizer.nested
    codes = {}
    for p in (2, 4):
        quantizer.precision = p
        codes[p] = quantizer.codes(W)
        near(quantizer(W), EXAMPLES[p], 1e-15)
    assert not torch.equal(codes[4] >> 2, codes[2])


def test_one_bit_with_the_mean():
    w = torch.tensor([0.3, -0.1, 0.5, -0.7, 0.2, 0.0], dtype=F64)
    quantizer = weight(1, one_bit="mean")
    near(quantizer(w), [0.3, -0.3, 0.3, -0.3, 0.3, 0.3], 1e-15)
    assert quantizer.grid(w).scale.tolist() == pytest.approx([0.6])
    upstream = torch.tensor([1.0, 2, -3, 4, 0, 6], dtype=F64)
    assert torch.equal(gradient(quantizer, w, upstream), upstream)
    near(weight(1)(w), [1.0, -1, 1, -1, 1, -1], 1e-15)  # a zero is a tie at one bit: half to even
    assert torch.equal(weight(2, one_bit="mean")(w), weight(2)(w))


def test_one_bit_mean_of_each_channel():
    quantizer = weight(1, one_bit="mean", channels=2)
    near(quantizer.grid(W).scale, (2 * W.abs().mean(dim=1)).tolist(), 1e-15)
    near(quantizer(W).abs(), W.abs().mean(dim=1, keepdim=True).expand(2, 3), 1e-15)


@pytest.mark.parametrize("options", [{}, {"scheme": "modified"}, {"scheme": "centered"}, {"one_bit": "mean"}])
@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_forward_is_the_grid_of_the_codes(options, channels, dtype):
    dense = random_weight(6, 3, 3, 4, dtype=dtype)
    for b in range(1, 9):
        quantizer = build("dorefa", "weight", options, bits={b: b}, channels=channels).to(dtype)
        value, grid, codes = quantizer(dense), quantizer.grid(dense), quantizer.codes(dense)
        assert torch.equal(value, grid.dequantize(codes))
        assert value.dtype == grid.scale.dtype == dtype
        assert grid.lo <= int(codes.min()) <= int(codes.max()) <= grid.hi
        for layout in (dense.to(memory_format=torch.channels_last), dense.transpose(2, 3).contiguous().transpose(2, 3)):
            assert torch.equal(quantizer(layout), value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"one_bit": "mean"}])
def test_half_precision_rounds_once(dtype, options):
    w = random_weight(5, 30).to(dtype)
    for b in (1, 4, 8):
        quantizer = build("dorefa", "weight", options, bits={b: b})
        assert torch.equal(quantizer.codes(w), quantizer.codes(w.float()))
        assert torch.equal(quantizer(w), quantizer(w.float()).to(dtype))
        assert gradient(quantizer, w, torch.ones_like(w)).dtype == dtype


@pytest.mark.parametrize("options", [{}, {"scheme": "modified"}, {"one_bit": "mean"}])
@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("bits", [1, 3])
def test_all_zero_and_constant_weights_are_finite(options, channels, bits):
    quantizer = build("dorefa", "weight", options, bits={bits: bits}, channels=channels)
    mixed = torch.tensor([[0.0, 0.0], [0.5, 0.5]])
    for w in (torch.zeros(2, 2), torch.full((2, 2), 0.3), torch.full((2, 2), 1e-40), mixed):
        assert bool(torch.isfinite(quantizer(w)).all())
        assert bool(torch.isfinite(gradient(quantizer, w, torch.ones(2, 2))).all())


def test_all_zero_weights_take_the_codes_of_zero():
    assert weight(2)(torch.zeros(2, 2, dtype=F64)).tolist() == [[pytest.approx(1 / 3)] * 2] * 2
    assert weight(3, scheme="modified")(torch.zeros(2, 2, dtype=F64)).tolist() == [[0.0, 0.0]] * 2


def test_nan_weights_stay_visible():
    assert bool(torch.isnan(weight(3)(torch.tensor([[1.0, float("nan")]], dtype=F64))).all())


def test_deviation_of_the_quantized_weight_nears_that_of_the_clamped():
    """SAT figure S3: the ratio of the deviations falls to 1 with the bits."""
    ratios: dict[int, float] = {}
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=F64)
    for b in (1, 2, 3, 4, 8):
        ratios[b] = float(weight(b)(w).std() / tanh_normalize(w).std())
    assert sorted(ratios.values(), reverse=True) == list(ratios.values())
    assert ratios[1] == pytest.approx(w.numel() ** 0.5 / (w.numel() - 1) ** 0.5 / float(tanh_normalize(w).std()), 1e-3)
    assert ratios[2] > 1.1
    assert ratios[4] == pytest.approx(1, abs=0.02)
    assert ratios[8] == pytest.approx(1, abs=2e-3)


def test_values_beyond_one_end_at_one():
    v = torch.tensor([[-5.0, 5.0]], dtype=F64)
    assert weight(2)(v).tolist() == [[-1.0, 1.0]]


def test_bad_weight_options():
    with pytest.raises(ValueError, match=r"DoReFaWeight: scheme must be one of original, modified, centered, got 'up'"):
        weight(2, scheme="up")
    with pytest.raises(ValueError, match=r"DoReFaWeight: one_bit must be 'sat' or 'mean', got 'sign'"):
        weight(1, one_bit="sign")
    with pytest.raises(ValueError, match=r"DoReFaWeight: grid needs the tensor x: with one_bit='mean'"):
        weight(1, one_bit="mean").grid()


def test_floor_codes_are_exact_next_to_zero():
    tiny = torch.tensor([-1e-30, 0.0, 1e-30, 1.0, -1.0])
    assert dorefa_codes(tiny, 3, "modified").tolist() == [-1, 0, 0, 3, -4]


# ---- activations


def test_activation_values_and_gradient():
    x = torch.tensor([-0.2, 0.1, 0.2, 0.5, 0.7, 1.4, 0.0, 1.0], dtype=F64, requires_grad=True)
    quantizer = build("dorefa", "activation", {}, bits={2: 2}, signed=True).double()
    y = quantizer(x)
    near(y.detach(), [0, 0, 1 / 3, 2 / 3, 2 / 3, 1, 0, 1], 1e-15)
    assert quantizer.codes(x).tolist() == [0, 0, 1, 2, 2, 3, 0, 3]
    upstream = torch.arange(1.0, 9.0, dtype=F64)
    y.backward(upstream)
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0, 7, 8]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_activation_contract(bits, dtype):
    quantizer = build("dorefa", "activation", {}, bits={bits: bits}, signed=True, shared=True).to(dtype).eval()
    x = random_weight(3, 2, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    assert torch.equal(quantizer(x), quantizer.grid().dequantize(quantizer.codes(x)))
    assert quantizer(x).dtype == dtype
    assert not list(quantizer.parameters())
    assert not quantizer.state_dict()
    half = x.to(torch.bfloat16)
    assert torch.equal(quantizer(half), quantizer(half.to(dtype)).to(torch.bfloat16))
    assert quantizer(torch.tensor([0.5, float("nan")], dtype=dtype)).isnan().tolist() == [False, True]


# ---- gradients


def test_gradient_without_noise():
    grad = torch.tensor([[1.0, -0.5, 0.2], [2.0, -1.0, 0.4], [0, 0, 0]], dtype=F64)
    expected = [[1, -1 / 3, 1 / 3], [2, -2 / 3, 2 / 3], [0, 0, 0]]
    near(dorefa_gradient(grad, 2, torch.zeros(())), expected, 1e-15)


def test_gradient_noise_is_one_step_wide():
    """q_k(v + noise/(2^k - 1)): the noise moves a value at most to the next level."""
    grad = torch.tensor([[1.0, -0.5, 0.2]], dtype=F64)
    near(dorefa_gradient(grad, 2, torch.tensor([[0.0, -0.49, -0.49]], dtype=F64)), [[1, -1, -1 / 3]], 1e-15)
    near(dorefa_gradient(grad, 2, torch.tensor([[0.0, 0.2, -0.2]], dtype=F64)), [[1, -1 / 3, 1 / 3]], 1e-15)


def test_stochastic_gradient_is_unbiased_and_drawn_anew():
    grad = torch.tensor([1.0, -0.5, 0.2, 0.0], dtype=F64).repeat(20_000, 1)
    torch.manual_seed(0)
    drawn = dorefa_gradient(grad, 2)
    torch.testing.assert_close(drawn[:, 1:].mean(dim=0), grad[0, 1:], rtol=0, atol=0.015)
    assert {round(v, 6) for v in drawn[:, 1].tolist()} == {-1.0, -0.333333}
    assert not torch.equal(drawn, dorefa_gradient(grad, 2))


def test_gradient_keeps_dtype_and_checks_arguments():
    assert dorefa_gradient(torch.ones(2, 3, dtype=torch.bfloat16), 4).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dorefa_gradient: bits must be at least 1, got 0"):
        dorefa_gradient(torch.ones(2, 3), 0)
    with pytest.raises(ValueError, match=r"dorefa_gradient: grad must be \(samples, ...\), got shape \(3,\)"):
        dorefa_gradient(torch.ones(3), 2)
