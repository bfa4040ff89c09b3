"""Random programs: derivation against real arithmetic, bounds that hold, and executors that agree bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.random_programs import choices, input_codes, programs

from bitstrata_runtime import Plan, Program, Session, derive
from bitstrata_runtime.plan import Add, Clip, Conv, MaxPool, Pad, Requant, Slice, SumPool
from bitstrata_runtime.program import Layer, Node
from bitstrata_runtime.reference import OracleExecutor, ReferenceExecutor

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
Array = np.ndarray[Any, Any]


@st.composite
def cases(draw: Any) -> tuple[Program, Any, Plan, Array]:
    """A program, what it runs at, the plan, and inputs that include the extremes."""
    program = draw(programs())
    choice = draw(choices(program))
    plan = derive(program, choice)
    value = plan.values[plan.input]
    return program, choice, plan, input_codes(program, value.lo, value.hi, 5, draw(st.integers(0, 2**32 - 1)))


# Executors


@SETTINGS
@given(cases())
def test_reference_equals_oracle(case):
    _, _, plan, codes = case
    expected, found = ReferenceExecutor(plan).run_all(codes), OracleExecutor(plan).run_all(codes)
    assert_same(found, expected)
    np.testing.assert_array_equal(OracleExecutor(plan).run(codes), expected[plan.values[plan.output].name])


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# Bounds


@SETTINGS
@given(cases())
def test_values_stay_within_their_bounds(case):
    _, _, plan, codes = case
    found = OracleExecutor(plan).run_all(codes)
    for value in plan.values:
        array = found[value.name].astype(np.int64)
        assert array.shape[1:] == value.shape
        assert value.lo <= array.min()
        assert array.max() <= value.hi


@SETTINGS
@given(cases())
def test_first_layer_has_the_bounds_of_its_worst_inputs(case):
    """The bounds are the accumulators of inputs that follow the signs of the weights, no less and no more."""
    _, _, plan, _ = case
    op = next(op for op in plan.ops if isinstance(op, Conv))
    source, result = plan.values[op.inputs[0]], plan.values[op.output]
    weights = op.mul * op.codes.astype(np.int64) + op.add
    ends = [weights * np.where(weights > 0, *pair) for pair in ((source.hi, source.lo), (source.lo, source.hi))]
    highest, lowest = (end.sum(axis=(1, 2, 3)) for end in ends)
    assert (lowest.min(), highest.max()) == (result.lo, result.hi)


# Real arithmetic. Every operation is checked on the integers that went into it, so errors do not add up.


@settings(SETTINGS, max_examples=80)
@given(cases())
def test_integers_follow_real_arithmetic(case):
    program, choice, plan, codes = case
    ints = {name: array.astype(np.int64) for name, array in ReferenceExecutor(plan).run_all(codes).items()}
    checker = RealChecker(program, choice, plan)
    for op in plan.ops:
        inputs = [plan.values[i] for i in op.inputs]
        checker.check(op, [ints[v.name] for v in inputs], ints[op.name])


class RealChecker:
    """Recomputes one operation in float64 from the program (not from the plan's constants), with its rounding bound."""

    def __init__(self, program: Program, choice: Any, plan: Plan) -> None:
        self.program, self.plan = program, plan
        self.nodes: dict[str, Node] = {node.name: node for node in program.nodes}
        named = program.plans[choice] if isinstance(choice, str) else choice
        self.map = named if isinstance(named, dict) else dict.fromkeys(program.layers, named)
        self.own = program.factors[choice].affine if isinstance(choice, str) else {}

    def check(self, op: Any, inputs: list[Array], result: Array) -> None:
        kind = type(op).__name__.lower()
        getattr(self, kind)(op, self.nodes[op.name], inputs, result)

    def scale(self, index: int) -> float:
        return self.plan.values[index].scale or 1.0

    def affine(self, name: str) -> Array:
        if name in self.own:
            return self.own[name]
        return self.program.factors[str(self.map[self.program.affines[name].owner])].affine[name]

    def real_codes(self, layer: Layer) -> Array:
        bits, held = layer.weight_bits[self.map[layer.name]], self.program.weights[layer.name]
        mul, add = layer.integer_form[self.map[layer.name]]
        return mul * np.floor(held.codes / 2.0 ** (held.bits - bits)) + add

    def conv(self, op: Conv, node: Node, inputs: list[Array], result: Array) -> None:
        layer = self.program.layers[node.attrs["layer"]]
        weights, groups = self.real_codes(layer), node.attrs["groups"]
        x = pad_reals(inputs[0], node.attrs["padding"], np.asarray(layer.pad_code[self.map[layer.name]], float))
        per_group, outs = weights.shape[1], weights.shape[0] // groups
        for y, x0, window in windows(x, layer.shape[2:], node.attrs["stride"], node.attrs["dilation"]):
            for channel, kernel in enumerate(weights):
                first = channel // outs * per_group
                part = window[:, :, :, first : first + per_group]
                expected = np.einsum("nhwc,chw->n", part, kernel)
                np.testing.assert_array_equal(result[:, y, x0, channel], expected)  # integers below 2^53

    def requant(self, op: Requant, node: Node, inputs: list[Array], result: Array) -> None:
        gain, shift = np.float64(self.scale(op.inputs[0])), np.float64(0)
        for name in node.attrs["affine"]:
            g, h = self.affine(name)
            gain, shift = g * gain, g * shift + h
        real = gain * inputs[0] + shift
        real = np.clip(real, *real_clip(node))
        if node.op == "requant":
            to = node.attrs["to"]
            unit = self.program.factors[str(self.map[to])].step[to]
            bounds = self.program.layers[to].input_range[self.map[to]]
            (offset,) = self.program.layers[to].input_offset[self.map[to]]
        else:
            unit, bounds, offset = self.scale(op.output), (-(2**31) + 1, 2**31 - 1), 0.0
        exact = real / unit - offset
        # M and B are off by at most 1/2 each, in units of 2^-shift; the rest is float64 on both sides.
        slack = (np.abs(inputs[0]) + 1) * 0.5 ** (op.shift + 1.0)
        slack = slack + 1e-14 * (np.abs(gain * inputs[0]) + np.abs(shift)) / unit + 1e-12 + 1e-14 * abs(offset)
        assert (result >= np.clip(np.floor(exact - slack + 0.5), *bounds)).all()
        assert (result <= np.clip(np.floor(exact + slack + 0.5), *bounds)).all()

    def add(self, op: Add, node: Node, inputs: list[Array], result: Array) -> None:
        real = sum(array * self.scale(index) for array, index in zip(inputs, op.inputs, strict=True))
        unit = self.scale(op.output)
        roundings = (op.shift_a > 0) + (op.shift_b > 0)
        assert (np.abs(real - result * unit) <= unit * (roundings / 2 + 1e-6)).all()

    def clip(self, op: Clip, node: Node, inputs: list[Array], result: Array) -> None:
        low, high = real_clip(node)
        unit = self.scale(op.output)
        assert (np.abs(np.clip(inputs[0] * unit, low, high) - result * unit) <= unit * 0.5001).all()

    def maxpool(self, op: MaxPool, node: Node, inputs: list[Array], result: Array) -> None:
        x = pad_reals(inputs[0], node.attrs["padding"], np.asarray([-np.inf]))
        for y, x0, window in windows(x, node.attrs["kernel"], node.attrs["stride"], (1, 1)):
            np.testing.assert_array_equal(result[:, y, x0], window.max(axis=(1, 2)))

    def sumpool(self, op: SumPool, node: Node, inputs: list[Array], result: Array) -> None:
        codes = self.plan.values[op.inputs[0]].scale is None
        x, unit = (
            pad_reals(inputs[0], node.attrs["padding"], np.zeros(1)) * self.scale(op.inputs[0]),
            self.scale(op.output),
        )
        for y, x0, window in windows(x, node.attrs["kernel"], node.attrs["stride"], (1, 1)):
            if codes:
                np.testing.assert_array_equal(result[:, y, x0], window.sum(axis=(1, 2)))
                continue
            error = np.abs(window.mean(axis=(1, 2)) - result[:, y, x0] * unit)
            assert (error <= unit * (0.5 if op.shift else 0) + unit * 1e-4).all()

    def slice(self, op: Slice, node: Node, inputs: list[Array], result: Array) -> None:
        c, h, w = (list(range(*node.attrs[key])) for key in "chw")
        np.testing.assert_array_equal(result, inputs[0][:, h][:, :, w][..., c])

    def pad(self, op: Pad, node: Node, inputs: list[Array], result: Array) -> None:
        (c, _), (h, _), (w, _) = (node.attrs[key] for key in "chw")
        _, height, width, channels = inputs[0].shape
        inner = result[:, h : h + height, w : w + width, c : c + channels]
        np.testing.assert_array_equal(inner, inputs[0])
        assert np.abs(result).sum() == np.abs(inner).sum()

    def flatten(self, op: Any, node: Node, inputs: list[Array], result: Array) -> None:
        _, height, width, channels = inputs[0].shape
        order = itertools.product(range(channels), range(height), range(width))
        for position, (c, y, x) in enumerate(order):
            np.testing.assert_array_equal(result[:, 0, 0, position], inputs[0][:, y, x, c])


def real_clip(node: Node) -> tuple[float, float]:
    low, high = node.attrs["clip"]
    return (-np.inf if low is None else low, np.inf if high is None else high)


def pad_reals(x: Array, padding: list[int], fill: Array) -> Array:
    top, bottom, left, right = padding
    n, height, width, channels = x.shape
    out = np.broadcast_to(fill, (n, height + top + bottom, width + left + right, channels)).astype(float)
    out[:, top : top + height, left : left + width] = x
    return out


def windows(x: Array, kernel: Any, stride: Any, dilation: Any) -> Iterator[tuple[int, int, Array]]:
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    for y, top in enumerate(range(0, x.shape[1] - spans[0] + 1, stride[0])):
        for x0, left in enumerate(range(0, x.shape[2] - spans[1] + 1, stride[1])):
            yield y, x0, x[:, top : top + spans[0] : dilation[0], left : left + spans[1] : dilation[1]]


# Sessions


@SETTINGS
@given(programs(), st.data())
def test_session_moves_between_precisions_as_if_fresh(program, data):
    session = Session.from_program(program, data.draw(choices(program)), executor="oracle")
    for _ in range(3):
        choice = data.draw(choices(program))
        session.set_precision(choice)
        value = session.plan.values[session.plan.input]
        codes = input_codes(program, value.lo, value.hi, 4, 0)
        x = codes.transpose(0, 3, 1, 2)
        if program.input_kind == "codes":
            offset = np.reshape(session.plan.input_offset, (-1, 1, 1))
            x = (x + offset) * session.plan.input_step
        else:
            assert x.dtype == np.uint8
        fresh = OracleExecutor(derive(program, choice)).run(codes)
        found = session.run_raw(x, floats=program.input_kind == "codes")
        np.testing.assert_array_equal(
            found.reshape(len(codes), -1), fresh.transpose(0, 3, 1, 2).reshape(len(codes), -1)
        )
