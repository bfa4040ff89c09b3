"""Derivation: constants against brute force in exact arithmetic, bounds and scales worked out by hand, failures."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers_programs import PRECISIONS, conv, fill, layer, plain_program, requant, rescale, residual_program

from bitstrata_runtime import AffineInfo, Factors, Node, Program, ProgramError, Weights, derive, headroom, intervals
from bitstrata_runtime.derive import resolve_map
from bitstrata_runtime.plan import Add, Clip, Conv, Plan, SumPool
from bitstrata_runtime.reference import ReferenceExecutor


def values(plan: Plan) -> dict[str, object]:
    return {value.name: value for value in plan.values}


def one_layer(
    codes: np.ndarray, gain: list[float], shift: list[float], *tail: Node, bits: int = 8, **fields
) -> Program:
    """Codes in, one 1x1 convolution "c" (weights = codes), a rescale "y", then the nodes of `tail`."""
    out, channels = codes.shape
    item = layer(
        "l",
        (out, channels, 1, 1),
        planes=False,
        precisions=(bits,),
        input_range=fields.pop("input_range", {bits: (0, 255)}),
        **fields,
    )
    nodes = (Node("x", "input"), conv("c", "x", "l"), rescale("y", "c", "a"), *tail)
    return Program(
        input_shape=(channels, 2, 2),
        input_kind="codes",
        nodes=nodes,
        output=nodes[-1].name,
        layers={"l": item},
        affines={"a": AffineInfo("l", out)},
        precisions=(bits,),
        weights={"l": Weights(codes.astype(np.int8).reshape(out, channels, 1, 1), 8)},
        factors={str(bits): Factors({"a": np.array([gain, shift], dtype=np.float64)}, {"l": 0.5})},
    )


# Bounds and scales, by hand


def test_conv_bounds_by_hand():
    program = one_layer(np.array([[3, -2], [-128, -1]]), [1e-4, 1e-4], [0, 0], input_range={8: (-4, 3)})
    program.layers["l"] = replace(program.layers["l"], integer_form={8: (2, 1)})
    plan = derive(program, 8)
    # weights 7, -3 and -255, -1: [-28 - 9, 21 + 12] and [-765 - 3, 1020 + 4]
    acc = values(plan)["c"]
    assert (acc.lo, acc.hi, acc.dtype, acc.scale, acc.shape) == (-768, 1024, "i32", None, (2, 2, 2))
    assert values(plan)["x"].dtype == "s8"
    assert headroom(program, 8) == {"l": 21.0}


def test_conv_bounds_are_reached():
    rng = np.random.default_rng(1)
    program = one_layer(rng.integers(-128, 128, (5, 9)), [1e-4] * 5, [0] * 5, input_range={8: (-100, 77)})
    plan = derive(program, 8)
    weights = program.weights["l"].codes[:, :, 0, 0].astype(int)
    best = np.where(weights > 0, 77, -100)
    inputs = np.concatenate([best, np.where(weights > 0, -100, 77)]).astype(np.int8)
    acc = ReferenceExecutor(plan).run_all(np.broadcast_to(inputs[:, None, None, :], (10, 2, 2, 9)).copy())["c"]
    assert (acc.min(), acc.max()) == (values(plan)["c"].lo, values(plan)["c"].hi)


def test_grouped_conv_bounds_are_those_of_the_groups_channels():
    codes = np.array([[1], [2], [3], [-4]]).reshape(4, 1, 1, 1)
    low, high = np.array([0, -10]), np.array([5, 20])
    found = intervals.conv(codes.astype(np.int8), 1, 0, 2, (low, high))
    assert [end.tolist() for end in found] == [[0, 0, -30, -80], [5, 10, 60, 40]]


@pytest.mark.parametrize(
    ("mul", "add", "taps"), [(1, 0, 1), (2, 1, 9), (-3, 5, 49), (-255, -127, 9), (255, 128, 9), (32767, -32768, 600)]
)
def test_conv_bounds_are_sums_by_sign(mul, add, taps):
    """Weights of every size, few and many a channel, with codes and bounds at the ends of their types among them."""
    rng = np.random.default_rng(taps)
    codes = rng.integers(-128, 128, (7, 3, 1, taps)).astype(np.int8)
    codes[0], codes[1] = -128, 127
    low, high = np.array([0, -128, 3]), np.array([255, 127, 3])
    weights = codes.astype(np.int64).reshape(7, 3, taps) * mul + add
    ends = weights * low[:, None], weights * high[:, None]
    found = intervals.conv(codes, mul, add, 1, (low, high))
    np.testing.assert_array_equal(found[0], np.minimum(*ends).sum((1, 2)))
    np.testing.assert_array_equal(found[1], np.maximum(*ends).sum((1, 2)))


def test_conv_bounds_of_more_rows_than_are_read_at_a_time(monkeypatch):
    codes = np.random.default_rng(0).integers(-8, 8, (5, 7, 3, 3)).astype(np.int8)
    bounds = np.zeros(7, np.int64), np.arange(7)
    expected = intervals.conv(codes, 2, 1, 1, bounds)
    monkeypatch.setattr(intervals, "_ROWS", 4)
    np.testing.assert_array_equal(intervals.conv(codes, 2, 1, 1, bounds), expected)


@pytest.mark.parametrize(
    ("gain", "shift", "expected"),
    [
        (2.0**-8, 0.0, 30),  # no finer, however small the values
        (0.0, 0.0, 30),
        (0.0, 2.0 - 2.0**-20, 30),  # 2^31 - 2^10 exactly
        (0.0, 2.0 - 2.0**-21, 29),
        (1.0, 0.0, 23),
        (1.0, -255.0, 23),
        (-1.0, -1.0, 22),  # down to -256
        (8421500.0, 0.0, 0),  # 2^31 - 1148
    ],
)
def test_rescale_takes_the_finest_scale_that_holds_its_values(gain, shift, expected):
    plan = derive(one_layer(np.array([[1]]), [gain], [shift]), 8)
    assert values(plan)["y"].scale == 2.0**-expected


def test_rescale_of_values_beyond_32_bits_is_an_error():
    with pytest.raises(ProgramError, match=r"node 'y' \(rescale\): values up to .* do not fit 32-bit fixed point"):
        derive(one_layer(np.array([[1]]), [8421504.0], [0.0]), 8)  # 2^31 - 128


def test_rescale_scale_follows_the_clip():
    program = one_layer(np.array([[1]]), [1.0], [0.0])
    clipped = replace(
        program, nodes=(*program.nodes[:2], Node("y", "rescale", ("c",), {"affine": ["a"], "clip": [0, 6]}))
    )
    plan = derive(clipped, 8)
    value, op = values(plan)["y"], plan.ops[-1]
    assert value.scale == 2.0**-28
    assert (op.lo, op.hi, value.lo, value.hi) == (0, 6 << 28, 0, 6 << 28)


def test_rescale_of_a_clipped_gain_beyond_its_values():
    """One unit of the input is more than the clip lets through: the multiplier bounds the scale."""
    program = one_layer(np.array([[1]]), [5.0], [0.0])
    node = Node("y", "rescale", ("c",), {"affine": ["a"], "clip": [0, 0.25]})
    plan = derive(replace(program, nodes=(*program.nodes[:2], node)), 8)
    value = values(plan)["y"]
    assert value.scale == 2.0**-28
    codes = np.array([0, 1, 2, 255], np.uint8).reshape(1, 2, 2, 1)
    assert ReferenceExecutor(plan).run(codes).ravel().tolist() == [0, *[1 << 26] * 3]


def test_add_aligns_to_the_finest_scale_that_holds_the_sum():
    rows = np.array([[1]])
    tail = (
        rescale("small", "c", "b"),  # |value| <= 255/512: f = 30
        Node("s", "add", ("y", "small")),  # 255 + 0.5: f = 23
        Node("t", "add", ("small", "small")),  # below 1: f = 30, no finer than its inputs
    )
    program = one_layer(rows, [1.0], [0.0], *tail)
    program.affines["b"] = AffineInfo("l", 1)
    program.factors["8"].affine["b"] = np.array([[2.0**-9], [0.0]])
    plan = derive(replace(program, output="s"), 8)
    found, by_op = values(plan), {op.name: op for op in plan.ops}
    assert (found["y"].scale, found["small"].scale) == (2.0**-23, 2.0**-30)
    assert isinstance(by_op["s"], Add)
    assert (by_op["s"].shift_a, by_op["s"].shift_b, found["s"].scale) == (0, 7, 2.0**-23)
    assert (by_op["t"].shift_a, by_op["t"].shift_b, found["t"].scale) == (0, 0, 2.0**-30)
    assert found["s"].hi == (255 << 23) + ((255 << 21) + 64 >> 7)
    codes = np.array([0, 1, 3, 255], np.uint8).reshape(1, 2, 2, 1)
    assert ReferenceExecutor(plan).run(codes).ravel().tolist() == [
        (c << 23) + (((c << 21) + 64) >> 7) for c in (0, 1, 3, 255)
    ]


def test_add_refines_the_coarser_input_where_the_sum_allows():
    """255 needs f = 23; clipped to 1/8, it can be added at the other input's 2^-30, shifted to the left."""
    tail = (
        Node("k", "clip", ("y",), {"clip": [0.0, 0.125]}),
        rescale("small", "c", "b"),
        Node("s", "add", ("k", "small")),
    )
    program = one_layer(np.array([[1]]), [1.0], [0.0], *tail)
    program.affines["b"] = AffineInfo("l", 1)
    program.factors["8"].affine["b"] = np.array([[2.0**-9], [0.0]])
    plan = derive(program, 8)
    op = plan.ops[-1]
    assert (op.shift_a, op.shift_b, values(plan)["s"].scale) == (-7, 0, 2.0**-30)
    codes = np.array([0, 1, 3, 255], np.uint8).reshape(1, 2, 2, 1)
    found = ReferenceExecutor(plan).run(codes).ravel().tolist()
    assert found == [(min(c << 30, 1 << 27)) + (c << 21) for c in (0, 1, 3, 255)]


