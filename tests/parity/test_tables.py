"""Requantization by table equals requantization by multiplication for every value that can occur, on every executor."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_passes import lowered
from hypothesis import given, settings
from hypothesis import strategies as st

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata_runtime.lookup import as_tables
from bitstrata_runtime.operations import Operations, count
from bitstrata_runtime.plan import Plan, Requant, Table, Value
from bitstrata_runtime.reference import ReferenceExecutor
from bitstrata_runtime.thresholds import as_thresholds

CHANNELS = 3
ENDS = {"u8": (0, 255), "s8": (-128, 127), "i32": (-(2**31), 2**31 - 1)}


def engine(plan: Plan, isa: str):  # type: ignore[no-untyped-def]
    from bitstrata_runtime.engine import EngineExecutor

    return EngineExecutor(plan, isa=isa)


def image(op: Requant, x: np.ndarray) -> np.ndarray:
    """The formula in integers of any size, (entries, C)."""
    rows = [
        [
            min(max((int(v) * int(m) + int(b)) >> int(s), op.lo), op.hi)
            for m, b, s in zip(op.multiplier, op.bias, op.shift, strict=True)
        ]
        for v in x
    ]
    return np.array(rows)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Input i32 of few values -> requantization -> rescale to i32, as an output has to be."""
    first, entries = draw(st.integers(-(2**31), 2**31 - 1)), draw(st.integers(1, 40))
    first = min(first, 2**31 - entries)
    dtype = draw(st.sampled_from(list(ENDS)))
    shift = draw(st.lists(st.integers(0, 62), min_size=CHANNELS, max_size=CHANNELS))
    multiplier = draw(st.lists(st.integers(-(2**28), 2**28), min_size=CHANNELS, max_size=CHANNELS))
    bias = draw(st.lists(st.integers(-(2**60), 2**60), min_size=CHANNELS, max_size=CHANNELS))
    arrays = np.array(multiplier, np.int32), np.array(bias, np.int64), np.array(shift, np.uint8)
    op = Requant("r", (0,), 1, *arrays, *ENDS[dtype])
    found = image(op, np.arange(first, first + entries))
    x = Value("x", (1, 1, CHANNELS), "i32", first, first + entries - 1)
    codes = Value("codes", (1, 1, CHANNELS), dtype, int(found.min()), int(found.max()), 1.0)
    if dtype == "i32":
        return Plan((x, codes), (op,), 0, 1, 1.0, (0.0,))
    out = Value("out", (1, 1, CHANNELS), "i32", *ENDS[dtype], 1.0)
    one = np.ones(CHANNELS, np.int32)
    back = Requant("back", (1,), 2, one, np.zeros(CHANNELS, np.int64), np.zeros(CHANNELS, np.uint8), *ENDS[dtype])
    return Plan((x, codes, out), (op, back), 0, 2, 1.0, (0.0,))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_value_that_can_occur_gives_what_the_formula_gives(plan: Plan) -> None:
    changed = as_tables(plan)
    op, source = changed.ops[0], plan.values[0]
    assert isinstance(op, Table)
    assert changed.ops[1:] == plan.ops[1:]  # codes are no int32: nothing to look up
    x = np.arange(source.lo, source.hi + 1)
    expected = image(plan.ops[0], x)
    codes = np.repeat(x.astype(np.int32)[:, None, None, None], CHANNELS, axis=3)
    assert np.array_equal(ReferenceExecutor(changed).run(codes)[:, 0, 0], expected)
    assert np.array_equal(ReferenceExecutor(plan).run(codes)[:, 0, 0], expected)
    for isa in runtime.available_isas():
        assert np.array_equal(engine(changed, isa).run(codes)[:, 0, 0], expected), isa


