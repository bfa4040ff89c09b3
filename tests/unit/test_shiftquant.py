"""ShiftQuant: groups, codes, packing; and the quantizers it is compared with."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitstrata.integer import (
    CounterGenerator,
    ShiftQuantized,
    affine_quantize,
    channel_quantize,
    group_bits,
    group_exponents,
    grouping_cost,
    hadamard_block,
    hadamard_quantize,
    hadamard_transform,
    largest_code,
    optimal_groups,
    pack_bits,
    pack_codes,
    pack_groups,
    shift_quantize,
    tensor_quantize,
    unpack_bits,
    unpack_codes,
    unpack_groups,
)

RANGES = [8, 5, 4, 3.9, 2.1, 2, 1, 0.9, 0.5, 0.1, 0]
WORKED = torch.tensor([[7, 1, 0.4, 0.2], [-3.5, -1.75, 0.875, -0.05]])
BITS = range(2, 9)
DTYPES = [torch.float32, torch.float64]


def gauss(*shape: int, seed: int = 0, spread: float = 0.0, axis: int = 1) -> Tensor:
    """Normal numbers, the channels along `axis` scaled by powers of two from 2^-spread to 1."""
    axis %= len(shape)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    scales = torch.exp2(-spread * torch.rand(shape[axis], generator=generator))
    return x * scales.reshape([-1 if d == axis else 1 for d in range(len(shape))])


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (1, [0] * 11),
        (2, [0, 0, *[1] * 9]),
        (4, [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3]),
        (8, [0, 0, 1, 1, 1, 2, 3, 3, 4, 6, 7]),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_the_worked_example(groups, expected, dtype):
    exponents = group_exponents(torch.tensor(RANGES, dtype=dtype), groups)
    assert exponents.tolist() == expected
    assert exponents.dtype == torch.uint8


@pytest.mark.parametrize("groups", range(1, 9))
def test_groups_follow_their_definition(groups):
    ranges = torch.exp2(torch.linspace(-12, 3, 200)).tolist() + [2.0**k for k in range(-9, 4)] + [0.0]
    ranges += [math.nextafter(2.0**k, math.inf) for k in range(-9, 3)]
    tau = Fraction(max(ranges))
    expected = [max(e for e in range(groups) if Fraction(r) <= tau / 2**e) for r in ranges]
    assert group_exponents(torch.tensor(ranges, dtype=torch.float64), groups).tolist() == expected


@pytest.mark.parametrize("tau", [2.0**-149, 3e-45, 1e-40, 2.0**-126, 1e30, 3.4e38])
def test_groups_at_the_ends_of_float32(tau):
    ranges = torch.tensor([tau, tau / 2, tau / 3, tau / 200, 0.0], dtype=torch.float32)
    exact = [Fraction(r) for r in ranges.tolist()]
    expected = [max(e for e in range(8) if r <= exact[0] / 2**e) for r in exact]
    assert group_exponents(ranges, 8).tolist() == expected


def test_codes_of_the_worked_example():
    q = shift_quantize(WORKED, 4)
    assert float(q.scale) == 1
    assert q.exponents.tolist() == [0, 2, 3, 3]
    assert q.codes.tolist() == [[7, 4, 3, 2], [-4, -7, 7, 0]]
    assert q.dequantize().tolist() == [[7, 1, 0.375, 0.25], [-4, -1.75, 0.875, 0]]
    assert shift_quantize(WORKED, 4, groups=1).codes.tolist() == [[7, 1, 0, 0], [-4, -2, 1, 0]]
    assert tensor_quantize(WORKED, 4).codes.tolist() == [[7, 1, 0, 0], [-4, -2, 1, 0]]
    assert (q.codes.dtype, q.scale.dtype, q.largest, q.axis) == (torch.int8, torch.float32, 7, 1)


class Fixed(CounterGenerator):
    """Uniforms that are given."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(0)
        self.values = values

    def uniform(self, shape, device=None) -> Tensor:
        assert tuple(shape) == tuple(self.values.shape)
        return self.values


