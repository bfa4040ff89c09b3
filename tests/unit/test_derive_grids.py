"""Input grids with offsets of their own at every precision, sums of codes, and weight grids of many forms."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from helpers_programs import conv, pool, requant, rescale

import bitstrata_runtime
from bitstrata_runtime import AffineInfo, Factors, Layer, Node, Program, ProgramError, Session, Weights, derive, load
from bitstrata_runtime.artifact import write
from bitstrata_runtime.graph import validate
from bitstrata_runtime.plan import Conv, Plan, Requant, SumPool
from bitstrata_runtime.reference import OracleExecutor, ReferenceExecutor

PRECISIONS = (1, 2, 4)
RANGES = {1: (0, 1), 2: (0, 2), 4: (-7, 7)}
OFFSETS = {1: (0.0,), 2: (-0.75,), 4: (2.5,)}
PADS = {1: (0,), 2: (1,), 4: (-2,)}
FORMS = {1: (8, 3), 2: (4, 1), 4: (1, 0)}


def item(name: str, shape: tuple[int, int, int, int], **fields: Any) -> Layer:
    tables = {"input_range": RANGES, "input_offset": dict.fromkeys(PRECISIONS, (0.0,)), "integer_form": FORMS}
    tables["pad_code"] = dict.fromkeys(PRECISIONS, (0,))
    return Layer(name, "conv", shape, 4, True, {p: p for p in PRECISIONS}, **{**tables, **fields})


def two_layers(*between: Node, padding: int = 1, channels: int = 3, **fields: Any) -> Program:
    """Codes -> 1x1 layer "a" -> codes of layer "b" (3x3, tables in `fields`), nodes of `between` -> logits."""
    layers = {
        "a": item("a", (channels, 2, 1, 1), input_range=dict.fromkeys(PRECISIONS, (0, 15))),
        "b": item("b", (2, channels, 3, 3), **fields),
    }
    rng = np.random.default_rng(0)
    nodes = (
        Node("x", "input"),
        conv("a.acc", "x", "a"),
        requant("b.in", "a.acc", "b", "a.bn", clip=(-1.0, 6.0)),
        *between,
        conv("b.acc", between[-1].name if between else "b.in", "b", padding=padding),
        rescale("logits", "b.acc", "b.bn"),
    )
    owners = {"a.bn": AffineInfo("a", channels), "b.bn": AffineInfo("b", 2)}
    factors = {
        str(p): Factors(
            {
                name: np.stack([rng.uniform(0.01, 0.05, i.channels), rng.normal(0, 0.5, i.channels)])
                for name, i in owners.items()
            },
            {"a": 0.25, "b": 0.3 + p / 100},
        )
        for p in PRECISIONS
    }
    weights = {
        name: Weights(rng.integers(-8, 8, layer.shape).astype(np.int8), layer.source_bits)
        for name, layer in layers.items()
    }
    return Program((2, 6, 6), "codes", nodes, "logits", layers, owners, PRECISIONS, weights, factors)


def with_offsets(*between: Node, **fields: Any) -> Program:
    return two_layers(*between, **{"input_offset": OFFSETS, "pad_code": PADS, **fields})


def named(plan: Plan) -> dict[str, Any]:
    return {op.name: op for op in plan.ops}


def value(plan: Plan, name: str) -> Any:
    return next(v for v in plan.values if v.name == name)


def codes_in(plan: Plan, count: int = 3) -> np.ndarray:
    source = plan.values[plan.input]
    return np.random.default_rng(1).integers(source.lo, source.hi + 1, (count, *source.shape)).astype(np.uint8)


def assert_executors_agree(plan: Plan) -> dict[str, np.ndarray]:
    """Reference, oracle and every instruction set of the engine, on every value; returns the values."""
    codes = codes_in(plan)
    expected = ReferenceExecutor(plan).run_all(codes)
    others = [OracleExecutor(plan).run_all(codes)]
    for isa in bitstrata_runtime.available_isas():
        from bitstrata_runtime.engine import EngineExecutor

        others.append(EngineExecutor(plan, isa=isa).run_all(codes))
    for other in others:
        for name, array in expected.items():
            assert other[name].dtype == array.dtype
            np.testing.assert_array_equal(other[name], array, err_msg=name)
    return expected


# Offsets


@pytest.mark.parametrize("p", PRECISIONS)
def test_requantization_targets_the_grid_of_its_precision(p):
    """M, B and the clamp of spec/numerics.md, section 3, worked out in rational arithmetic."""
    program = with_offsets()
    plan = derive(program, p)
    op, t, (z,) = named(plan)["b.in"], program.factors[str(p)].step["b"], OFFSETS[p]
    assert isinstance(op, Requant)
    for c, (gain, shift) in enumerate(program.factors[str(p)].affine["a.bn"].T):
        s = int(op.shift[c])
        assert op.multiplier[c] == round(Fraction(gain / t) * 2**s)
        assert op.bias[c] == round(Fraction(shift / t - z) * 2**s) + 2**s // 2
    low, high = RANGES[p]
    assert (op.lo, op.hi) == (max(low, math.floor(-1 / t - z + 0.5)), min(high, math.floor(6 / t - z + 0.5)))
    assert value(plan, "b.in").dtype == ("s8" if p == 4 else "u8")


@pytest.mark.parametrize("p", PRECISIONS)
def test_codes_are_the_nearest_points_of_the_grid(p):
    program = with_offsets()
    values = assert_executors_agree(derive(program, p))
    t, (z,), (low, high) = program.factors[str(p)].step["b"], OFFSETS[p], RANGES[p]
    gain, shift = program.factors[str(p)].affine["a.bn"]
    real = np.clip(values["a.acc"] * gain + shift, -1, 6)
    grid = t * (np.arange(low, high + 1) + z)
    distance = np.abs(real - t * (values["b.in"].astype(int) + z))
    nearest = np.abs(real[..., None] - grid).min(axis=-1)
    # A bound of the clip is rounded to the grid like a value, so it is at most half a step away where it is reached.
    assert (distance <= np.maximum(nearest, 0) + 1e-9).all()
    assert len(np.unique(values["b.in"])) > 1


def test_a_worked_example_with_an_offset():
    """value = 0.5*(code - 1.5), codes 0..3: the points -0.75, -0.25, 0.25, 0.75; ties go up."""
    layers = {
        "a": Layer("a", "conv", (1, 1, 1, 1), 2, True, {2: 2}, {2: (1, 0)}, {2: (0, 7)}, {2: (0,)}, {2: (0.0,)}),
        "b": Layer("b", "conv", (1, 1, 1, 2), 2, True, {2: 2}, {2: (1, 0)}, {2: (0, 3)}, {2: (2,)}, {2: (-1.5,)}),
    }
    last = Node("acc", "conv", ("q",), {**conv("", "", "b").attrs, "padding": [0, 0, 0, 1]})
    nodes = (Node("x", "input"), conv("y", "x", "a"), requant("q", "y", "b", "s"), last, rescale("out", "acc", "u"))
    # y = x/4 - 1; out = 0.5*(sum w*code) + 0.5*(-1.5)*sum w with w = (1, -2)
    affine = {"s": np.array([[0.25], [-1.0]]), "u": np.array([[0.5], [0.75]])}
    weights = {
        "a": Weights(np.ones((1, 1, 1, 1), np.int8), 2),
        "b": Weights(np.array([1, -2], np.int8).reshape(1, 1, 1, 2), 2),
    }
    affines = {"s": AffineInfo("a", 1), "u": AffineInfo("b", 1)}
    factors = {"2": Factors(affine, {"a": 1.0, "b": 0.5})}
    program = Program((1, 1, 8), "codes", nodes, "out", layers, affines, (2,), weights, factors)
    plan = derive(program, 2)
    found = ReferenceExecutor(plan).run_all(np.arange(8, dtype=np.uint8).reshape(1, 1, 8, 1))
    assert found["q"].ravel().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]  # of -1, -0.75, ..., 0.75, every other one a tie
    reals = [0.5 * (c - 1.5) for c in (*found["q"].ravel().tolist(), 2)]  # behind the map: the pad code 2
    expected = [a - 2 * b for a, b in itertools.pairwise(reals)]
    assert (found["out"].ravel() * value(plan, "out").scale).tolist() == expected


def test_a_map_takes_offset_and_pad_code_from_the_layers_own_precision():
    program = with_offsets()
    mixed, single = named(derive(program, {"a": 1, "b": 4})), named(derive(program, 4))
    assert mixed["b.acc"].pad_code.tolist() == [-2] * 3
    assert named(derive(program, 2))["b.acc"].pad_code.tolist() == [1] * 3
    shift = program.factors["1"].affine["a.bn"][1]
    s = mixed["b.in"].shift.astype(float)
    exact = np.rint((shift / program.factors["4"].step["b"] - 2.5) * 2**s) + 2 ** (s - 1)
    np.testing.assert_array_equal(mixed["b.in"].bias, exact.astype(np.int64))
    assert (mixed["b.in"].lo, mixed["b.in"].hi) == (single["b.in"].lo, single["b.in"].hi)


def test_the_plan_has_the_input_offset_of_its_precision():
    program = two_layers()
    program.layers["a"] = replace(program.layers["a"], input_offset={1: (0.0,), 2: (-1.5, 3.0), 4: (0.25,)})
    assert [derive(program, p).input_offset for p in PRECISIONS] == [(0.0,), (-1.5, 3.0), (0.25,)]


def test_an_offset_beyond_the_constants_is_an_error():
    with pytest.raises(ProgramError, match=r"node 'b.in' \(requant\): channel 0: no requantization constants"):
        derive(with_offsets(input_offset=dict.fromkeys(PRECISIONS, (1e300,))), 2)


def with_twin(twin: dict[str, Any], **fields: Any) -> Program:
    """`two_layers` with a layer "c" like "b" but for the tables in `twin`, which reads the same codes."""
    program = two_layers(**fields)
    program.layers["c"] = replace(program.layers["b"], name="c", **twin)
    program.weights["c"] = program.weights["b"]
    for factors in program.factors.values():
        factors.step["c"] = factors.step["b"]
    return replace(program, nodes=(*program.nodes, conv("c.acc", "b.in", "c", padding=1)))


def test_layers_that_share_codes_share_their_offset():
    validate(with_twin({}, input_offset=OFFSETS))
    message = (
        r"node 'b.in': layers 'b' \(precision 2\) and 'c' \(precision 2\) share its codes, but their input_offset "
        r"differ: \(-0.75,\) and \(-0.5,\)"
    )
    with pytest.raises(ProgramError, match=message):
        validate(with_twin({"input_offset": {**OFFSETS, 2: (-0.5,)}}, input_offset=OFFSETS))


def test_layers_that_share_codes_share_their_offset_at_the_precisions_of_a_map():
    program = with_twin({}, input_offset=OFFSETS, input_range=dict.fromkeys(PRECISIONS, (0, 3)))
    derive(program, {"a": 1, "b": 2, "c": 2})
    with pytest.raises(ProgramError, match=r"'b' \(precision 2\) and 'c' \(precision 4\) .* input_offset differ"):
        derive(program, {"a": 1, "b": 2, "c": 4})


def test_offsets_of_the_input_agree_as_one_number_or_one_a_channel():
    program = two_layers()
    nodes = (*program.nodes, conv("again", "x", "d"))
    offset = dict.fromkeys(PRECISIONS, (0.5, 0.5))
    for own, fits in (((0.5,), True), ((0.25,), False), ((0.5, 0.25), False)):
        layers = {
            **program.layers,
            "a": replace(program.layers["a"], input_offset=offset),
            "d": replace(program.layers["a"], name="d", input_offset=dict.fromkeys(PRECISIONS, own)),
        }
        for factors in program.factors.values():
            factors.step["d"] = 0.25
        weights = {**program.weights, "d": program.weights["a"]}
        changed = replace(program, layers=layers, nodes=nodes, weights=weights)
        if fits:
            validate(changed)
        else:
            with pytest.raises(ProgramError, match="share its codes, but their input_offset differ"):
                validate(changed)


# Sums of codes

SUM = pool("b.sum", "avgpool", "b.in", 2, 2)


@pytest.mark.parametrize("p", PRECISIONS)
def test_average_pooling_of_codes_is_their_sum(p):
    plan = derive(two_layers(SUM), p)
    codes, sums = value(plan, "b.in"), value(plan, "b.sum")
    assert (sums.dtype, sums.scale, sums.shape) == (codes.dtype, None, (3, 3, 3))
    assert (sums.lo, sums.hi) == (4 * codes.lo, 4 * codes.hi)
    assert isinstance(named(plan)["b.sum"], SumPool)
    found = assert_executors_agree(plan)
    windows = found["b.in"].astype(int).reshape(-1, 3, 2, 3, 2, 3)
    np.testing.assert_array_equal(found["b.sum"], windows.sum(axis=(2, 4)))


def test_the_convolution_is_proved_for_the_sums():
    plain, pooled = (value(derive(two_layers(*nodes), 4), "b.acc") for nodes in ((), (SUM,)))
    assert (pooled.lo, pooled.hi) == (4 * plain.lo, 4 * plain.hi)


def test_padded_sums_of_codes_reach_down_to_zero():
    node = Node("b.sum", "avgpool", ("b.in",), {"kernel": [2, 2], "stride": [2, 2], "padding": [1, 1, 0, 2]})
    program = two_layers(node, input_range=dict.fromkeys(PRECISIONS, (3, 60)), pad_code=dict.fromkeys(PRECISIONS, (3,)))
    program.factors["2"].step["b"] = 0.01
    plan = derive(program, 2)
    sums, codes = value(plan, "b.sum"), value(plan, "b.in")
    assert codes.lo >= 3
    assert (sums.lo, sums.hi) == (0, 4 * codes.hi)
    found = assert_executors_agree(plan)
    padded = np.pad(found["b.in"].astype(int), ((0, 0), (1, 1), (0, 2), (0, 0)))
    np.testing.assert_array_equal(found["b.sum"], padded.reshape(-1, 4, 2, 4, 2, 3).sum(axis=(2, 4)))


@pytest.mark.parametrize(
    ("code_range", "message"),
    [
        ((0, 64), r"sums of codes can reach \[0, 256\], beyond the range \[0, 255\] of u8"),
        ((-33, 31), r"sums of codes can reach \[-132, 124\], beyond the range \[-128, 127\] of s8"),
        ((-32, 32), r"sums of codes can reach \[-128, 128\], beyond the range \[-128, 127\] of s8"),
    ],
)
def test_sums_beyond_the_codes_type_are_an_error(code_range, message):
    low, high = code_range
    for bounds, fits in ((code_range, False), ((max(low, -32), min(high, 63 if low == 0 else 31)), True)):
        program = two_layers(SUM, input_range=dict.fromkeys(PRECISIONS, bounds))
        program.factors["4"].step["b"] = 0.001  # fine enough for codes to reach the ends of their range
        program.factors["4"].affine["a.bn"][:] = [[1.0], [0.0]]
        if fits:
            plan = derive(program, 4)
            assert (value(plan, "b.in").lo, value(plan, "b.in").hi) == bounds
            assert_executors_agree(plan)
        else:
            with pytest.raises(ProgramError, match=r"node 'b.sum' \(avgpool\): " + message):
                derive(program, 4)


def test_what_the_codes_reach_counts_and_not_what_their_range_allows():
    program = two_layers(SUM, input_range=dict.fromkeys(PRECISIONS, (0, 255)))
    plan = derive(program, 4)
    codes = value(plan, "b.in")
    assert (named(plan)["b.in"].lo, named(plan)["b.in"].hi) == (0, round(6 / 0.34))  # clipped at 6.0
    assert 0 < codes.hi <= 18
    assert value(plan, "b.sum").hi == 4 * codes.hi
    assert_executors_agree(plan)


def test_codes_with_an_offset_pool_without_padding_only():
    assert_executors_agree(derive(with_offsets(SUM), 4))
    node = Node("b.sum", "avgpool", ("b.in",), {"kernel": [2, 2], "stride": [2, 2], "padding": [1, 1, 0, 0]})
    message = (
        r"node 'b.sum' \(avgpool\): attribute 'padding' = \(1, 1, 0, 0\): .* layer 'b', whose input_offset\[2\] is "
        r"\(-0.75,\), so code 0 is not the value 0"
    )
    with pytest.raises(ProgramError, match=message):
        derive(with_offsets(node), 1)  # whose own offset is 0
    derive(two_layers(node), 1)


def test_sums_keep_their_origin_through_other_moves():
    """Maxima and slices of sums, sums of sums; the layers behind all of them share the codes' grid."""
    nodes = (
        pool("b.sum", "avgpool", "b.in", 1, 1),
        pool("most", "maxpool", "b.sum", 2, 1),
        Node("cut", "slice", ("most",), {"c": [0, 3, 1], "h": [0, 4, 1], "w": [1, 5, 1]}),
        Node("again", "avgpool", ("cut",), {"kernel": [1, 2], "stride": [1, 1], "padding": [0, 0, 0, 0]}),
    )
    program = two_layers(*nodes)
    infos = validate(program)
    assert {infos[node.name].origin for node in nodes} == {"b.in"}
    assert {infos[node.name].layer for node in nodes} == {"b"}
    for p in PRECISIONS:
        plan = derive(program, p)
        assert value(plan, "again").hi == 2 * value(plan, "b.in").hi
        assert_executors_agree(plan)


