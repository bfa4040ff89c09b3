"""What a fused convolution keeps of its input, packed or as bytes, and gradients of the pixels alone that it reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitstrata_runtime import _engine

ISAS = (*_engine.available_isas(), *_engine.emulated_isas())


class Case:
    """One convolution on codes of random floats. shape: batch, height, width, channels."""

    def __init__(self, shape: tuple[int, ...], form: dict[str, Any], kernel: int, stride: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.form, self.shape = form, shape
        pad = kernel // 2
        self.operation = _engine.ConvNorm(
            (stride, stride), (1, 1), (pad, pad), 1, 4, False, 8, False, 1e-5, 1.0, 4, 1, False, False
        )
        x = rng.standard_normal(shape).astype(np.float32) * np.exp2(-rng.integers(0, 6, shape[3])).astype(np.float32)
        x = x if form["signed"] else np.abs(x)
        self.codes = np.empty(shape, np.uint8)
        self.scale, self.exponents = _engine.shift_codes(
            x.reshape(-1, shape[3]), clip=1.0, noise=None, out=self.codes.reshape(-1, shape[3]), ranges=None, isa="",
            threads=1, **form,
        )  # fmt: skip
        self.weight = rng.standard_normal((7, shape[3], kernel, kernel)).astype(np.float32)
        self.result = (shape[0], *((size + 2 * pad - kernel) // stride + 1 for size in shape[1:3]), 7)
        self.gradient = rng.standard_normal((np.prod(self.result[:3]), 7)).astype(np.float32)

    def input(self) -> Any:
        return _engine.ConvInput(self.codes, self.scale, self.exponents, **self.form)

    def backward(self, isa: str, threads: int, *, rest: bool, of: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        """Sums of the input's gradient and its factor, and the gradient of the weight. of: the former's shape."""
        source = self.input()
        sizes = self.operation.scratch(source, self.weight, self.result)
        codes, scratch = np.empty(self.result, np.int8), aligned(max(sizes))
        norm, lost = self.operation.forward(source, self.weight, None, None, scratch, codes, isa, threads)
        assert not lost
        if rest:
            packed = np.empty((self.codes.size * self.form["bits"] + 7) // 8, np.uint8)
            source.rest(packed, isa, threads)
            self.codes = self.codes.copy()  # nobody reads the first any more
        sums, factor, of_weight = np.empty(of, np.int32), np.empty(of[3], np.float32), np.empty_like(self.weight)
        lost, _ = self.operation.backward(
            norm, codes, self.gradient, None, None, None, False, None, None, source, self.weight, scratch, sums,
            factor, of_weight, None, None, isa, threads,
        )  # fmt: skip
        assert not lost
        return sums, factor, of_weight


def aligned(size: int) -> np.ndarray:
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


FORMS = st.builds(
    lambda bits, groups, signed, absorb: {"bits": bits, "groups": groups, "signed": signed, "absorb": absorb},
    st.integers(2, 4), st.integers(1, 5), st.booleans(), st.booleans(),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    form=FORMS, shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 70)),
    stride=st.integers(1, 2), kernel=st.sampled_from([1, 3]), threads=st.integers(1, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_codes_at_rest_are_the_same(*, form, shape, stride, kernel, threads, seed):
    case = Case(shape, form, kernel, stride, seed)
    want = case.backward("generic", 1, rest=False, of=shape)
    for isa in ISAS:
        for a, b in zip(case.backward(isa, threads, rest=True, of=shape), want, strict=True):
            assert np.array_equal(a, b)


@settings(max_examples=40, deadline=None)
@given(
    form=FORMS, shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 70)),
    stride=st.integers(2, 3), threads=st.integers(1, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_pixels_that_a_pointwise_kernel_reads(*, form, shape, stride, threads, seed):
    case = Case(shape, form, 1, stride, seed)
    sums, factor, of_weight = case.backward("generic", 1, rest=False, of=shape)
    some = (*case.result[:3], shape[3])
    for isa in ISAS:
        found = case.backward(isa, threads, rest=False, of=some)
        assert np.array_equal(found[0], sums[:, ::stride, ::stride])
        assert np.count_nonzero(sums) == np.count_nonzero(found[0])
        assert np.array_equal(found[1], factor)
        assert np.array_equal(found[2], of_weight)


def test_what_does_not_fit():
    form = {"bits": 4, "groups": 2, "signed": False, "absorb": True}
    case = Case((2, 5, 5, 3), form, 3, 2, 0)
    source = case.input()
    with pytest.raises(ValueError, match="75 bytes"):
        source.rest(np.empty(74, np.uint8), "", 1)
    source.rest(np.empty(75, np.uint8), "", 1)
    with pytest.raises(ValueError, match="no codes"):
        source.rest(np.empty(75, np.uint8), "", 1)
    wide = Case((2, 5, 5, 3), {**form, "bits": 5}, 3, 2, 0).input()
    assert not wide.rests
    with pytest.raises(ValueError, match="at most 4 bits"):
        wide.rest(np.empty(94, np.uint8), "", 1)
    with pytest.raises(ValueError, match="1x1 kernel"):
        case.backward("generic", 1, rest=False, of=(2, 3, 3, 3))
    for exponents, match in ((np.zeros(2, np.uint8), "each channel"), (np.full(3, 2, np.uint8), "number of groups")):
        with pytest.raises(ValueError, match=match):
            _engine.ConvInput(case.codes, 1.0, exponents, **form)
