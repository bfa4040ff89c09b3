"""Plans as files of engine/tests/graph_test.cc: little-endian int64, as engine/tests/graph_numbers.h says."""

from __future__ import annotations

from collections.abc import Iterable
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np

from bitstrata_runtime import plan as p
from bitstrata_runtime.reference import ReferenceExecutor

DTYPES = {"u8": 0, "s8": 1, "i32": 2}
Array = np.ndarray[Any, Any]


def write_graph_file(path: Path, plan: p.Plan, codes: Array) -> None:
    """The plan, `codes` (N, H, W, C) as its input, and what the reference executor makes of them."""
    expected = ReferenceExecutor(plan).run_all(codes)
    order = {plan.input: 0} | {op.output: i + 1 for i, op in enumerate(plan.ops)}  # plan value -> value of the file
    source = plan.values[plan.input]
    parts: list[Any] = [*source.shape, DTYPES[source.dtype], source.lo, source.hi, len(plan.ops)]
    for op in plan.ops:
        parts += list(_numbers(op, [order[v] for v in op.inputs], plan.values[op.output]))
    parts += [len(codes), *(expected[plan.values[v].name] for v in order)]
    path.write_bytes(np.concatenate([np.ravel(part).astype("<i8") for part in parts]).tobytes())


@singledispatch
def _numbers(op: p.Op, inputs: list[int], result: p.Value) -> Iterable[Any]:
    raise TypeError(f"{type(op).__name__} has no form in a file")


@_numbers.register
def _(op: p.Conv, inputs: list[int], result: p.Value) -> Iterable[Any]:
    sizes = (op.codes.shape, op.mul, op.add, op.stride, op.padding, op.dilation, op.groups)
    return (0, *inputs, *sizes, op.codes, op.pad_code)


@_numbers.register
def _(op: p.Requant, inputs: list[int], result: p.Value) -> Iterable[Any]:
    constants = (op.multiplier, op.bias, op.shift)
    return (1, *inputs, DTYPES[result.dtype], op.lo, op.hi, len(op.multiplier), *constants)


@_numbers.register
def _(op: p.Add, inputs: list[int], result: p.Value) -> Iterable[Any]:
    return (2, *inputs, op.shift_a, op.shift_b)


@_numbers.register
def _(op: p.Clip, inputs: list[int], result: p.Value) -> Iterable[Any]:
    return (3, *inputs, op.lo, op.hi)


@_numbers.register
def _(op: p.MaxPool, inputs: list[int], result: p.Value) -> Iterable[Any]:
    return (4, *inputs, op.kernel, op.stride, op.padding)


@_numbers.register
def _(op: p.SumPool, inputs: list[int], result: p.Value) -> Iterable[Any]:
    pooling = (op.kernel, op.stride, op.padding)
    return (6, *inputs, *pooling) if result.dtype != "i32" else (5, *inputs, *pooling, op.shift)


@_numbers.register
def _(op: p.Slice, inputs: list[int], result: p.Value) -> Iterable[Any]:
    return (7, *inputs, op.h, op.w, op.c)


@_numbers.register
def _(op: p.Pad, inputs: list[int], result: p.Value) -> Iterable[Any]:
    return (8, *inputs, op.h, op.w, op.c)


@_numbers.register
def _(op: p.Flatten, inputs: list[int], result: p.Value) -> Iterable[Any]:
    return (9, *inputs)