@pytest.mark.parametrize(
    ("clip", "expected"),
    [((0.75, 1.25), (2, 3)), ((-0.75, -0.25), (-1, 0)), ((-9.0, 9.0), (-4, 3)), ((None, None), (-4, 3))],
)
def test_clip_bounds_of_codes_round_half_up_within_the_range(clip, expected):
    """In steps of 1/2: 1.5 and 2.5, -1.5 and -0.5, beyond the range, none."""
    program = one_layer(
        np.array([[1]]), [1.0], [0.0], requant("q", "y", "l", clip=clip), conv("d", "q", "l"), input_range={8: (-4, 3)}
    )
    op = next(op for op in derive(replace(program, output="y"), 8).ops if op.name == "q")
    assert (op.lo, op.hi) == expected


def test_average_pooling_keeps_the_divisor_in_the_scale():
    tail = (Node("p", "avgpool", ("y",), {"kernel": [2, 2], "stride": [1, 1], "padding": [0, 0, 0, 1]}),)
    plan = derive(one_layer(np.array([[1]]), [1.0], [0.0], *tail), 8)
    op, source, value = plan.ops[-1], values(plan)["y"], values(plan)["p"]
    assert isinstance(op, SumPool)
    # 4 * 255 * 2^23 is just below 2^33, two bits too many
    assert (op.shift, value.scale) == (2, source.scale * 4 / 4)
    assert (value.lo, value.hi) == (0, 255 << 23)