def test_stochastic_codes_of_the_worked_example():
    u = torch.tensor([[0, 0.5, 0.25, 0.9], [0.25, 0.6, 0.5, 0.1]])
    assert shift_quantize(WORKED, 4, rounding="stochastic", generator=Fixed(u)).codes.tolist() == [
        [7, 4, 3, 2],
        [-4, -7, 7, -1],
    ]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_quotient_rounded_beyond_the_largest_code_is_clipped(bits):
    taus = torch.rand(1000, generator=torch.Generator().manual_seed(bits)) + 1
    largest = largest_code(bits)
    beyond = [tau for tau in taus if float(tau / (tau / largest)) > largest]
    assert beyond
    for tau in beyond[:5]:
        x = torch.stack([tau, -tau]).reshape(2, 1)
        for u in (0, 1 - 2**-24):
            q = shift_quantize(x, bits, rounding="stochastic", generator=Fixed(torch.full((2, 1), float(u))))
            assert q.codes.tolist() == [[largest], [-largest]]


def test_largest_codes():
    assert [largest_code(b) for b in BITS] == [1, 3, 7, 15, 31, 63, 127]
    assert [largest_code(b, signed=False) for b in BITS] == [3, 7, 15, 31, 63, 127, 255]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("groups", [1, 3, 4, 8])
@pytest.mark.parametrize("bits", BITS)
def test_error_is_within_the_step_and_ranges_are_used(bits, groups, rounding):
    x = gauss(6, 24, 5, seed=bits, spread=9)
    q = shift_quantize(x, bits, groups, rounding=rounding, generator=CounterGenerator(1))
    steps = (q.scale * q.factors()).reshape(1, -1, 1)
    error = (q.dequantize() - x).abs() / steps
    assert float(error.max()) <= (0.5 if rounding == "nearest" else 1) * (1 + 1e-5)
    peak = q.codes.abs().amax(dim=(0, 2))
    assert int(peak.max()) == largest_code(bits)
    inner = q.exponents < groups - 1  # only the last group holds channels narrower than half its range
    if rounding == "nearest":
        assert bool((peak[inner].double() >= math.floor(largest_code(bits) / 2)).all())


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_any_axis(axis):
    x = gauss(4, 6, 3, 5, spread=6, axis=axis)
    q = shift_quantize(x, 4, axis=axis)
    moved = shift_quantize(x.movedim(axis, 1).contiguous(), 4)
    assert torch.equal(q.codes.movedim(axis, 1), moved.codes)
    assert torch.equal(q.exponents, moved.exponents)
    assert torch.equal(q.dequantize().movedim(axis, 1), moved.dequantize())
    assert q.axis == axis % 4


