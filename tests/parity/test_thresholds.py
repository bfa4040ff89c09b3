"""Requantization by comparison equals requantization by multiplication, on every executor; what it saves is counted."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers_passes import lowered
from hypothesis import given, settings
from hypothesis import strategies as st

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata_runtime.operations import Operations, count
from bitstrata_runtime.plan import Conv, Plan, Requant, Thresholds, Value
from bitstrata_runtime.reference import ReferenceExecutor
from bitstrata_runtime.thresholds import as_thresholds

INT32 = np.iinfo(np.int32)
CHANNELS = 4


def plan_of(requant: Requant, dtype: str) -> Plan:
    """Input i32 -> requantization -> rescale to i32, as an output has to be."""
    x = Value("x", (1, 1, CHANNELS), "i32", INT32.min, INT32.max)
    codes = Value("codes", (1, 1, CHANNELS), dtype, requant.lo, requant.hi)
    out = Value("out", (1, 1, CHANNELS), "i32", requant.lo, requant.hi, 1.0)
    one = np.ones(CHANNELS, np.int32)
    back = Requant("back", (1,), 2, one, np.zeros(CHANNELS, np.int64), np.zeros(CHANNELS, np.uint8), -128, 255)
    return Plan((x, codes, out), (requant, back), 0, 2, 1.0, (0.0,))


@st.composite
def requants(draw: st.DrawFn) -> tuple[Requant, str]:
    signed = draw(st.booleans())
    bits = draw(st.integers(1, 4))
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    shift = draw(st.lists(st.integers(0, 40), min_size=CHANNELS, max_size=CHANNELS))
    multiplier = draw(st.lists(st.integers(-(2**20), 2**20), min_size=CHANNELS, max_size=CHANNELS))
    bias = draw(st.lists(st.integers(-(2**50), 2**50), min_size=CHANNELS, max_size=CHANNELS))
    arrays = np.array(multiplier, np.int32), np.array(bias, np.int64), np.array(shift, np.uint8)
    return Requant("r", (0,), 1, *arrays, lo, hi), "s8" if signed else "u8"


@settings(max_examples=60, deadline=None)
@given(requants())
def test_both_forms_are_equal_at_and_beside_every_threshold_and_at_the_ends(made: tuple[Requant, str]) -> None:
    plan = plan_of(*made)
    changed = as_thresholds(plan)
    op = changed.ops[0]
    assert isinstance(op, Thresholds)
    points = {INT32.min, INT32.min + 1, -1, 0, 1, INT32.max - 1, INT32.max}
    points |= {int(v) + d for v in op.after.ravel() for d in (-1, 0, 1, 2)}
    xs = np.array(sorted(p for p in points if INT32.min <= p <= INT32.max), np.int32)
    codes = np.repeat(xs[:, None, None, None], CHANNELS, axis=3)
    plain, compared = ReferenceExecutor(plan).run(codes), ReferenceExecutor(changed).run(codes)
    assert np.array_equal(plain, compared)
    # Between neighbouring points both are constant: the one by monotony, the other by definition.
    for c in range(CHANNELS):
        steps = sorted(int(v) for v in op.after[:, c])
        assert all(a <= b for a, b in pairwise(steps))
    for isa in runtime.available_isas():
        assert np.array_equal(engine(changed, isa).run(codes), plain), isa


def engine(plan: Plan, isa: str):  # type: ignore[no-untyped-def]
    from bitstrata_runtime.engine import EngineExecutor

    return EngineExecutor(plan, isa=isa)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (bs.recipes.maqd(3, 2), "maqd_vgg"),
        (bs.recipes.maqd(15, 4), "maqd_vgg"),
        (bs.recipes.sat(2, edge_bits=8), "resnet20"),
        (bs.recipes.vertical((2, 3)), "resnet20"),
        (bs.recipes.uniq(1, warmup=False), "resnet20"),
    ],
    ids=["maqd-3-2", "maqd-15-4", "sat-2", "vertical", "uniq-1"],
)
def test_networks_give_the_same_integers_in_both_forms_on_every_executor(recipe: bs.Recipe, name: str) -> None:
    program, images = lowered(recipe, name, width=4)
    plain = runtime.Session.from_program(program, executor="oracle")
    expected = plain.run_all(images)
    for executor, isa in [("oracle", None), *(("engine", isa) for isa in runtime.available_isas())]:
        session = runtime.Session.from_program(program, executor=executor, isa=isa, passes=(as_thresholds,))
        assert any(isinstance(op, Thresholds) for op in session.plan.ops)
        found = session.run_all(images)
        assert {key for key in expected if not np.array_equal(found[key], expected[key])} == set(), (executor, isa)
        assert np.array_equal(session.run_raw(images), plain.run_raw(images))


def test_two_activation_states_need_no_multiplication_between_pixels_and_logits() -> None:
    program, _ = lowered(bs.recipes.maqd(3, 2), width=4)
    plan = runtime.derive(program, program.precisions[0])
    changed = as_thresholds(plan)
    logits = plan.ops[-1].inputs if isinstance(plan.ops[-1], Requant) else ()
    by_op = count(changed)
    multiplied = {name: n.multiplications for name, n in by_op.items() if n.multiplications}
    # What is left scales the classes' sums: a factor a class and position of the map that is averaged.
    scaled = [op for op in changed.ops if isinstance(op, Requant)]
    assert len(scaled) == 1
    assert changed.values[scaled[0].output].shape[2] == 10
    assert set(multiplied) == {scaled[0].name}, (multiplied, logits)
    before = sum(count(plan).values(), Operations()).multiplications
    assert before > 100 * sum(multiplied.values())


def test_counts_follow_the_weights() -> None:
    codes = np.array([[[[0]], [[1]]], [[[-1]], [[2]]], [[[3]], [[0]]]], np.int8)  # (out 3, in 2, 1, 1)
    conv = Conv("c", (0,), 1, "c", codes, 1, 0, (1, 1), (0, 0, 0, 0), (1, 1), 1, np.zeros(2, np.int32))
    out = Value("out", (5, 4, 3), "i32", -9, 9, 1.0)
    for hi, expected in (
        (255, Operations(2 * 20, 4 * 20)),
        (1, Operations(0, 4 * 20)),
        (4, Operations(0, (2 + 8) * 20)),
    ):
        plan = Plan((Value("x", (5, 4, 2), "u8", 0, hi), out), (conv,), 0, 1, 1.0, (0.0,))
        assert count(plan)["c"] == expected


@pytest.mark.parametrize("levels", [0, 256])
def test_levels_out_of_range(levels: int) -> None:
    program, _ = lowered(bs.recipes.maqd(3, 2), width=4)
    with pytest.raises(ValueError, match=f"most_levels = {levels}: must be 1..255"):
        as_thresholds(runtime.derive(program, program.precisions[0]), levels)