def test_pooling_by_a_divisor_that_is_no_power_of_two():
    tail = (Node("p", "avgpool", ("y",), {"kernel": [1, 3], "stride": [1, 1], "padding": [0, 0, 1, 0]}),)
    plan = derive(one_layer(np.array([[1]]), [1.0], [0.0], *tail), 8)
    value = values(plan)["p"]
    assert plan.ops[-1].shift == 2
    assert value.scale == 2.0**-23 * 4 / 3


def test_clip_rounds_its_bounds_to_the_scale():
    tail = (Node("k", "clip", ("y",), {"clip": [0.1, None]}),)
    plan = derive(one_layer(np.array([[1]]), [1.0], [0.0], *tail), 8)
    op = plan.ops[-1]
    assert isinstance(op, Clip)
    assert (op.lo, op.hi) == (math.floor(0.1 * 2**23 + 0.5), 2**31 - 1)
    assert values(plan)["k"].lo == op.lo


def test_pad_joins_with_zero():
    tail = (Node("p", "pad", ("y",), {"c": [1, 2], "h": [0, 1], "w": [1, 0]}),)
    program = one_layer(np.array([[1]]), [1.0], [7.0], *tail, input_range={8: (1, 3)})
    program.layers["l"] = replace(program.layers["l"], pad_code={8: (1,)})
    value = values(derive(program, 8))["p"]
    assert (value.lo, value.hi, value.shape) == (0, 10 * 2**27, (3, 3, 4))


