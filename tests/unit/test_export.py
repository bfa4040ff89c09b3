"""Forms of requantization that stand for the definition, packed weights, and places in the arena."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitstrata.export import export_c
from bitstrata.export.memory import Overlap
from bitstrata.export.packing import pack
from bitstrata.export.requant import Short, Thresholds, Wide, choose
from bitstrata_runtime.plan import Conv, Requant, Value


@st.composite
def requants(draw):
    """A requantization of one channel whose bounds are small enough to try every x."""
    first = draw(st.integers(-3000, 0))
    last = first + draw(st.integers(0, 4000))
    shift = draw(st.integers(0, 45))
    bits = draw(st.integers(1, 8))
    lo = draw(st.sampled_from([0, -(1 << bits >> 1)]))
    scale = draw(st.floats(-1, 1)) * (1 << bits) / max(last - first, 1)
    m = int(min(max(scale * 2.0**shift, -(2**31) + 1), 2**31 - 1))
    b = int(draw(st.floats(-1, 1)) * (1 << bits) * 2.0**shift)
    fixed = draw(st.booleans())
    ends = (-(2**31) + 1, 2**31 - 1) if fixed else (lo, lo + (1 << bits) - 1)
    x = np.arange(first, last + 1).astype(object)
    y = np.array([min(max((v * m + b) >> shift, ends[0]), ends[1]) for v in x], np.int64)
    arrays = np.array([m], np.int32), np.array([b], np.int64), np.array([shift], np.uint8)
    op = Requant("r", (0,), 1, *arrays, *ends)
    dtype = "i32" if fixed else "u8" if lo == 0 else "s8"
    return op, Value("x", (1, 1, 1), "i32", first, last), Value("y", (1, 1, 1), dtype, *ends), x.astype(np.int64), y


def wrapped(x):
    """int64 as C's 32-bit arithmetic would have it."""
    return x.astype(np.int64).astype(np.uint32).astype(np.int32).astype(np.int64)


def compute(form, x):
    """What the C runtime computes, in 32 bits where it does."""
    if isinstance(form, Thresholds):
        reached = (x[:, np.newaxis] >= form.thresholds[0].astype(np.int64)).sum(axis=1)
        return form.highest - reached if form.falling[0] else form.lowest + reached
    m, shift = int(form.multiplier[0]), int(form.shift[0])
    if isinstance(form, Short):
        if form.start is not None:
            x = np.clip(x, form.start[0], form.stop[0])
        total = x * m + int(form.addend[0])
        np.testing.assert_array_equal(total, wrapped(total))  # signed sums must not overflow
        return np.clip(total >> shift, form.lowest, form.highest)
    b = int(form.bias[0])
    if not form.split:
        return np.clip((x * m + b) >> shift, form.lowest, form.highest)
    mask = (1 << shift) - 1
    lower = x * (m & mask) + (b & mask)
    np.testing.assert_array_equal(lower, wrapped(lower))
    return wrapped(x * (m >> shift) + (b >> shift) + (lower >> shift))


@settings(max_examples=400, deadline=None)
@given(requants())
def test_every_form_equals_the_definition_for_every_input(case):
    op, source, result, x, y = case
    form = choose(op, source, result)
    np.testing.assert_array_equal(compute(form, x), y)


def test_forms_are_the_cheapest_that_are_exact():
    def form(levels, last, dtype="u8"):
        shift = 36
        arrays = np.array([(levels << shift) // last], np.int32), np.array([5], np.int64), np.array([shift], np.uint8)
        op = Requant("r", (0,), 1, *arrays, 0, levels - 1)
        return choose(op, Value("x", (1, 1, 1), "i32", -last, last), Value("y", (1, 1, 1), dtype, 0, levels - 1))

    assert form(2, 1000).thresholds.dtype == np.int16
    assert form(4, 10**6).thresholds.dtype == np.int32
    assert isinstance(form(16, 1000), Short)
    assert isinstance(form(256, 2**31 - 1), Wide)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_come_back_from_packed_rows(bits):
    rng = np.random.default_rng(bits)
    codes = rng.integers(-(1 << bits >> 1), 1 << bits >> 1, (5, 7, 3, 3)).astype(np.int8)
    codes.reshape(-1)[:2] = -(1 << bits >> 1), (1 << bits >> 1) - 1
    op = Conv("c", (0,), 1, "c", codes, 2, 1, (1, 1), (0, 0, 0, 0), (1, 1), 1, np.zeros(7, np.int32))
    for highest, kernel in ((1, "bytes"), (255, "pairs")):
        packed = pack(op, Value("x", (3, 3, 7), "u8", 0, highest))
        if packed.kernel != kernel:
            assert bits > 5  # a product of codes above 63 does not go into bytes
            continue
        assert packed.bits == bits
        lane, lanes = (8, 4) if kernel == "bytes" else (16, 2)
        words = np.zeros((5, packed.words), np.uint32)
        at, shift = 0, bits
        for width in (w for w in (8, 4, 2, 1) if bits & w):
            shift -= width
            mask = np.uint32(sum(((1 << width) - 1) << lane * i for i in range(lanes)))
            for word in range(packed.words):
                column = packed.weights[:, at + word // (lane // width)] >> np.uint32(word % (lane // width) * width)
                words[:, word] |= (column & mask) << np.uint32(shift)
            at += -(-packed.words // (lane // width))
        assert at == packed.weights.shape[1]
        fields = np.stack([words >> np.uint32(lane * i) & np.uint32((1 << lane) - 1) for i in range(lanes)], axis=2)
        order = [3, 2, 1, 0] if kernel == "bytes" else [0, 2, 1, 3]
        found = fields.reshape(5, -1, 4)[:, :, order].reshape(5, -1)[:, :63].astype(np.int64)
        expected = 2 * codes.transpose(0, 2, 3, 1).reshape(5, 63).astype(np.int64) + 1
        np.testing.assert_array_equal(packed.multiplier * found + packed.addend, expected)


def test_results_may_lie_where_all_has_been_read():
    overlap = Overlap(most=-8, same=True)
    assert [distance for distance in range(-12, 13, 4) if overlap.allows(distance)] == [-12, -8, 0]
    assert [distance for distance in range(-12, 13, 4) if Overlap(least=8).allows(distance)] == [8, 12]


@pytest.mark.parametrize("name", ["", "1st", "a-b", "bs_run", "main"])
def test_names_that_c_does_not_allow(name, tmp_path):
    with pytest.raises(ValueError, match="must be a C identifier"):
        export_c(None, tmp_path, name=name)
    assert not list(tmp_path.iterdir())