def test_memory_formats_and_vectors():
    x = gauss(4, 6, 3, 5, spread=6)
    expected = shift_quantize(x, 4)
    for y in (x.to(memory_format=torch.channels_last), x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        assert torch.equal(shift_quantize(y, 4).codes, expected.codes)
    vector = shift_quantize(torch.tensor([4.0, -1.0, 0.3]), 4, axis=0)
    assert vector.exponents.tolist() == [0, 2, 3]


def test_dtypes():
    x = gauss(8, 16, spread=8)
    single = shift_quantize(x, 6)
    for dtype in (torch.float16, torch.bfloat16):
        low = shift_quantize(x.to(dtype), 6)
        assert torch.equal(low.codes, shift_quantize(x.to(dtype).float(), 6).codes)
        assert low.dequantize(dtype).dtype == dtype
    double = shift_quantize(x.double(), 6)
    assert torch.equal(double.codes, single.codes)
    assert torch.equal(double.scale, single.scale)
    exact = double.codes.double() * (double.scale.double() * torch.exp2(-double.exponents.double()))
    assert torch.equal(double.dequantize(torch.float64), exact)
    assert torch.equal(double.dequantize(), exact.float())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_zeros(rounding):
    options = {"rounding": rounding, "generator": CounterGenerator(0)}
    for q in (
        shift_quantize(torch.zeros(3, 4), 4, **options),
        tensor_quantize(torch.zeros(3, 4), 4, **options),
        channel_quantize(torch.zeros(3, 4), 4, **options),
        hadamard_quantize(torch.zeros(3, 4), 4, **options),
        affine_quantize(torch.zeros(3, 4), 4, **options),
        affine_quantize(torch.zeros(3, 4), 4, "sample", **options),
    ):
        assert torch.equal(q.dequantize(), torch.zeros(3, 4))
    x = gauss(3, 4)
    x[:, 2] = 0
    for q in (shift_quantize(x, 4, **options), channel_quantize(x, 4, axis=1, **options)):
        assert torch.equal(q.dequantize()[:, 2], torch.zeros(3))
        assert bool(q.dequantize().isfinite().all())
    assert shift_quantize(x, 4, **options).exponents[2] == 3


def test_tiny_and_huge_tensors():
    assert shift_quantize(torch.full((2, 2), 1e-44), 8).codes.tolist() == [[0, 0], [0, 0]]
    assert shift_quantize(torch.full((2, 2), 7 * 2.0**-119), 4).codes.tolist() == [[0, 0], [0, 0]]
    smallest = torch.tensor([[7 * 2.0**-118, 7 * 2.0**-121]])
    q = shift_quantize(smallest, 4)
    assert q.codes.tolist() == [[7, 7]]
    assert torch.equal(q.dequantize(), smallest)
    huge = torch.tensor([[3.4e38, -1e38, 1e20]])
    assert shift_quantize(huge, 8).codes.tolist() == [[127, -75, 0]]
    with pytest.raises(ValueError, match=r"shift_quantize: x reaches 1e\+40, beyond the range of float32"):
        shift_quantize(torch.tensor([[1e40]], dtype=torch.float64), 2)


def test_unsigned_codes_for_tensors_that_are_never_negative():
    x = gauss(5, 8, spread=5).abs()
    plain, more = shift_quantize(x, 4), shift_quantize(x, 4, unsigned_nonneg=True)
    assert plain.signed
    assert not more.signed
    assert (int(more.codes.max()), int(more.codes.min()) >= 0, more.codes.dtype) == (15, True, torch.int8)
    assert float((more.dequantize() - x).square().sum()) < float((plain.dequantize() - x).square().sum())
    byte = shift_quantize(x, 8, unsigned_nonneg=True)
    assert (byte.codes.dtype, int(byte.codes.max())) == (torch.uint8, 255)
    x[0, 0] = -0.01
    assert shift_quantize(x, 4, unsigned_nonneg=True).signed


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [True, False])
def test_packing_codes(bits, signed):
    lo, hi = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    for count in (0, 1, 2, 3, 7, 8, 9, 33):
        codes = torch.arange(count) * 5 % (hi - lo + 1) + lo
        packed = pack_codes(codes, bits, signed)
        stream = sum((int(c) & ((1 << bits) - 1)) << (i * bits) for i, c in enumerate(codes))
        assert bytes(packed.tolist()) == stream.to_bytes(math.ceil(count * bits / 8), "little")
        back = unpack_codes(packed, bits, (count,), signed)
        assert back.tolist() == codes.tolist()
        assert back.dtype == (torch.uint8 if bits == 8 and not signed else torch.int8)


def test_packed_sizes_and_layout():
    assert pack_codes(torch.tensor([1, -1, 7, -7]).to(torch.int8), 4).tolist() == [0xF1, 0x97]
    assert pack_codes(torch.tensor([1, -1, 0, 1]), 2).tolist() == [0b01001101]
    assert [group_bits(n) for n in range(1, 9)] == [0, 1, 2, 2, 3, 3, 3, 3]
    assert pack_groups(torch.tensor([0, 1, 2, 3, 3]), 4).tolist() == [0b11100100, 0b11]


@pytest.mark.parametrize("groups", range(1, 9))
def test_packing_groups(groups):
    for channels in (1, 2, 7, 8, 9, 65):
        exponents = (torch.arange(channels) * 3 % groups).to(torch.uint8)
        packed = pack_groups(exponents, groups)
        assert packed.numel() == math.ceil(channels * group_bits(groups) / 8)
        assert torch.equal(unpack_groups(packed, groups, channels), exponents)


@pytest.mark.parametrize("width", range(9))
def test_packing_bits(width):
    values = (torch.arange(29) * 11 % (1 << width)).to(torch.uint8)
    assert torch.equal(unpack_bits(pack_bits(values, width), width, 29), values)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("unsigned", [True, False])
def test_a_packed_tensor_is_the_same_tensor(bits, unsigned):
    x = gauss(3, 10, 5, 7, spread=6)
    q = shift_quantize(x.abs() if unsigned else x, bits, 5, unsigned_nonneg=unsigned)
    packed = q.pack()
    back = packed.unpack()
    for name in ("codes", "exponents", "scale"):
        assert torch.equal(getattr(back, name), getattr(q, name))
    assert (back.bits, back.axis, back.groups, back.signed) == (q.bits, q.axis, q.groups, not unsigned)
    assert packed.nbytes == math.ceil(x.numel() * bits / 8) + math.ceil(10 * 3 / 8) + 4