# Precisions


def test_resolve_map():
    program = residual_program()
    assert resolve_map(program, 4) == {"stem": 4, "block.conv": 4, "head": 4}
    assert resolve_map(program, "mixed") == program.plans["mixed"]
    given_map = {"head": 8, "stem": 2, "block.conv": 4}
    assert list(resolve_map(program, given_map).items()) == [("stem", 2), ("block.conv", 4), ("head", 8)]


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (3, r"precision: there is no 3; there are \(2, 4, 8\) and plans \['mixed'\]"),
        (True, "there is no True"),
        ("fast", r"no plan 'fast'; there are \['mixed'\]"),
        ("2", "no plan '2'"),
        ({"stem": 2}, r"missing \['block.conv', 'head'\], unknown \[\]"),
        ({"stem": 2, "block.conv": 2, "head": 2, "tail": 2}, r"unknown \['tail'\]"),
        ({"stem": 2, "block.conv": 5, "head": 2}, r"layer 'block.conv': no precision 5"),
    ],
)
def test_unknown_precisions_are_errors(precision, message):
    with pytest.raises(ProgramError, match=message):
        derive(residual_program(), precision)


def test_a_plan_uses_its_own_affines_and_a_map_does_not():
    program = residual_program()
    assert list(program.factors["mixed"].affine) == ["stem.scale"]
    named, mapped = derive(program, "mixed"), derive(program, program.plans["mixed"])
    changed = [a.name for a, b in zip(named.ops, mapped.ops, strict=True) if not same(a, b)]
    program.factors["8"].affine["stem.scale"] = program.factors["mixed"].affine["stem.scale"]
    again = derive(program, program.plans["mixed"])
    assert "stream" in changed
    assert all(same(a, b) for a, b in zip(named.ops, again.ops, strict=True))


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_a_map_takes_weights_ranges_and_steps_from_the_right_precisions():
    program = residual_program()
    plan = derive(program, {"stem": 8, "block.conv": 2, "head": 4})
    ops = {op.name: op for op in plan.ops}
    held = program.weights["block.conv"].codes
    assert isinstance(ops["block.acc"], Conv)
    np.testing.assert_array_equal(ops["block.acc"].codes, held >> 6)
    assert (ops["block.acc"].mul, ops["block.acc"].add) == (2, 1)
    assert (ops["block.in"].lo, ops["block.in"].hi) == (0, 3)
    gain = program.factors["2"].affine["block.bn"][0, 0] * values(plan)["stream"].scale
    ratio = gain / program.factors["2"].step["block.conv"]
    assert ops["block.in"].multiplier[0] == round(ratio * 2.0 ** int(ops["block.in"].shift[0]))


def test_affines_are_applied_one_after_another():
    """(3x + 1) * 2 + 5 at a scale of 2^-f."""
    program = one_layer(np.array([[1]]), [3.0], [1.0])
    program.affines["b"] = AffineInfo("l", 1)
    program.factors["8"].affine["b"] = np.array([[2.0], [5.0]])
    plan = derive(replace(program, nodes=(*program.nodes[:2], rescale("y", "c", "a", "b"))), 8)
    codes = np.array([0, 1, 100, 255], np.uint8).reshape(1, 2, 2, 1)
    found = ReferenceExecutor(plan).run(codes).ravel() * values(plan)["y"].scale
    assert found.tolist() == [7.0, 13.0, 607.0, 1537.0]


def test_fewer_planes_held_give_the_same_plan_until_they_run_out():
    program = residual_program()
    full = derive(program, 4)
    held = program.weights["block.conv"]
    program.weights["block.conv"] = Weights(held.codes >> 4, 4)
    assert all(same(a, b) for a, b in zip(full.ops, derive(program, 4).ops, strict=True))
    with pytest.raises(ProgramError, match=r"layer 'block.conv': precision 8 needs 8 bits .*, 4 are held"):
        derive(program, 8)


