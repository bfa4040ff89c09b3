"""Integer products of ShiftQuant operands: every form gives the same integers, those of the dequantized product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitstrata.integer import (
    CounterGenerator,
    Geometry,
    ShiftQuantized,
    absorb_shifts,
    absorbed_matmul,
    bias_grad,
    conv_forward,
    conv_input_grad,
    conv_weight_grad,
    float64_matmul,
    group_order,
    grouped_matmul,
    headroom,
    largest_code,
    linear_forward,
    linear_input_grad,
    linear_weight_grad,
    product,
    right_shift_matmul,
    shift_matmul,
    shift_quantize,
    split_shifts,
    weight_codes,
)

WORKED = torch.tensor([[7, 1, 0.4, 0.2], [-3.5, -1.75, 0.875, -0.05]])
OTHER = torch.tensor([[1, -2], [3, 1], [-7, 4], [2, -5]])  # codes of a weight
FORMS = ("shift", "float64", "grouped", "engine", "absorbed")
INT32_MAX = 2**31 - 1


def gauss(*shape: int, seed: int = 0, spread: float = 6.0, axis: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    scales = torch.exp2(-spread * torch.rand(shape[axis], generator=generator))
    return x * scales.reshape([-1 if d == axis % len(shape) else 1 for d in range(len(shape))])


def random_codes(*shape: int, bits: int, seed: int = 0) -> Tensor:
    largest = largest_code(bits)
    return torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def operand(rows: int, inner: int, bits: int, groups: int, *, signed: bool = True) -> ShiftQuantized:
    """The worst codes there are, and every exponent."""
    x = shift_quantize(gauss(rows, inner, seed=bits, spread=groups + 1.0), bits, groups)
    if not signed:
        x = shift_quantize(x.dequantize().abs(), bits, groups, unsigned_nonneg=True)
    codes = x.codes.clone()
    codes[0] = x.largest
    codes[1] = -x.largest if signed else 0
    return replace(x, codes=codes, exponents=(torch.arange(inner) % groups).to(torch.uint8))


def test_worked_product():
    x = shift_quantize(WORKED, 4)
    for form in FORMS:
        assert product(form, x, OTHER, 4).tolist() == [[63, -102], [-123, 78]]
    result = shift_matmul(x, OTHER).double() * x.scale.double() / 8
    assert result.tolist() == [[7.875, -12.75], [-15.375, 9.75]]
    assert torch.equal(result, x.dequantize(torch.float64) @ OTHER.double())
    assert right_shift_matmul(x, OTHER).tolist() == [[7, -14], [-17, 9]]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_form_gives_the_same_integers(bits, groups, signed):
    x, other = operand(6, 40, bits, groups, signed=signed), random_codes(40, 7, bits=bits)
    expected = shift_matmul(x, other)
    by_hand = sum(
        (x.codes[:, c : c + 1].long() * other[c].long()) << int(groups - 1 - x.exponents[c]) for c in range(40)
    )
    assert torch.equal(expected, by_hand)
    assert torch.equal(grouped_matmul(x, other), expected)
    assert torch.equal(float64_matmul(x, other), expected)
    exact = (x.codes.double() * torch.exp2(-x.exponents.double())) @ other.double()  # every term a multiple of 2^-7
    assert torch.equal(expected.double() * 2.0 ** (1 - groups), exact)
    if groups - 1 <= 16 - 2 * bits:
        absorbed = absorbed_matmul(x, other, bits)
        assert absorbed.dtype == torch.int32
        assert torch.equal(absorbed.long(), expected)


def test_right_shift_only_approximates():
    x, other = operand(6, 40, 4, 4), random_codes(40, 7, bits=4)
    exact = shift_matmul(x, other).double() / 8
    error = exact - right_shift_matmul(x, other).double()
    assert float(error.min()) >= 0
    assert 0 < float(error.max()) < 40


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("other_bits", range(2, 9))
@pytest.mark.parametrize("groups", range(1, 9))
def test_absorbed_shifts_fit_eight_bits(bits, other_bits, groups):
    if groups - 1 > 16 - bits - other_bits:
        with pytest.raises(
            ValueError, match=f"{groups} groups shift by up to {groups - 1}, but operands of {bits} and"
        ):
            split_shifts(bits, groups, other_bits=other_bits)
        return
    split = split_shifts(bits, groups, other_bits=other_bits)
    assert split.first + split.second == groups - 1
    assert largest_code(bits) << split.first <= 127
    assert largest_code(bits, signed=False) << split.first <= 255
    assert largest_code(other_bits) << split.second <= 127
    first, second = split.parts(torch.arange(groups))
    assert (first + second).tolist() == list(range(groups))
    assert int(first.max()) <= split.first
    assert int(second.max()) <= split.second


def test_splits_at_four_groups():
    splits = {b: (split_shifts(b).first, split_shifts(b).second) for b in range(2, 7)}
    assert splits == {2: (3, 0), 3: (3, 0), 4: (3, 0), 5: (3, 0), 6: (2, 1)}
    for bits in (7, 8):
        with pytest.raises(ValueError, match=r"in 8 bits; use grouped_matmul"):
            split_shifts(bits)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [4, 5, 6])
def test_absorbed_operands_are_eight_bits(bits, signed):
    x, other = operand(4, 16, bits, 4, signed=signed), random_codes(16, 5, bits=bits)
    left, right = absorb_shifts(x, other, bits)
    assert (left.dtype, right.dtype) == (torch.int8 if signed else torch.uint8, torch.int8)
    assert torch.equal(left.long() @ right.long(), shift_matmul(x, other))
    assert int(left.long().abs().max()) == x.largest << split_shifts(bits).first


def test_headroom():
    rooms = {b: headroom(b) for b in (4, 6, 8)}
    assert {b: r.product for b, r in rooms.items()} == {4: 392, 6: 7688, 8: 129032}
    assert {b: r.limit for b, r in rooms.items()} == {4: 5478274, 6: 279329, 8: 16643}
    assert headroom(8, 1).limit == 133144
    assert headroom(8, 1, 128 * 32 * 32).fits
    for bits in (4, 6, 8):
        limit = rooms[bits].limit
        assert rooms[bits].product * limit <= INT32_MAX < rooms[bits].product * (limit + 1)
        assert headroom(bits, inner=limit).fits
        assert not headroom(bits, inner=limit + 1).fits
    assert headroom(4, 4, other_bits=8).product == 7 * 127 * 8
    assert headroom(8, 1, signed=False).product == 255 * 127


def test_absorbed_product_at_the_limit_of_int32():
    limit = headroom(6).limit
    ones = torch.ones(1, limit, dtype=torch.int8)
    x = ShiftQuantized(31 * ones, torch.zeros(limit, dtype=torch.uint8), torch.tensor(1.0), 6, 1, 4)
    other = (31 * ones).T
    assert absorbed_matmul(x, other, 6).tolist() == [[7688 * limit]]
    more = replace(x, codes=torch.cat([x.codes, x.codes[:, :1]], 1), exponents=torch.zeros(limit + 1).byte())
    with pytest.raises(ValueError, match=f"inner dimension {limit + 1} is beyond the {limit} that int32"):
        absorbed_matmul(more, torch.cat([other, other[:1]]), 6)


def test_weight_gradient_at_the_limit_of_int32():
    limit = headroom(8, 1).limit
    codes = torch.full((limit + 1, 1), 127, dtype=torch.int8)
    most = ShiftQuantized(codes[:-1], torch.zeros(1, dtype=torch.uint8), torch.tensor(1.0), 8, 1, 1)
    exact = 127 * 127 * limit
    for form in FORMS:
        assert linear_weight_grad(most, most, form=form, dtype=torch.float64).tolist() == [[exact]]
    more = replace(most, codes=codes)
    assert linear_weight_grad(more, more, dtype=torch.float64).tolist() == [[exact + 127 * 127]]
    with pytest.raises(
        ValueError, match=f"plain_product: inner dimension {limit + 1} is beyond the {limit} that int32"
    ):
        linear_weight_grad(more, more, form="absorbed")


def test_float64_form_refuses_what_it_cannot_hold_exactly():
    x, other = operand(2, 4, 8, 8), torch.full((4, 1), 2**40)
    with pytest.raises(ValueError, match=r"float64_matmul: sums may reach \d+, beyond the 2\^53"):
        float64_matmul(x, other)


def test_group_order():
    order, counts = group_order(torch.tensor([2, 0, 3, 0, 2]), 4)
    assert order.tolist() == [1, 3, 0, 4, 2]
    assert counts == [2, 0, 2, 1]


def test_weight_codes_of_the_worked_example():
    w = torch.tensor([[0.7, -0.3], [0.1, 0.06]])
    out, inner = weight_codes(w, 4, "out"), weight_codes(w, 4, "in")
    assert out.codes.tolist() == [[7, -3], [7, 4]]
    assert out.scale.tolist() == pytest.approx([0.1, 0.0142857], abs=1e-7)
    assert inner.codes.tolist() == [[7, -7], [1, 1]]
    assert inner.scale.tolist() == pytest.approx([0.1, 0.0428571], abs=1e-7)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_weight_codes_of_each_channel_of_a_grouped_convolution(groups):
    w = gauss(8, 3, 3, 2, spread=3)
    inner = weight_codes(w, 5, "in", groups)
    assert inner.scale.shape == (3 * groups,)
    for c in range(3 * groups):
        group, i = divmod(c, 3)
        own = w[group * 8 // groups : (group + 1) * 8 // groups, i]
        scale = own.abs().max() / 15
        assert float(inner.scale[c]) == float(scale)
        codes = inner.codes[group * 8 // groups : (group + 1) * 8 // groups, i]
        assert torch.equal(codes, (own / scale).round().to(torch.int8))
    assert float((inner.dequantize() - w).abs().max()) <= float(inner.scale.max()) * 0.5001
    out = weight_codes(w, 5, "out", groups)
    assert torch.equal(out.scale, w.abs().amax(dim=(1, 2, 3)) / 15)
    assert float((out.dequantize() - w).abs().max()) <= float(out.scale.max()) * 0.5001


def linear_case(bits: int, groups: int) -> tuple[ShiftQuantized, ShiftQuantized, Tensor]:
    x = shift_quantize(gauss(3, 5, 12, axis=2), bits, groups, 2)
    g = shift_quantize(
        gauss(3, 5, 9, axis=2, seed=1), bits, groups, 2, rounding="stochastic", generator=CounterGenerator(0)
    )
    return x, g, gauss(9, 12, seed=2, spread=2)


@pytest.mark.parametrize(("bits", "groups"), [(4, 4), (6, 4), (8, 4), (4, 1), (2, 8)])
def test_linear_products_are_those_of_the_dequantized_tensors(bits, groups):
    x, g, w = linear_case(bits, groups)
    out, inner = weight_codes(w, bits, "out"), weight_codes(w, bits, "in")
    double = torch.float64
    xd, gd = x.dequantize(double), g.dequantize(double)
    close = {"rtol": 1e-12, "atol": 1e-12}
    y, gx = linear_forward(x, out, dtype=double), linear_input_grad(g, inner, dtype=double)
    assert torch.allclose(y, xd @ out.dequantize(double).T, **close)
    assert torch.allclose(gx, gd @ inner.dequantize(double), **close)
    gw = linear_weight_grad(g, x, dtype=double)
    assert torch.allclose(gw, gd.flatten(0, 1).T @ xd.flatten(0, 1), **close)
    assert torch.allclose(bias_grad(g, dtype=double), gd.sum((0, 1)), **close)
    for form in FORMS if groups - 1 <= 16 - 2 * bits else FORMS[:4]:
        assert torch.equal(linear_forward(x, out, form=form, dtype=double), y)
        assert torch.equal(linear_input_grad(g, inner, form=form, dtype=double), gx)
        assert torch.equal(linear_weight_grad(g, x, form=form, dtype=double), gw)
    assert torch.allclose(linear_forward(x, out).double(), y, rtol=2**-22, atol=0)  # two roundings to float32
    assert linear_weight_grad(g, x).dtype == torch.float32


def test_linear_products_with_scales_of_powers_of_two_are_exact():
    x, g, w = linear_case(4, 4)
    x, g = (replace(t, scale=torch.tensor(s)) for t, s in ((x, 0.25), (g, 2.0**-20)))
    out, inner = (weight_codes(w, 4, side) for side in ("out", "in"))
    out, inner = (replace(t, scale=torch.exp2(-torch.arange(t.scale.numel()).float())) for t in (out, inner))
    double = torch.float64
    xd, gd = x.dequantize(double), g.dequantize(double)
    assert torch.equal(linear_forward(x, out, dtype=double), xd @ out.dequantize(double).T)
    assert torch.equal(linear_input_grad(g, inner, dtype=double), gd @ inner.dequantize(double))
    assert torch.equal(linear_weight_grad(g, x, dtype=double), gd.flatten(0, 1).T @ xd.flatten(0, 1))
    assert torch.equal(bias_grad(g, dtype=double), gd.sum((0, 1)))


CONVOLUTIONS = [  # channels in and out, kernel, size, geometry
    (4, 6, (3, 3), (7, 6), Geometry(padding=1)),
    (4, 6, (3, 3), (8, 7), Geometry(stride=2, padding=1)),
    (6, 4, (3, 2), (9, 8), Geometry(stride=(2, 1), padding=(0, 2), dilation=(1, 2))),
    (6, 9, (1, 1), (5, 4), Geometry(stride=3)),
    (6, 4, (3, 3), (6, 6), Geometry(padding=1, groups=2)),
    (6, 6, (3, 3), (7, 7), Geometry(stride=2, padding=2, dilation=2, groups=6)),
    (4, 8, (3,), (11,), Geometry(stride=2, padding=1, groups=2)),
    (4, 5, (4,), (9,), Geometry(dilation=(2,))),
]


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_products_are_those_of_the_dequantized_tensors(case, bits):
    ins, outs, kernel, size, geometry = case
    convolve = F.conv2d if len(size) == 2 else F.conv1d
    options = {name: getattr(geometry, name) for name in ("stride", "padding", "dilation", "groups")}
    x = shift_quantize(gauss(2, ins, *size), bits)
    w = gauss(outs, ins // geometry.groups, *kernel, seed=1, spread=2)
    out, inner = (weight_codes(w, bits, side, geometry.groups) for side in ("out", "in"))
    double = torch.float64
    xd = x.dequantize(double).requires_grad_()
    wd = inner.dequantize(double).requires_grad_()
    y = convolve(xd, wd, **options)
    g = shift_quantize(gauss(*y.shape, seed=2), bits, rounding="stochastic", generator=CounterGenerator(3))
    y.backward(g.dequantize(double))
    close = {"rtol": 1e-12, "atol": 1e-12}
    forward = conv_forward(x, out, geometry, dtype=double)
    assert forward.shape == y.shape
    assert torch.allclose(forward, convolve(xd.detach(), out.dequantize(double), **options), **close)
    input_grad = conv_input_grad(g, inner, size, geometry, dtype=double)
    assert torch.allclose(input_grad, xd.grad, **close)
    weight_grad = conv_weight_grad(g, x, kernel, geometry, dtype=double)
    assert weight_grad.shape == w.shape
    assert torch.allclose(weight_grad, wd.grad, **close)
    assert torch.allclose(bias_grad(g, dtype=double), g.dequantize(double).transpose(0, 1).flatten(1).sum(1), **close)
    for form in FORMS[1:]:
        assert torch.equal(conv_forward(x, out, geometry, form=form, dtype=double), forward)
        assert torch.equal(conv_input_grad(g, inner, size, geometry, form=form, dtype=double), input_grad)
        assert torch.equal(conv_weight_grad(g, x, kernel, geometry, form=form, dtype=double), weight_grad)


def test_unsigned_activations_in_a_convolution():
    x = shift_quantize(gauss(2, 4, 6, 6).relu(), 4, unsigned_nonneg=True)
    w = weight_codes(gauss(3, 4, 3, 3, seed=1), 4)
    expected = F.conv2d(x.dequantize(torch.float64), w.dequantize(torch.float64), padding=1)
    for form in FORMS:
        result = conv_forward(x, w, Geometry(padding=1), form=form, dtype=torch.float64)
        assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_zeros_give_zeros():
    zero = shift_quantize(torch.zeros(2, 3), 4)
    x = gauss(2, 3)
    x[:, 1] = 0
    some = shift_quantize(x, 4)
    w = torch.zeros(5, 3)
    w[1] = torch.tensor([1.0, 0, -1])
    out, inner = weight_codes(w, 4, "out"), weight_codes(w, 4, "in")
    assert torch.equal(linear_forward(zero, out), torch.zeros(2, 5))
    y = linear_forward(some, out)
    assert bool(y.isfinite().all())
    assert torch.equal(y[:, [0, 2, 3, 4]], torch.zeros(2, 4))
    g = shift_quantize(torch.zeros(2, 5), 4, rounding="stochastic", generator=CounterGenerator(0))
    assert torch.equal(linear_input_grad(g, inner), torch.zeros(2, 3))
    assert torch.equal(linear_weight_grad(g, some), torch.zeros(5, 3))
    assert torch.equal(bias_grad(g), torch.zeros(5))
    image = shift_quantize(torch.zeros(1, 3, 4, 4), 4)
    assert torch.equal(conv_forward(image, weight_codes(torch.zeros(2, 3, 3, 3), 4)), torch.zeros(1, 2, 2, 2))


FORM_NAMES = "shift, float64, grouped, absorbed, engine"
X4 = shift_quantize(WORKED, 4)
IMAGE = shift_quantize(gauss(1, 4, 5, 5), 4)
KERNEL = gauss(6, 4, 3, 3, seed=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shift_matmul(X4, OTHER[:3]), r"shift_matmul: other must be \(4, columns\), got \(3, 2\)"),
        (
            lambda: grouped_matmul(X4, OTHER.float()),
            r"grouped_matmul: other must hold integer codes, got torch\.float32",
        ),
        (lambda: shift_matmul(IMAGE, OTHER), r"x must be \(rows, inner\) with groups along axis 1, got \(1, 4, 5, 5\)"),
        (lambda: shift_matmul(shift_quantize(WORKED, 4, axis=0), OTHER), r"got \(2, 4\), axis 0"),
        (lambda: product("fast", X4, OTHER, 4), f"form must be one of {FORM_NAMES}, got 'fast'"),
        (lambda: linear_weight_grad(X4, X4, form="fast"), f"form must be one of {FORM_NAMES}"),
        (lambda: absorb_shifts(X4, 8 * OTHER, 4), r"absorb_shifts: other must be codes of 4 bits, -7\.\.7"),
        (lambda: headroom(4, 4, 0), "headroom: inner must be at least 1, got 0"),
        (lambda: headroom(9), r"headroom: bits must be an integer in 2\.\.8, got 9"),
        (lambda: split_shifts(4, 9), r"split_shifts: groups must be an integer in 1\.\.8, got 9"),
        (lambda: weight_codes(KERNEL, 4, "row"), "weight_codes: side must be 'out' or 'in', got 'row'"),
        (lambda: weight_codes(KERNEL[0, 0, 0], 4), r"weight must be \(out, in, \.\.\.\), got shape \(3,\)"),
        (lambda: weight_codes(KERNEL, 4, "in", 4), "conv_groups must divide the 6 outputs, got 4"),
        (
            lambda: linear_forward(X4, weight_codes(OTHER.float().T, 4, "in")),
            "must have scales of side 'out', got 'in'",
        ),
        (lambda: linear_input_grad(X4, weight_codes(OTHER.float(), 4)), "must have scales of side 'in', got 'out'"),
        (lambda: linear_weight_grad(X4, shift_quantize(WORKED[:1], 4)), r"g \(2, 4\) and x \(1, 4\) must agree"),
        (lambda: linear_weight_grad(IMAGE, IMAGE), "groups must lie along the last axis, got axis 1"),
        (lambda: conv_forward(X4, weight_codes(KERNEL, 4)), r"does not fit 4 input channels and 0 spatial"),
        (lambda: conv_forward(IMAGE, weight_codes(KERNEL, 4), Geometry(groups=2)), "groups=2 does not fit 4 input"),
        (lambda: conv_forward(IMAGE, weight_codes(KERNEL, 4), Geometry(stride=(1,))), r"stride \(1,\) has 1 sizes"),
        (
            lambda: conv_input_grad(IMAGE, weight_codes(KERNEL, 4, "in"), (5, 5)),
            r"g \(1, 4, 5, 5\) is not the result for size \(5, 5\) and weight \(6, 4, 3, 3\), \(samples, 6, 3, 3\)",
        ),
        (lambda: conv_weight_grad(IMAGE, IMAGE, (3, 3)), r"is not a result for x \(1, 4, 5, 5\), kernel \(3, 3\)"),
        (
            lambda: conv_forward(IMAGE, weight_codes(KERNEL, 4), Geometry(dilation=3)),
            r"kernel \(3, 3\) with dilation 3 does not fit an input of \(5, 5\) with padding 0",
        ),
        (lambda: Geometry(stride=0), "stride must be integers of at least 1, got 0"),
        (lambda: Geometry(padding=(0, -1)), r"padding must be integers of at least 0, got \(0, -1\)"),
        (lambda: Geometry(groups=0), "groups must be at least 1, got 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