@pytest.mark.parametrize("shape", [(32, 16, 8, 8), (128, 64), (2, 64, 7, 7)])
def test_saved_activations_of_four_bits_take_a_seventh_of_float32(shape):
    x = gauss(*shape, spread=5)
    assert 7 * shift_quantize(x, 4).pack().nbytes <= x.numel() * x.element_size()


def test_channel_scales():
    w = torch.tensor([[0.7, -0.3], [0.1, 0.06]])
    out, inner = channel_quantize(w, 4, 0), channel_quantize(w, 4, 1)
    assert out.codes.tolist() == [[7, -3], [7, 4]]
    assert out.scale.reshape(-1).tolist() == pytest.approx([0.1, 0.0142857], abs=1e-7)
    assert inner.codes.tolist() == [[7, -7], [1, 1]]
    assert inner.scale.reshape(-1).tolist() == pytest.approx([0.1, 0.0428571], abs=1e-7)
    assert torch.equal(out.dequantize(), out.codes * out.scale)


def test_int8_in_both_roundings():
    x = gauss(64, 32)
    near, sr = tensor_quantize(x), tensor_quantize(x, rounding="stochastic", generator=CounterGenerator(0))
    assert float(near.scale) == float(x.abs().max() / 127)
    assert torch.equal(near.codes, (x / near.scale).round().to(torch.int8))
    assert int((near.codes.int() - sr.codes.int()).abs().max()) == 1


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64])
def test_hadamard_matrices_are_orthogonal(block):
    h = hadamard_transform(torch.eye(block, dtype=torch.int64), 1, block)
    assert torch.equal(h.abs(), torch.ones(block, block, dtype=torch.int64))
    assert torch.equal(h @ h.T, block * torch.eye(block, dtype=torch.int64))
    assert torch.equal(h, h.T)
    codes = torch.arange(3 * 2 * block).reshape(3, 2 * block)
    twice = hadamard_transform(hadamard_transform(codes, 1, block), 1, block)
    assert torch.equal(twice, block * codes)


def test_hadamard_in_a_product_cancels_and_spreads_outliers():
    assert [hadamard_block(c) for c in (1, 3, 6, 12, 64, 96)] == [1, 1, 2, 4, 32, 32]
    x, w = gauss(8, 24).double(), gauss(24, 5, seed=1).double()
    product = hadamard_transform(x, 1) @ hadamard_transform(w, 0) / hadamard_block(24)
    assert torch.allclose(product, x @ w, rtol=1e-12, atol=1e-12)
    spiky = torch.full((4, 32), 0.1)
    spiky[:, 0] = 7
    q = hadamard_quantize(spiky, 4)
    assert q.block == 32
    assert float((q.dequantize() - spiky).abs().mean()) < float(
        (tensor_quantize(spiky, 4).dequantize() - spiky).abs().mean()
    )
    for axis in (0, 1):
        fine = hadamard_quantize(gauss(16, 24), 8, axis)
        assert float((fine.dequantize() - gauss(16, 24)).abs().max()) < 0.1


