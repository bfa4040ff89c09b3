"""Requantization constants against brute force in exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from helpers_programs import plain_program
from hypothesis import given, settings
from hypothesis import strategies as st

from bitstrata_runtime import Plan, ProgramError, derive, intervals
from bitstrata_runtime.plan import Requant


def brute_force(scale: float, offset: float, magnitude: int) -> tuple[int, int, int] | None:
    """(M, B, s) of spec/numerics.md, section 3, in exact rational arithmetic."""
    for s in range(62, -1, -1):
        m, b = round(Fraction(scale) * 2**s), round(Fraction(offset) * 2**s) + (2**s // 2)
        if abs(m) < 2**31 and magnitude * abs(m) + abs(b) < 2**63:
            return m, b, s
    return None


reals = st.one_of(
    st.floats(-4, 4),
    st.floats(allow_nan=False, allow_infinity=False),
    st.builds(math.ldexp, st.integers(-(2**53), 2**53), st.integers(-120, 12)),
    st.builds(lambda m, e: math.ldexp(m + 0.5, e), st.integers(-9, 9), st.integers(-62, 31)),  # ties
    st.builds(lambda k: -2.0 - k / 8 * (1 + 2.0**-50), st.integers(-5, 5)),  # B near -2^63 at the first shifts
    st.builds(lambda k, e: math.ldexp(1, 31 - e) * (1 + k * 2.0**-33), st.integers(-3, 3), st.integers(0, 62)),
)


@settings(max_examples=500, deadline=None)
@given(reals, reals, st.one_of(st.integers(0, 2**31 - 1), st.sampled_from([0, 1, 2**31 - 1])))
def test_requant_constants_equal_brute_force(scale, offset, magnitude):
    expected = brute_force(scale, offset, magnitude)
    arguments = (np.array([scale]), np.array([offset]), np.array([magnitude]), "here")
    if expected is None:
        with pytest.raises(ProgramError, match="here: channel 0: no requantization constants"):
            intervals.requant_constants(*arguments)
    else:
        found = intervals.requant_constants(*arguments)
        assert (int(found.multiplier[0]), int(found.bias[0]), int(found.shift[0])) == expected
        assert (found.multiplier.dtype, found.bias.dtype, found.shift.dtype) == (np.int32, np.int64, np.uint8)


def test_requant_constants_of_many_channels_are_those_of_each():
    rng = np.random.default_rng(0)
    scale = rng.normal(size=300) * 2.0 ** rng.integers(-40, 20, 300)
    offset = rng.normal(size=300) * 2.0 ** rng.integers(-20, 30, 300)
    magnitude = rng.integers(0, 2**31, 300)
    found = intervals.requant_constants(scale, offset, magnitude, "here")
    together = zip(found.multiplier.tolist(), found.bias.tolist(), found.shift.tolist(), strict=True)
    alone = [brute_force(*args) for args in zip(scale.tolist(), offset.tolist(), magnitude.tolist(), strict=True)]
    assert list(together) == alone
    assert {s for _, _, s in alone} > set(range(25, 55))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("which", [0, 1])
def test_requant_constants_of_what_is_not_finite_do_not_exist(bad, which):
    pair = [np.array([0.5, 0.5]), np.array([0.5, 0.5])]
    pair[which][1] = bad
    with pytest.raises(ProgramError, match="channel 1: no requantization constants"):
        intervals.requant_constants(*pair, np.array([1, 1]), "here")


def test_requant_of_a_program_has_the_constants_of_its_affines():
    """Two affines on an accumulator, a clip and a range, worked out here step by step."""
    program = plain_program()
    plan = derive(program, 2)
    op = next(op for op in plan.ops if op.name == "mid.in")
    assert isinstance(op, Requant)
    factors, source = program.factors["2"], next(value for value in plan.values if value.name == "stem.acc")
    gain, shift = factors.affine["stem.bn"]
    step = factors.step["mid"]
    lows, highs = channel_bounds(plan, "stem.acc")
    for channel in range(7):
        magnitude = max(-lows[channel], highs[channel])
        expected = brute_force(gain[channel] / step, shift[channel] / step, magnitude)
        assert (op.multiplier[channel], op.bias[channel], op.shift[channel]) == expected
    assert (op.lo, op.hi) == (0, 3)
    assert (source.lo, source.hi) == (min(lows), max(highs))


def channel_bounds(plan: Plan, name: str) -> tuple[list[int], list[int]]:
    """Section 2 for a convolution of the network's input, in Python integers."""
    op = next(op for op in plan.ops if op.name == name)
    source = plan.values[op.inputs[0]]
    lows, highs = [], []
    for kernel in op.codes:
        weights = [op.mul * int(code) + op.add for code in kernel.ravel()]
        lows.append(sum(min(w * source.lo, w * source.hi) for w in weights))
        highs.append(sum(max(w * source.lo, w * source.hi) for w in weights))
    return lows, highs
