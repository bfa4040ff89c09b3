"""What a plan computes, counted by kind for one image."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from .plan import Add, Clip, Conv, MaxPool, Op, Plan, Requant, SumPool, Table, Thresholds

REPEATS = 4  # an input code of so many ones is added so many times instead of multiplied (sums of 2x2 single bits)


@dataclass(frozen=True)
class Operations:
    """Scalar operations of one image on int32 or narrower operands.

    rescalings: requantizations of an element by a product of 64 bits, which are among the multiplications; lookups: of
    an element in a table, whose index is among the additions.
    """

    multiplications: int = 0
    additions: int = 0
    comparisons: int = 0
    shifts: int = 0
    rescalings: int = 0
    lookups: int = 0

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def count(plan: Plan) -> dict[str, Operations]:
    """Operation name -> what it computes, at least; moves (slices, pads, flattening) compute nothing.

    A weight of zero costs nothing, one of 1 or -1 an addition. Any weight on an input of single bits is added or not,
    on sums of up to four single bits up to four times; otherwise a weight costs a multiplication and an addition.
    Windows that reach beyond the map count in full.
    """
    return {op.name: _of(plan, op) for op in plan.ops}


def _of(plan: Plan, op: Op) -> Operations:
    out = plan.values[op.output]
    elements = math.prod(out.shape)
    if isinstance(op, Conv):
        return _conv(plan, op, math.prod(out.shape[:2]))
    if isinstance(op, Requant):
        return Operations(elements, elements, 2 * elements, elements, rescalings=elements)
    if isinstance(op, Thresholds):
        return Operations(comparisons=elements * len(op.after), additions=elements * len(op.after))
    if isinstance(op, Table):
        return Operations(additions=elements, lookups=elements)
    if isinstance(op, Add):
        return Operations(additions=elements, shifts=elements * ((op.shift_a != 0) + (op.shift_b != 0)))
    if isinstance(op, Clip):
        return Operations(comparisons=2 * elements)
    if isinstance(op, MaxPool):
        return Operations(comparisons=elements * (math.prod(op.kernel) - 1))
    if isinstance(op, SumPool):
        return Operations(additions=elements * (math.prod(op.kernel) - 1), shifts=elements if op.shift else 0)
    return Operations()


def _conv(plan: Plan, op: Conv, positions: int) -> Operations:
    source = plan.values[op.inputs[0]]
    weights = np.abs(op.codes.astype(np.int64) * op.mul + op.add)
    ones, larger = int((weights == 1).sum()) * positions, int((weights > 1).sum()) * positions
    if source.lo == 0 and source.hi <= REPEATS:
        return Operations(additions=ones + larger * source.hi)
    return Operations(multiplications=larger, additions=ones + larger)
