"""A layer's step in one operation each way against the operations one by one: equal to the bit, on every kernel row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers_integer import gauss
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitstrata.integer import CounterGenerator, Geometry, IntegerRule, LayerState, integer_conv, integer_linear
from bitstrata.integer import engine_step as module_under_test
from bitstrata.integer.engine_step import EngineStep, OperandError, SharedWeight
from bitstrata_runtime import _engine

ISAS = (*_engine.available_isas(), *_engine.emulated_isas())
QUICK = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LONG = settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
BITS = st.integers(2, 8)
RULES = st.builds(
    IntegerRule,
    w=BITS,
    a=BITS,
    g=BITS,
    groups=st.integers(1, 8),
    act_rounding=st.sampled_from(["nearest", "stochastic"]),
    grad_rounding=st.sampled_from(["nearest", "stochastic"]),
    unsigned_nonneg=st.booleans(),
    method=st.sampled_from(["shift", "tensor"]),
)
CONVOLUTIONS = st.fixed_dictionaries({
    "conv_groups": st.sampled_from([1, 1, 2, 3]), "ins": st.integers(1, 9), "outs": st.integers(1, 9),
    "kernel": st.integers(1, 3), "stride": st.integers(1, 3), "padding": st.integers(0, 2),
    "dilation": st.integers(1, 2), "size": st.integers(1, 9), "planar": st.booleans(),
})  # fmt: skip
Case = dict[str, Any]


def step(case: Case, rule: IntegerRule, dtype: torch.dtype) -> list[Tensor]:
    """Result, gradients of input, weight and bias, and the seeds of what is drawn next."""
    torch.manual_seed(case["seed"])
    state = LayerState("layer", CounterGenerator(case["seed"]))
    x = case["x"].to(dtype, copy=True).requires_grad_()
    weight, bias = case["weight"].clone().requires_grad_(), case["bias"]
    bias = None if bias is None else bias.clone().requires_grad_()
    if case["geometry"] is None:
        y = integer_linear(x, weight, bias, rule=rule, state=state)
    else:
        y = integer_conv(x, weight, bias, case["geometry"], rule=rule, state=state)
    y.backward(gauss(*y.shape, seed=case["seed"] + 1, axis=-1 if case["geometry"] is None else 1))
    found = [y.detach(), x.grad, weight.grad, None if bias is None else bias.grad]
    return [t for t in found if t is not None] + [torch.tensor(state.noise.stream), torch.rand(1)]


@dataclass(frozen=True)
class Way:
    """How the engine is asked, and for which input."""

    isa: str
    threads: int
    dtype: torch.dtype = torch.float32


def check(case: Case, rule: IntegerRule, way: Way) -> None:
    if rule.unsigned_nonneg:
        case["x"] = case["x"].relu()
    want = step(case, replace(rule, form="float64"), way.dtype)
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITSTRATA_ISA", way.isa)
        torch.set_num_threads(way.threads)
        try:
            found = step(case, rule, way.dtype)
        finally:
            torch.set_num_threads(before)
    for mine, other in zip(found, want, strict=True):
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        assert torch.equal(mine, other)


def linear_case(rows: tuple[int, ...], ins: int, outs: int, seed: int, *, biased: bool) -> Case:
    return {
        "seed": seed, "geometry": None, "x": gauss(*rows, ins, seed=seed, axis=-1),
        "weight": gauss(outs, ins, seed=seed + 2), "bias": gauss(1, outs, seed=seed + 3)[0] if biased else None,
    }  # fmt: skip


def conv_case(shape: dict[str, Any], seed: int, *, biased: bool) -> Case:
    groups, taps = shape["conv_groups"], shape["kernel"]
    assume(shape["size"] + 2 * shape["padding"] > shape["dilation"] * (taps - 1))
    dims = 2 if shape["planar"] else 1
    x = gauss(2, shape["ins"] * groups, *[shape["size"]] * dims, seed=seed)
    weight = gauss(shape["outs"] * groups, shape["ins"], *[taps] * dims, seed=seed + 2)
    return {
        "seed": seed, "geometry": Geometry(shape["stride"], shape["padding"], shape["dilation"], groups), "x": x,
        "weight": weight, "bias": gauss(1, len(weight), seed=seed + 3)[0] if biased else None,
    }  # fmt: skip


WAYS = st.builds(
    Way,
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)
MATRICES = st.fixed_dictionaries({
    "rows": st.sampled_from([(1,), (7,), (2, 3), (65,), (3, 2, 11), ()]), "ins": st.integers(1, 70),
    "outs": st.integers(1, 70),
})  # fmt: skip
LINEAR = given(rule=RULES, shape=MATRICES, seed=st.integers(0, 99), biased=st.booleans(), way=WAYS)
CONV = given(rule=RULES, shape=CONVOLUTIONS, seed=st.integers(0, 99), biased=st.booleans(), way=WAYS)


def check_linear(rule: IntegerRule, shape: dict[str, Any], seed: int, biased: bool, way: Way) -> None:
    check(linear_case(shape["rows"], shape["ins"], shape["outs"], seed, biased=biased), rule, way)


def check_conv(rule: IntegerRule, shape: dict[str, Any], seed: int, biased: bool, way: Way) -> None:
    check(conv_case(shape, seed, biased=biased), rule, way)


test_linear = QUICK(LINEAR(check_linear))
test_convolution = QUICK(CONV(check_conv))
test_linear_at_length = pytest.mark.soak(LONG(LINEAR(check_linear)))
test_convolution_at_length = pytest.mark.soak(LONG(CONV(check_conv)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [{"grad_grid": "powers"}, {"clip_ratio": 0.5}, {"g": 3, "grad_grid": "powers"}])
def test_grids_of_ours(options: dict[str, Any], isa: str) -> None:
    rule = IntegerRule(unsigned_nonneg=True, **options)
    check(linear_case((33,), 40, 24, 5, biased=True), rule, Way(isa, 2))


@pytest.mark.parametrize("options", [{}, {"method": "tensor"}])
def test_a_weight_that_calls_share_has_its_codes_made_once_a_side(options: dict[str, Any]) -> None:
    rule, calls = IntegerRule(grad_rounding="nearest", **options), []
    x, weight = gauss(3, 5, axis=-1).requires_grad_(), gauss(4, 5, seed=1).requires_grad_()

    def twice(shared: SharedWeight | None) -> list[Tensor]:
        y = sum(integer_linear(part, weight, rule=rule, shared=shared).square() for part in (x, 2 * x))
        return [y.detach(), *torch.autograd.grad(y.sum(), (x, weight))]

    class Counted(SharedWeight):
        def codes(self, operation: Any, weight: Tensor, *, by_output: bool) -> tuple[Any, ...]:
            made = super().codes(operation, weight, by_output=by_output)
            calls.append((by_output, id(made)))
            return made

    shared = Counted()
    assert all(torch.equal(a, b) for a, b in zip(twice(shared), twice(None), strict=True))
    assert [by_output for by_output, _ in calls] == [True, True, False, False]
    assert len(set(calls)) == 2
    with torch.no_grad():
        weight.mul_(3)  # a weight that has changed has other codes
    assert all(torch.equal(a, b) for a, b in zip(twice(shared), twice(None), strict=True))
    with torch.no_grad():
        weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"integer layer: weight \(4, 5\)"):
        twice(shared)


def test_the_step_is_the_engines_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    made_by = module_under_test._operation

    def counted(*args: Any) -> Any:
        calls.append("made")
        return made_by(*args)

    monkeypatch.setattr(module_under_test, "_operation", counted)
    case = linear_case((4,), 6, 5, 0, biased=True)
    step(case, IntegerRule(), torch.float32)
    assert calls == ["made"]
    step(case, IntegerRule(form="float64"), torch.float32)
    step(case, IntegerRule(), torch.float64)
    wide = linear_case((2,), 3000, 2, 0, biased=False)  # 8 bits in 8 groups: int32 is not proved to hold sums
    step(wide, IntegerRule(w=8, a=8, g=8, groups=8), torch.float32)
    assert calls == ["made"]


def test_what_is_not_finite_is_told() -> None:
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    made = EngineStep.of(IntegerRule(), None, (2, 4), (x, weight, None))
    assert made is not None
    with pytest.raises(OperandError, match="the weight contains NaN or infinity"):
        made.forward(x, weight * torch.inf, None, None, keep=True)
    with pytest.raises(OperandError, match="the input or gradient contains"):
        made.forward(x * torch.nan, weight, None, None, keep=True)
    _, kept = made.forward(x, weight, None, None, keep=True)
    with pytest.raises(OperandError, match="the input or gradient contains"):
        made.backward(torch.full((2, 4), torch.inf), (4, 3), weight, kept, None, needs=(True, True, True))


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
        _engine.LayerStep((1, 1), (1, 1), (0, 0), 0, 4, False, 4, 4, 1.0, 4, 4, False)
    operation = _engine.LayerStep((1, 1), (1, 1), (0, 0), 1, 4, False, 4, 4, 1.0, 4, 4, False)
    x, w = np.ones((2, 1, 1, 3), np.float32), np.ones((4, 3, 1, 1), np.float32)
    y, packed = np.empty((2, 1, 1, 4), np.float32), np.empty(3, np.uint8)
    arguments = [x, True, None, w, None, None, y, packed, "", 1]
    failed, scale, exponents = operation.forward(*arguments)
    assert (failed, len(exponents)) == ("", 1)
    kept = (packed, exponents, scale, True)
    for at, wrong, message in (
        (0, x.astype(np.int32), "x must be float32 or bfloat16"),
        (3, np.ones((4, 2, 1, 1), np.float32), "the weight does not fit input and output"),
        (4, (np.ones((4, 3, 1, 2), np.int8), np.ones(4, np.float32)), "the weight's codes must have its shape"),
        (4, (np.ones((4, 3, 1, 1), np.int8), np.ones(3, np.float32)), "scale must have one element for each channel"),
        (5, np.ones(3, np.float32), "bias must have one element for each output channel"),
        (6, np.empty((3, 1, 1, 4), np.float32), "input and output have different batches"),
        (6, np.empty((2, 2, 1, 4), np.float32), "layer step"),
        (7, np.empty(4, np.uint8), "packed must have 3 bytes, got 4"),
        (9, 0, "threads must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            operation.forward(*arguments[:at], wrong, *arguments[at + 1 :])
    gx, gw, gb = np.empty_like(x), np.empty_like(w), np.empty(4, np.float32)
    arguments = [y, None, x.shape, kept, w.shape, w, None, gx, gw, gb, "", 1]
    assert operation.backward(*arguments) == ""
    for at, wrong, message in (
        (2, (2, 1, 1, 5), "the weight does not fit input and output"),
        (3, None, "the weight's gradient needs the input's codes"),
        (3, (packed[:2].copy(), exponents, scale, True), "packed must have 3 bytes, got 2"),
        (3, (packed, exponents[:0].copy(), scale, True), "exponents must have 1 bytes, got 0"),
        (5, None, "the input's gradient needs the weight"),
        (5, np.ones((4, 3, 1, 2), np.float32), "weight must have the sizes that are given"),
        (6, (np.ones((4, 3, 1, 1), np.int8), np.ones(4, np.float32)), "scale must have one element for each channel"),
        (7, np.empty((2, 1, 1, 4), np.float32), "the input's gradient must have the input's shape"),
        (8, np.empty((4, 3, 2, 1), np.float32), "the weight's gradient must have the weight's shape"),
        (9, np.empty(3, np.float32), "the bias' gradient must have one element for each output channel"),
    ):
        with pytest.raises(ValueError, match=message):
            operation.backward(*arguments[:at], wrong, *arguments[at + 1 :])
