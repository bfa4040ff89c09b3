"""The kernels of a training step against their definitions in torch: equal to the bit, on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitstrata.functional.l1norm import L1_SCALES, nearest, quantized_norm
from bitstrata.integer import CounterGenerator, shift_quantize
from bitstrata.integer.groups import pack_bits
from bitstrata.integer.linear import weight_codes
from bitstrata.integer.rounding import CounterRounding
from bitstrata.integer.shiftquant import shift_quantize_reference
from bitstrata_runtime import _engine

ISAS = (*_engine.available_isas(), *_engine.emulated_isas())
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LONG = settings(max_examples=700, deadline=None, suppress_health_check=list(HealthCheck))
SHAPES = st.tuples(
    st.integers(1, 4), st.sampled_from([1, 2, 3, 5, 8, 10, 16, 17, 33, 64, 100, 130, 257, 300]), st.integers(1, 9),
    st.integers(1, 8),
)  # fmt: skip
KINDS = st.sampled_from(["gauss", "spread", "sparse", "zero", "outlier", "whole", "tiny"])


def tensor(shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    """(N, C, H, W) float32 of a kind that rounding or grouping could get wrong."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    per_channel = torch.exp2(-10 * torch.rand(1, shape[1], 1, 1, generator=generator))
    return {
        "gauss": x,
        "spread": x * per_channel,
        "sparse": x * (torch.rand(shape, generator=generator) < 0.1),
        "zero": torch.zeros(shape),
        "outlier": torch.zeros(shape).index_put_((torch.tensor(0),) * 4, torch.tensor(-37.5)),
        "whole": (4 * x).round(),
        "tiny": x * 2.0**-118,
    }[kind]


def rows(x: Tensor) -> Tensor:
    return x.detach().movedim(1, -1).reshape(-1, x.shape[1]).contiguous()


def check_shift_codes(shape: tuple[int, ...], kind: str, seed: int, bits: int, groups: int) -> None:
    x = tensor(shape, kind, seed)
    for noise in (None, (seed, 2**63 + 5)):
        options: dict[str, Any] = (
            {} if noise is None else {"rounding": "stochastic", "generator": CounterGenerator(*noise)}
        )
        want = shift_quantize_reference(x, bits, groups, 1, **options)
        for isa in ISAS:
            for threads in (1, 2):
                out = torch.empty(rows(x).shape, dtype=torch.uint8)
                found = _engine.shift_codes(rows(x), bits, groups, True, False, 1.0, noise, out, None, isa, threads)
                scale, exponents = found
                assert torch.equal(out.view(torch.int8), rows(want.codes))
                assert scale == float(want.scale)
                assert exponents.tolist() == want.exponents.tolist()
            if bits + groups - 1 <= 8:
                _engine.shift_codes(rows(x), bits, groups, True, True, 1.0, noise, out, None, isa, 1)
                shifted = want.codes.int() << want.shifts().int().reshape(1, -1, 1, 1)
                assert torch.equal(out.view(torch.int8).int(), rows(shifted))


@QUICK
@given(shape=SHAPES, kind=KINDS, seed=st.integers(0, 99), bits=st.integers(2, 8), groups=st.integers(1, 8))
def test_shift_codes(shape, kind, seed, bits, groups):
    check_shift_codes(shape, kind, seed, bits, groups)


@pytest.mark.soak
@LONG
@given(shape=SHAPES, kind=KINDS, seed=st.integers(0, 9999), bits=st.integers(2, 8), groups=st.integers(1, 8))
def test_shift_codes_long(shape, kind, seed, bits, groups):
    check_shift_codes(shape, kind, seed, bits, groups)