def test_affine_per_tensor_and_per_sample():
    x = torch.tensor([[-1.0, 0.0, 2.0], [10.0, 10.5, 13.0]])
    whole = affine_quantize(x, 4)
    assert (float(whole.zero), float(whole.scale)) == (-1, pytest.approx(14 / 15))
    assert whole.codes.tolist() == [[0, 1, 3], [12, 12, 15]]
    each = affine_quantize(x, 2, "sample")
    assert each.zero.tolist() == [[-1], [10]]
    assert each.scale.tolist() == [[1], [1]]
    assert each.codes.tolist() == [[0, 1, 3], [0, 0, 3]]
    assert each.dequantize().tolist() == [[-1, 0, 2], [10, 10, 13]]
    byte = affine_quantize(gauss(4, 5, 6), 8, "sample")
    assert (byte.codes.dtype, byte.scale.shape) == (torch.uint8, (4, 1, 1))
    assert byte.codes.flatten(1).amax(1).tolist() == [255] * 4
    assert affine_quantize(torch.full((2, 3), 5.0), 4).dequantize().tolist() == [[5] * 3] * 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=6, max_size=6),
    st.integers(2, 8),
    st.integers(1, 8),
)
def test_quantizing_what_is_quantized_changes_nothing(values, bits, groups):
    q = shift_quantize(torch.tensor(values).reshape(2, 3), bits, groups)
    again = shift_quantize(q.dequantize(torch.float64), bits, groups)
    assert torch.allclose(again.dequantize(torch.float64), q.dequantize(torch.float64), rtol=1e-6, atol=0)
    assert int(q.codes.abs().max()) <= largest_code(bits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "quantize", [shift_quantize, tensor_quantize, channel_quantize, hadamard_quantize, affine_quantize]
)
def test_numbers_that_are_not_finite(quantize, value):
    x = gauss(2, 4)
    x[1, 2] = value
    with pytest.raises(ValueError, match=r"\w+_quantize: x contains NaN or infinity"):
        quantize(x, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shift_quantize(WORKED, 1), r"shift_quantize: bits must be an integer in 2\.\.8, got 1"),
        (lambda: shift_quantize(WORKED, 9), r"bits must be an integer in 2\.\.8, got 9"),
        (lambda: shift_quantize(WORKED, 4, 0), r"shift_quantize: groups must be an integer in 1\.\.8, got 0"),
        (lambda: shift_quantize(WORKED, 4, 9), r"groups must be an integer in 1\.\.8, got 9"),
        (lambda: shift_quantize(WORKED, 4, axis=2), "axis 2 is out of range for a tensor of 2 dimensions"),
        (lambda: shift_quantize(WORKED.int(), 4), r"x must be floating, got torch\.int32"),
        (lambda: shift_quantize(torch.zeros(0, 4), 4), r"x of shape \(0, 4\) has no elements"),
        (lambda: shift_quantize(WORKED, 4, rounding="up"), "rounding must be 'nearest' or 'stochastic', got 'up'"),
        (lambda: shift_quantize(WORKED, 4, rounding="stochastic"), "shift_quantize: rounding 'stochastic' needs"),
        (lambda: channel_quantize(WORKED, 4, 3), "channel_quantize: axis 3 is out of range"),
        (lambda: group_exponents(WORKED, 4), r"ranges must be \(channels,\), not empty, got shape \(2, 4\)"),
        (lambda: group_exponents(-WORKED[0], 4), "ranges must be finite and not negative"),
        (lambda: group_exponents(torch.tensor([math.nan]), 4), "ranges must be finite and not negative"),
        (lambda: optimal_groups(WORKED[0], 4, "sum"), "objective must be 'ratio' or 'variance', got 'sum'"),
        (lambda: grouping_cost(WORKED[0], WORKED[0, :2]), r"ranges \(4,\) and taus \(2,\) must agree"),
        (lambda: pack_codes(torch.tensor([8]), 4), r"4-bit codes must be in -8\.\.7, got 8\.\.8"),
        (lambda: pack_codes(torch.tensor([-1]), 4, False), r"4-bit codes must be in 0\.\.15, got -1\.\.-1"),
        (lambda: unpack_codes(torch.zeros(3).byte(), 4, (4,)), r"shape \(4,\) at 4 bits takes 2 bytes, got \(3,\)"),
        (lambda: pack_groups(torch.tensor([4]), 4), r"exponents must be in 0\.\.3, got 4\.\.4"),
        (lambda: unpack_groups(torch.tensor([3]).byte(), 3, 1), "found exponent 3, largest for 3 groups is 2"),
        (lambda: unpack_bits(torch.zeros(2), 4, 4), "4 values of 4 bits take 2 bytes"),
        (lambda: hadamard_transform(WORKED, 1, 3), "block must be a power of two that divides 4, got 3"),
        (lambda: hadamard_transform(WORKED, 1, 8), "block must be a power of two that divides 4, got 8"),
        (lambda: affine_quantize(WORKED, 4, "row"), "per must be 'tensor' or 'sample', got 'row'"),
        (lambda: affine_quantize(torch.tensor(1.0), 4, "sample"), "needs a first dimension of samples"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_records_are_frozen():
    q = shift_quantize(WORKED, 4)
    with pytest.raises(AttributeError):
        q.bits = 3
    assert isinstance(q.pack().unpack(), ShiftQuantized)