def test_values_outside_the_table_take_its_ends() -> None:
    x = Value("x", (1, 1, 1), "i32", *ENDS["i32"])
    out = Value("out", (1, 1, 1), "i32", 5, 9, 1.0)
    plan = Plan((x, out), (Table("t", (0,), 1, np.array([[5], [7], [9]], np.int32), -1),), 0, 1, 1.0, (0.0,))
    codes = np.array([-(2**31), -2, -1, 0, 1, 2, 2**31 - 1], np.int32)[:, None, None, None]
    expected = [5, 5, 5, 7, 9, 9, 9]
    assert ReferenceExecutor(plan).run(codes).ravel().tolist() == expected
    for isa in runtime.available_isas():
        assert engine(plan, isa).run(codes).ravel().tolist() == expected


@pytest.mark.parametrize("name", ["maqd_vgg", "resnet20"])
def test_three_weight_and_two_activation_states_multiply_nowhere(name: str) -> None:
    program, images = lowered(bs.recipes.maqd(3, 2), name, width=4)
    passes = (as_thresholds, as_tables)
    plain = runtime.Session.from_program(program, executor="oracle")
    expected = plain.run_all(images)
    for executor, isa in [("oracle", None), *(("engine", isa) for isa in runtime.available_isas())]:
        session = runtime.Session.from_program(program, executor=executor, isa=isa, passes=passes)
        found = session.run_all(images)
        assert {key for key in expected if not np.array_equal(found[key], expected[key])} == set(), (executor, isa)
        assert np.array_equal(session.run_raw(images), plain.run_raw(images))
        total = sum(count(session.plan).values(), Operations())
        assert (total.multiplications, total.rescalings) == (0, 0)
        assert total.lookups > 0
    before = sum(count(plain.plan).values(), Operations())
    assert before.multiplications == before.rescalings > 0


def test_only_requantizations_of_few_values_are_changed() -> None:
    program, _ = lowered(bs.recipes.maqd(3, 2), width=4)
    plan = runtime.derive(program, program.precisions[0])
    spans = {
        op.name: plan.values[op.inputs[0]].hi - plan.values[op.inputs[0]].lo + 1
        for op in plan.ops
        if isinstance(op, Requant)
    }
    limit = sorted(spans.values())[len(spans) // 2]
    changed = as_tables(plan, limit)
    assert {op.name for op in changed.ops if isinstance(op, Table)} == {n for n, s in spans.items() if s <= limit}
    assert {op.name for op in changed.ops if isinstance(op, Requant)} == {n for n, s in spans.items() if s > limit}
    assert all(len(op.table) == spans[op.name] for op in changed.ops if isinstance(op, Table))


@pytest.mark.parametrize("entries", [0, (1 << 20) + 1])
def test_entries_out_of_range(entries: int) -> None:
    with pytest.raises(ValueError, match=rf"most_entries = {entries}: must be 1..2\^20"):
        as_tables(Plan((), (), 0, 0, 1.0, (0.0,)), entries)


@pytest.mark.skipif(not runtime.available_isas(), reason="the engine is not built")
@pytest.mark.parametrize(
    ("table", "dtype", "source", "message"),
    [
        (np.zeros((2, 4), np.int32), "u8", "i32", r"'t'.*table has 4 channels, the input 3"),
        (np.zeros((0, 3), np.int32), "u8", "i32", r"'t'.*entries.*0"),
        (np.array([[0] * 3, [256] * 3], np.int32), "u8", "i32", r"'t'.*largest entry.*256"),
        (np.full((2, 3), -129, np.int32), "s8", "i32", r"'t'.*least entry.*-129"),
        (np.zeros((2, 3), np.int32), "u8", "u8", r"'t'.*the input is u8, not i32"),
        (np.zeros((2, 3), np.int64), "u8", "i32", r"'t'.*table must be int32 of 2 dimensions, got int64"),
    ],
)
def test_the_engine_refuses_a_wrong_table(table: np.ndarray, dtype: str, source: str, message: str) -> None:
    lo, hi = (0, 255) if source == "u8" else (-9, 9)
    values = Value("x", (1, 1, 3), source, lo, hi), Value("codes", (1, 1, 3), dtype, *ENDS[dtype])
    plan = Plan(values, (Table("t", (0,), 1, table, 0),), 0, 1, 1.0, (0.0,))
    with pytest.raises(ValueError, match=message):
        engine(plan, "generic")