def check_norm(
    shape: tuple[int, ...], kind: str, seed: int, *, l2: bool, rectify: bool, affine: bool, bits: int
) -> None:
    """Forward, codes, backward and the gradient's codes, against autograd of the definition."""
    x = tensor(shape, kind, seed).requires_grad_()
    generator = torch.Generator().manual_seed(seed + 1)
    scale = "1" if l2 or seed % 2 else "sqrt(pi/2)"
    weight = bias = None
    if affine:
        weight = (torch.rand(1, shape[1], 1, 1, generator=generator) - 0.3).requires_grad_()
        bias = torch.randn(1, shape[1], 1, 1, generator=generator).requires_grad_()
    noise = (seed, 3)
    rounding = CounterRounding(CounterGenerator(*noise)) if seed % 3 else nearest
    y, mean, deviation = quantized_norm(x, weight, bias, (0, 2, 3), bits=bits, l2=l2, l1_scale=scale, rounding=rounding)
    result = y.relu() if rectify else y
    gradient = torch.randn(shape, generator=generator)
    result.backward(gradient)
    key = noise if seed % 3 else None
    for isa in ISAS:
        affines = [None if t is None else t.detach().reshape(-1) for t in (weight, bias)]
        flat = rows(x)
        norm = _engine.Norm(*flat.shape, bits, l2, 1e-5, L1_SCALES[scale], *affines, isa, 1 + seed % 2)
        codes = torch.empty(flat.shape, dtype=torch.int8)
        assert norm.forward(flat, None, None, None, codes)
        assert norm.mean.tolist() == mean.flatten().tolist()
        assert norm.deviation.tolist() == deviation.flatten().tolist()
        out, kept = torch.empty_like(flat), torch.empty((flat.numel() + 7) // 8, dtype=torch.uint8)
        ranges = norm.to_f32(codes, rectify, None, out, kept)
        assert torch.equal(out, rows(result))
        assert ranges.tolist() == rows(result).abs().amax(0).tolist()
        positive = np.unpackbits(kept.numpy(), bitorder="little")[: flat.numel()]
        assert positive.tolist() == (rows(result) > 0).flatten().int().tolist()

        want = shift_quantize_reference(result.detach(), 4, 4, 1)
        small = torch.empty(flat.shape, dtype=torch.uint8)
        found, exponents = norm.to_codes(codes, rectify, 4, 4, True, False, 1.0, None, small)
        assert torch.equal(small.view(torch.int8), rows(want.codes))
        assert (found, exponents.tolist()) == (float(want.scale), want.exponents.tolist())

        of_y, dx = torch.empty(flat.shape, dtype=torch.int8), torch.empty_like(flat)
        assert norm.backward(rows(gradient), None, None, codes, rectify, key, of_y)
        norm.gradient_f32(of_y, codes, dx)
        assert torch.equal(dx, rows(x.grad))
        if affine:
            assert norm.weight_gradient.tolist() == weight.grad.flatten().tolist()
            assert norm.bias_gradient.tolist() == bias.grad.flatten().tolist()
        want = shift_quantize_reference(x.grad, 4, 4, 1, rounding="stochastic", generator=CounterGenerator(7, 1))
        found, exponents = norm.gradient_codes(of_y, codes, 4, 4, False, (7, 1), small)
        assert torch.equal(small.view(torch.int8), rows(want.codes))
        assert (found, exponents.tolist()) == (float(want.scale), want.exponents.tolist())
        norm.gradient_codes(of_y, codes, 4, 4, False, (7, 1), of_y.view(torch.uint8))  # in the gradient's place
        assert torch.equal(of_y, rows(want.codes))


NORMS = {
    "shape": SHAPES.filter(lambda s: s[0] * s[2] * s[3] > 1),
    "kind": KINDS,
    "seed": st.integers(0, 999),
    "l2": st.booleans(),
    "rectify": st.booleans(),
    "affine": st.booleans(),
    "bits": st.sampled_from([8, 8, 8, 5, 2]),
}


@QUICK
@given(**NORMS)
def test_norm(**case):
    check_norm(**case)


@pytest.mark.soak
@LONG
@given(**NORMS)
def test_norm_long(**case):
    check_norm(**case)


@QUICK
@given(shape=SHAPES, seed=st.integers(0, 99), add=st.booleans(), mask=st.booleans())
def test_norm_of_sums_and_join(shape, seed, add, mask):
    rng = np.random.default_rng(seed)
    n, c, h, w = shape
    sums = torch.from_numpy(rng.integers(-30000, 30000, (n * h * w, c)).astype(np.int32))
    scale = torch.from_numpy(rng.uniform(1e-4, 1e-2, c).astype(np.float32))
    other = torch.randn(sums.shape, generator=torch.Generator().manual_seed(seed)) if add else None
    keep = torch.from_numpy(rng.integers(0, 2, sums.numel()).astype(np.uint8)) if mask else None
    bits = None if keep is None else torch.from_numpy(np.packbits(keep.numpy(), bitorder="little"))
    want = sums.float() * scale
    as_floats = _engine.Norm(*sums.shape, 8, False, 1e-5, 1.0, None, None, "", 1)
    expected = torch.empty(sums.shape, dtype=torch.int8)
    as_floats.forward(want, None, None, None, expected)
    want = want if other is None else want + other
    want = want if keep is None else want * keep.reshape(want.shape)
    for isa in ISAS:
        out = torch.empty(sums.shape)
        largest = _engine.join(sums, scale, other, bits, out, isa, 2)
        assert torch.equal(out, want)
        assert largest == float(want.abs().max())
        in_place = sums.clone()
        _engine.join(in_place, scale, other, bits, in_place.view(torch.float32), isa, 2)
        assert torch.equal(in_place.view(torch.float32), want)
        norm, codes = _engine.Norm(*sums.shape, 8, False, 1e-5, 1.0, None, None, isa, 2), torch.empty_like(expected)
        norm.forward(sums, scale, sums.amin(0), sums.amax(0), codes)
        assert torch.equal(codes, expected)


@QUICK
@given(
    images=st.integers(1, 3), size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), channels=st.integers(1, 70), seed=st.integers(0, 99),
    whole=st.booleans(), mask=st.booleans(),
)  # fmt: skip
def test_join_of_some_pixels(*, images, size, stride, channels, seed, whole, mask):
    rng = np.random.default_rng(seed)
    dense = rng.integers(-30000, 30000, (images, *size, channels)).astype(np.int32)
    part = rng.integers(-30000, 30000, dense[:, :: stride[0], :: stride[1]].shape).astype(np.int32)
    scale, part_scale = (rng.uniform(1e-4, 1e-2, channels).astype(np.float32) for _ in range(2))
    keep = rng.integers(0, 2, dense.shape).astype(np.uint8)
    bits = np.packbits(keep, bitorder="little") if mask else None
    want = dense.astype(np.float32) * scale
    x = dense if whole else want.copy()
    want[:, :: stride[0], :: stride[1]] += part.astype(np.float32) * part_scale
    want = want * keep if mask else want
    for isa in ISAS:
        for threads in (1, 2):
            out = x.reshape(-1, channels).copy()
            args = size, stride, part, part_scale, bits
            largest = _engine.join_strided(out, scale if whole else None, *args, out.view(np.float32), isa, threads)
            assert np.array_equal(out.view(np.float32).reshape(want.shape), want)
            assert largest == np.abs(want).max()


