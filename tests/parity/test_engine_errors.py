"""Inconsistent plans and inputs are refused with a message that names what is wrong; nothing is read or written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitstrata_runtime import plan as p
from bitstrata_runtime.engine import EngineExecutor

CONV = p.Conv(
    "c", (0,), 1, "layer", np.ones((4, 3, 3, 3), np.int8), 1, 0, (1, 1), (1, 1, 1, 1), (1, 1), 1, np.zeros(3, np.int32)
)
REQUANT = p.Requant("r", (0,), 1, np.ones(3, np.int32), np.zeros(3, np.int64), np.zeros(3, np.uint8), 0, 255)
MAX = p.MaxPool("m", (0,), 1, (2, 2), (1, 1), (1, 0, 1, 0))
SUM = p.SumPool("s", (0,), 1, (2, 2), (1, 1), (0, 0, 0, 0), 0)
SLICE = p.Slice("s", (0,), 1, (0, 4, 1), (0, 5, 1), (0, 3, 1))
PAD = p.Pad("p", (0,), 1, (0, 0), (0, 0), (0, 1))
ADD = p.Add("a", (0, 0), 1, 0, 0)
HUGE = 2**40


def plan_of(op: p.Op, shape: tuple[int, int, int], dtype: str, input_dtype: str = "u8") -> p.Plan:
    limits = {"u8": (0, 255), "s8": (-128, 127), "i32": (-(2**31), 2**31 - 1)}
    values = (
        p.Value("x", (4, 5, 3), input_dtype, *limits[input_dtype]),
        p.Value("y", shape, dtype, *limits[dtype]),
    )
    return p.Plan(values, (op,), 0, 1, 1.0, (0.0,))


def array(n: int, dtype: Any, fill: int = 0) -> Any:
    return np.full(n, fill, dtype)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (replace(CONV, codes=np.ones((4, 2, 3, 3), np.int8)), "codes take 2 input channels .* the input has 3"),
        (replace(CONV, codes=np.ones((4, 0, 3, 3), np.int8)), "extent of codes is 0"),
        (replace(CONV, codes=np.ones((4, 3, 9, 3), np.int8)), "window of height 9 exceeds the padded input's 6"),
        (replace(CONV, codes=np.ones((4, 3, 3, 3), np.int16)), r"codes must be int8 of 4 dimensions, got int16"),
        (replace(CONV, groups=3), "codes take 3 input channels in each of 3 groups"),
        (replace(CONV, groups=3, codes=np.ones((4, 1, 3, 3), np.int8)), "groups 3 does not divide the 4 output"),
        (replace(CONV, groups=0), "groups is 0"),
        (replace(CONV, stride=(0, 1)), "stride is 0"),
        (replace(CONV, stride=(1, HUGE)), f"stride is {HUGE}"),
        (replace(CONV, dilation=(1, -1)), "dilation is -1"),
        (replace(CONV, padding=(1, -1, 1, 1)), "padding is -1"),
        (replace(CONV, padding=(2**24,) * 4), "result height is 33554434, not in"),
        (replace(CONV, pad_code=array(2, np.int32)), "pad_code has 2 elements, the input 3 channels"),
        (replace(CONV, pad_code=array(3, np.int32, 256)), "pad_code is 256, not in 0..255"),
        (replace(CONV, mul=HUGE), f"mul is {HUGE}"),
        (replace(CONV, codes=np.full((4, 3, 3, 3), 127, np.int8), mul=259), r"mul \* code \+ add is 32893"),
        (replace(CONV, inputs=(7,)), "reads value 7"),
        (replace(CONV, inputs=(0, 0)), "Conv takes 1 inputs, got 2"),
        (replace(REQUANT, multiplier=np.ones((3, 1), np.int32)), r"multiplier must be int32 of 1 dim.* shape \(3, 1\)"),
        (replace(REQUANT, bias=np.ones(3)), "bias must be int64 of 1 dimensions, got float64"),
        (replace(REQUANT, shift=array(3, np.uint8, 63)), "shift is 63"),
        (replace(REQUANT, bias=array(2, np.int64)), "differ in length"),
        (replace(REQUANT, multiplier=array(2, np.int32), bias=array(2, np.int64), shift=array(2, np.uint8)), "2 elem"),
        (replace(REQUANT, hi=256), "hi is 256, not in 0..255"),
        (replace(REQUANT, lo=9, hi=8), "lo 9 is above hi 8"),
        (replace(MAX, kernel=(0, 1)), "kernel is 0"),
        (replace(MAX, padding=(2, 0, 0, 0)), "window of height 2 lies entirely in the padding"),
        (replace(MAX, padding=(0, 0, 0, 2)), "window of width 2 lies entirely in the padding"),
        (replace(SUM, shift=63), "shift is 63"),
        (replace(SUM, stride=(1, 0)), "stride is 0"),
        (replace(SLICE, h=(0, 5, 1)), "h stop is 5, not in 1..4"),
        (replace(SLICE, w=(-1, 5, 1)), "w start is -1"),
        (replace(SLICE, c=(0, 3, 0)), "c step is 0"),
        (replace(SLICE, c=(2, 2, 1)), "c stop is 2, not in 3..3"),
        (replace(PAD, w=(0, -1)), "w padding is -1"),
        (replace(PAD, h=(2**24, 0)), "result height is 16777220"),
        (ADD, "inputs are u8 and u8, an addition takes i32"),
        (p.Clip("c", (0,), 1, -1, 5), "lo is -1, not in 0..255"),
        (p.Op("o", (0,), 1), "Op is not an operation of the engine"),
        (p.Flatten("f", (0,), 0), "value 0 .* is computed already"),
    ],
)
def test_bad_operation(op: p.Op, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineExecutor(plan_of(op, (4, 5, 4), "u8"))


def test_bad_dtypes_and_shapes() -> None:
    with pytest.raises(ValueError, match="operation 'c': the input is i32"):
        EngineExecutor(plan_of(CONV, (4, 5, 4), "i32", "i32"))
    with pytest.raises(ValueError, match=r"the result is i32 of shape \(4, 5, 4\) .* the plan says i32 .* \(4, 5, 5\)"):
        EngineExecutor(plan_of(CONV, (4, 5, 5), "i32"))
    with pytest.raises(ValueError, match="the plan says s8"):
        EngineExecutor(plan_of(CONV, (4, 5, 4), "s8"))
    with pytest.raises(ValueError, match="shift_a is 63"):
        EngineExecutor(plan_of(replace(ADD, shift_a=63), (4, 5, 3), "i32", "i32"))
    with pytest.raises(ValueError, match="operation 's': the input is i32, a sum of codes takes u8 or s8"):
        EngineExecutor(plan_of(SUM, (3, 4, 3), "u8", "i32"))
    with pytest.raises(ValueError, match=r"the result is u8 of shape \(3, 4, 3\) .* the plan says s8"):
        EngineExecutor(plan_of(SUM, (3, 4, 3), "s8"))
    with pytest.raises(ValueError, match=r"the result is i32 .* the plan says u8"):
        EngineExecutor(plan_of(replace(SUM, shift=2), (3, 4, 3), "u8"))
    plan = plan_of(CONV, (4, 5, 4), "i32")
    with pytest.raises(ValueError, match="dtype 'f4' is not one of"):
        EngineExecutor(replace(plan, values=(replace(plan.values[0], dtype="f4"), plan.values[1])))
    with pytest.raises(ValueError, match="the plan reads value 1"):
        EngineExecutor(replace(plan_of(CONV, (4, 5, 4), "i32"), ops=()))
    with pytest.raises(ValueError, match="threads is 0"):
        EngineExecutor(plan_of(CONV, (4, 5, 4), "i32"), threads=0)


def test_bad_input() -> None:
    plan = plan_of(CONV, (4, 5, 4), "i32")
    engine = EngineExecutor(replace(plan, values=(replace(plan.values[0], hi=15), plan.values[1])))
    good = np.full((2, 4, 5, 3), 15, np.uint8)
    assert engine.run(good).shape == (2, 4, 5, 4)
    assert engine.run(good[:0]).shape == (0, 4, 5, 4)
    assert engine.run_all(good[:0])["x"].shape == (0, 4, 5, 3)
    np.testing.assert_array_equal(engine.run(good[::-1, :, ::-1]), engine.run(good))
    bad = good.copy()
    bad[1, 0, 0, 0] = 16
    with pytest.raises(ValueError, match=r"an element of image 1 is outside the input's range 0\.\.15"):
        engine.run(bad)
    with pytest.raises(ValueError, match=r"must be uint8 of shape \(N, 4, 5, 3\), got int8 of shape \(2, 4, 5, 3\)"):
        engine.run(good.astype(np.int8))
    with pytest.raises(ValueError, match=r"got uint8 of shape \(4, 5, 3\)"):
        engine.run(good[0])