@pytest.mark.parametrize(("key", "precision", "message"), [("4", 4, "precision 4"), ("mixed", "mixed", "'mixed'")])
def test_factors_that_are_not_held(key, precision, message):
    program = residual_program()
    del program.factors[key]
    with pytest.raises(ProgramError, match=f"{message}.* not held"):
        derive(program, precision)
    derive(program, 2)


def test_layers_that_share_codes_must_agree_on_their_range():
    nodes = (
        Node("x", "input"),
        conv("a.acc", "x", "a"),
        conv("b.acc", "x", "b"),
        rescale("a.out", "a.acc", "a.s"),
        rescale("b.out", "b.acc", "b.s"),
        Node("y", "add", ("a.out", "b.out")),
    )
    ranges = {p: (0, 2**p - 1) for p in PRECISIONS}
    layers = {name: layer(name, (2, 3, 1, 1), input_range=ranges) for name in "ab"}
    affines = {"a.s": AffineInfo("a", 2), "b.s": AffineInfo("b", 2)}
    program = fill(Program((3, 2, 2), "codes", nodes, "y", layers, affines, PRECISIONS, {}, {}), 0)
    derive(program, 3)
    with pytest.raises(ProgramError, match=r"node 'x': layers 'a' \(precision 2\) and 'b' \(precision 3\) share its"):
        derive(program, {"a": 2, "b": 3})
    layers["b"] = replace(layers["b"], input_range={**ranges, 4: (0, 14)})
    with pytest.raises(ProgramError, match=r"input_range differ: \(0, 15\) and \(0, 14\)"):
        derive(program, 1)


# Failures


def widest(channels: int) -> Program:
    """Two output channels, the second with weights 256 * 127 + 255 = 2^15 - 1, and input codes up to 255."""
    program = one_layer(np.array([[0], [127]]).repeat(channels, axis=1), [1e-9] * 2, [0, 0])
    program.layers["l"] = replace(program.layers["l"], integer_form={8: (256, 255)})
    return program


def test_accumulators_up_to_the_last_bit():
    acc = values(derive(widest(257), 8))["c"]
    assert (acc.lo, acc.hi) == (0, 257 * 255 * (2**15 - 1))
    assert headroom(widest(257), 8)["l"] == 31 - math.log2(257 * 255 * (2**15 - 1))


def test_accumulator_overflow_names_layer_channel_and_bounds():
    message = r"node 'c' \(conv\): accumulator overflow: layer 'l' at precision 8 .* \[0, 2155740930\] .* channel 1,"
    with pytest.raises(ProgramError, match=message):
        derive(widest(258), 8)
    with pytest.raises(ProgramError, match="accumulator overflow"):
        headroom(widest(258), 8)


def test_a_clip_outside_the_range_of_the_codes_leaves_the_nearest_code():
    program = plain_program()
    node = requant("mid.in", "stem.acc", "mid", "stem.bn", clip=(1e6, None))
    nodes = tuple(node if item.name == node.name else item for item in program.nodes)
    value = values(derive(replace(program, nodes=nodes), 2))["mid.in"]
    assert (value.lo, value.hi) == (3, 3)


def test_a_clip_outside_fixed_point_is_an_error():
    tail = (Node("k", "clip", ("y",), {"clip": [1e9, None]}),)
    with pytest.raises(ProgramError, match=r"node 'k' \(clip\): clip .* leaves no integer"):
        derive(one_layer(np.array([[1]]), [1.0], [0.0], *tail), 8)


def test_pooling_zeros_away_is_an_error_not_a_scale_of_zero():
    tail = []
    for index in range(30):
        source = tail[-1].name if tail else "y"
        attrs = {"kernel": [16, 16], "stride": [1, 1], "padding": [8, 7, 8, 7]}
        tail.append(Node(f"p{index}", "avgpool", (source,), attrs))
    with pytest.raises(ProgramError, match=r"the scale of the result, .* is below"):
        derive(one_layer(np.array([[1]]), [0.0], [0.0], *tail), 8)
