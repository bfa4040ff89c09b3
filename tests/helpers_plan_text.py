"""Plans as the lines that the native `derive_dump` prints, number by number."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from functools import singledispatch
from typing import Any

from bitstrata_runtime import plan as p
from bitstrata_runtime.program import Program


def argument(program: Program, choice: Any) -> str:
    """A precision, plan or map as `derive_dump` takes it."""
    if isinstance(choice, Mapping):
        return "map:" + ",".join(str(choice[name]) for name in program.layers)
    return f"plan:{choice}" if isinstance(choice, str) else f"bits:{choice}"


def lines(plan: p.Plan) -> list[str]:
    """The plan's lines after its choice."""
    found = [_join("plan", [plan.output], map(_bits, [plan.input_step, *plan.input_offset]))]
    for value in plan.values:
        scale = [] if value.scale is None else [_bits(value.scale)]
        found.append(_join("value", value.shape, [value.dtype, value.lo, value.hi], scale, [value.name]))
    for index, op in enumerate(plan.ops):
        assert op.output == index + 1
        found.append(_join(_text(op), ["from"], op.inputs))
    return found


def _bits(value: float) -> str:
    return f"{struct.unpack('<Q', struct.pack('<d', value))[0]:016x}"


def _join(first: str, *rest: Iterable[Any]) -> str:
    return " ".join([first, *(str(item) for part in rest for item in part)])


@singledispatch
def _text(op: p.Op) -> str:
    raise NotImplementedError(type(op).__name__)


@_text.register
def _(op: p.Conv) -> str:
    checksum = zlib.adler32(op.codes.tobytes())
    sizes = (op.codes.shape, op.stride, op.padding, op.dilation, op.pad_code.tolist())
    return _join("conv", [checksum, op.mul, op.add, op.groups], *sizes, [op.layer])


@_text.register
def _(op: p.Requant) -> str:
    return _join("requant", [op.lo, op.hi], op.multiplier.tolist(), op.bias.tolist(), op.shift.tolist())


@_text.register
def _(op: p.Add) -> str:
    return _join("add", [op.shift_a, op.shift_b])


@_text.register
def _(op: p.Clip) -> str:
    return _join("clip", [op.lo, op.hi])


@_text.register
def _(op: p.MaxPool) -> str:
    return _join("maxpool", op.kernel, op.stride, op.padding)


@_text.register
def _(op: p.SumPool) -> str:
    return _join("sumpool", [op.shift], op.kernel, op.stride, op.padding)


@_text.register
def _(op: p.Slice) -> str:
    return _join("slice", op.h, op.w, op.c)


@_text.register
def _(op: p.Pad) -> str:
    return _join("pad", op.h, op.w, op.c)


@_text.register
def _(op: p.Flatten) -> str:
    return "flatten"