def test_a_layer_reads_codes_of_which_another_reads_sums():
    program = with_twin({}, input_offset=OFFSETS, input_range=RANGES)
    nodes = (*program.nodes, SUM, conv("c.more", "b.sum", "c"))
    plan = derive(replace(program, nodes=nodes), 2)
    assert named(plan)["c.more"].layer == "c"
    assert_executors_agree(plan)


# Weight grids


@pytest.mark.parametrize("p", PRECISIONS)
def test_integer_forms_differ_from_one_precision_to_the_next(p):
    program = two_layers()
    held, (mul, add) = program.weights["b"].codes, FORMS[p]
    plan = derive(program, p)
    op = named(plan)["b.acc"]
    assert isinstance(op, Conv)
    assert (op.mul, op.add) == (mul, add)
    np.testing.assert_array_equal(op.codes, held >> (4 - p))
    found = assert_executors_agree(plan)
    integers = mul * (held.astype(int) >> (4 - p)) + add
    padded = np.pad(found["b.in"].astype(int), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for y, x in ((0, 0), (2, 3), (5, 5)):
        window = padded[:, y : y + 3, x : x + 3]
        np.testing.assert_array_equal(found["b.acc"][:, y, x], np.einsum("nhwc,ochw->no", window, integers))


def test_ternary_codes_in_two_bits():
    ternary = np.random.default_rng(2).integers(-1, 2, (2, 3, 3, 3)).astype(np.int8)
    program = two_layers(integer_form=dict.fromkeys(PRECISIONS, (1, 0)))
    program.layers["b"] = replace(program.layers["b"], source_bits=2, weight_bits={1: 1, 2: 2, 4: 2})
    program.weights["b"] = Weights(ternary, 2)
    for p in (2, 4):
        plan = derive(program, p)
        np.testing.assert_array_equal(named(plan)["b.acc"].codes, ternary)
        source = value(plan, "b.in")
        magnitude = max(abs(source.lo), abs(source.hi)) * np.abs(ternary.astype(int)).sum(axis=(1, 2, 3)).max()
        acc = value(plan, "b.acc")
        assert max(-acc.lo, acc.hi) <= magnitude
        assert_executors_agree(plan)


@pytest.mark.parametrize("top", [0, 2, 6, 254])
def test_any_number_of_states(top):
    """Ranges that are no power of two long, down to a single code."""
    program = with_offsets(input_range=dict.fromkeys(PRECISIONS, (0, top)), pad_code=dict.fromkeys(PRECISIONS, (0,)))
    program.factors["2"].step["b"] = 0.01
    plan = derive(program, 2)
    assert (named(plan)["b.in"].lo, named(plan)["b.in"].hi) == (0, top)
    assert (value(plan, "b.in").lo, value(plan, "b.in").hi) == (0, top)
    assert_executors_agree(plan)


@pytest.mark.parametrize("executor", ["reference", "oracle", "engine"])
def test_an_artifact_keeps_grids_and_forms(executor, tmp_path):
    """Written, read back at every precision, upgraded and downgraded: the integers are those of the program."""
    if executor == "engine" and not bitstrata_runtime.available_isas():
        pytest.skip("the engine is not built")
    program = with_offsets(SUM)
    write(program, tmp_path / "net.strata")
    session = load(tmp_path / "net.strata", 1, executor=executor)
    x = np.random.default_rng(3).uniform(0, 4, (3, 2, 6, 6))
    for p in (1, 2, 4, 1, 4):
        session.set_precision(p)
        fresh = Session.from_program(program, p, executor="reference")
        np.testing.assert_array_equal(session.run_raw(x, floats=True), fresh.run_raw(x, floats=True))
    assert session.program.layers == program.layers