def test_join_of_some_pixels_takes_no_others():
    x, scale = np.zeros((18, 4), np.float32), np.ones(4, np.float32)
    for shape, stride in (
        ((2, 1, 2, 4), (2, 2)),
        ((2, 2, 2, 3), (2, 2)),
        ((1, 2, 2, 4), (2, 2)),
        ((2, 2, 2, 4), (0, 2)),
    ):
        part = np.zeros(shape, np.int32)
        with pytest.raises(ValueError, match="stride"):
            _engine.join_strided(x, None, (3, 3), stride, part, scale[: shape[3]], None, x, "", 1)


@QUICK
@given(
    out=st.integers(1, 40), inner=st.integers(1, 70), taps=st.sampled_from([1, 3, 9]), groups=st.integers(1, 3),
    bits=st.integers(2, 8), kind=st.sampled_from(["gauss", "zero", "outlier"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_weight_codes(*, out, inner, taps, groups, bits, kind, seed):
    weight = tensor((out * groups, inner, taps, 1), kind, seed)
    for side in ("out", "in"):
        want = weight_codes(weight.double(), bits, side, groups)  # the definition: kernels take float32 only
        want_scale = want.scale.float()
        for isa in ISAS:
            codes, scale = torch.empty(weight.shape[:3], dtype=torch.int8), torch.empty(len(want_scale))
            assert _engine.weight_codes(weight[..., 0], groups, bits, side == "out", codes, scale, isa, 2)
            assert torch.equal(scale, want_scale)
            limit = scale if side == "out" else scale.reshape(groups, 1, inner).expand(-1, out, -1)
            step = limit.reshape(-1, 1, 1) if side == "out" else limit.reshape(out * groups, inner, 1)
            inverse = torch.where(step > 0, step.reciprocal(), 0.0)
            assert torch.equal(codes, (weight[..., 0] * inverse).round().to(torch.int8))


@QUICK
@given(count=st.integers(1, 300), bits=st.integers(2, 8), seed=st.integers(0, 99), signed=st.booleans())
def test_pack(count, bits, seed, signed):
    lo, hi = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    values = np.random.default_rng(seed).integers(lo, hi, count)
    codes = torch.from_numpy(values.astype(np.int8 if signed else np.uint8))
    want = pack_bits(codes.view(torch.uint8) & ((1 << bits) - 1), bits)
    for isa in ISAS:
        packed, back = torch.empty_like(want), torch.empty(count, dtype=torch.uint8)
        _engine.pack_codes(codes.view(torch.uint8), bits, packed, isa, 2)
        assert torch.equal(packed, want)
        _engine.unpack_codes(packed, bits, signed, back, isa, 2)
        assert torch.equal(back.view(codes.dtype), codes)


def test_bfloat16_is_read_as_it_is():
    x = tensor((2, 20, 5, 5), "spread", 1).bfloat16()
    fast, slow = shift_quantize(x, 4, 4, 1), shift_quantize_reference(x, 4, 4, 1)
    assert torch.equal(fast.codes, slow.codes)
    assert torch.equal(fast.scale, slow.scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_is_seen(isa, bad):
    x = tensor((2, 7, 5, 5), "gauss", 1)
    x[1, 6, 4, 4] = bad
    out = torch.empty(rows(x).shape, dtype=torch.uint8)
    scale, _ = _engine.shift_codes(rows(x), 4, 4, True, False, 1.0, None, out, None, isa, 2)
    assert np.isnan(scale)
    norm = _engine.Norm(50, 7, 8, False, 1e-5, 1.0, None, None, isa, 1)
    assert not norm.forward(rows(x), None, None, None, out.view(torch.int8))
    codes = torch.zeros(out.shape, dtype=torch.int8)
    assert norm.forward(rows(x.nan_to_num(0, 0, 0)), None, None, None, codes)
    assert not norm.backward(rows(x), None, None, codes, False, None, out.view(torch.int8))
    weight = x.reshape(2, 7, 25)
    assert not _engine.weight_codes(weight, 1, 4, True, torch.empty(2, 7, 25, dtype=torch.int8), torch.empty(2), isa, 1)


def test_errors_name_the_cause():
    x, out = torch.ones(4, 3), torch.empty(4, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"bits must be in 2\.\.8, got 9"):
        _engine.shift_codes(x, 9, 1, True, False, 1.0, None, out, None, "", 1)
    with pytest.raises(ValueError, match="codes of 6 bits have no room for the shifts of 4 groups in 8 bits"):
        _engine.shift_codes(x, 6, 4, True, True, 1.0, None, out, None, "", 1)
    with pytest.raises(ValueError, match=r"out must have the shape of the tensor, \(4, 3\)"):
        _engine.shift_codes(x, 4, 1, True, False, 1.0, None, out[:2], None, "", 1)
    with pytest.raises(ValueError, match="not an instruction set of this build"):
        _engine.shift_codes(x, 4, 1, True, False, 1.0, None, out, None, "sse9", 1)
    with pytest.raises(ValueError, match="10 codes of 4 bits do not take 6 bytes"):
        _engine.pack_codes(out.reshape(-1)[:10], 4, out.reshape(-1)[:6], "", 1)
    norm = _engine.Norm(4, 3, 8, False, 1e-5, 1.0, None, None, "", 1)
    with pytest.raises(ValueError, match="forward comes first"):
        norm.to_f32(out.view(torch.int8), False, None, torch.empty(4, 3), None)
