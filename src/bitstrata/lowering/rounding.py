"""How far rounding can move a plan's values from the real numbers they stand for.

Forward error analysis of spec/numerics.md: the codes that convolutions read are taken as given, so accumulators are
exact, and everything from there to the next codes (or to the output) is rounded a known number of times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitstrata_runtime.plan import Add, Clip, Conv, Op, Plan, Requant, SumPool, Value

_ULP = 2.0**-52


def rounding_bounds(plan: Plan) -> dict[str, float]:
    """Value name -> largest distance to its real meaning, in the value's own units.

    For codes: how far, in code steps, the number in front of the final rounding (`unrounded`) may be from the model's;
    two codes may differ only where that number is this near to a threshold. For fixed point: half a unit for each
    rounding since the last accumulators, times the gains between. The bounds include the float64 rounding of the model
    evaluated for comparison (its sums in any order, a few operations an element).
    """
    bounds = {plan.values[plan.input].name: 0.0}
    for op in plan.ops:
        inputs = [bounds[plan.values[index].name] for index in op.inputs]
        bounds[plan.values[op.output].name] = _bound(plan, op, inputs)
    return bounds


def unrounded(op: Requant, x: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """The number that a requantization rounds to an integer, for inputs x (N, H, W, C), clamped as its result is."""
    shift = op.shift.astype(np.int64)
    scaled = x.astype(np.int64) * op.multiplier.astype(np.int64) + op.bias  # fits int64, less its half it might not
    return np.clip(np.ldexp(scaled.astype(np.float64), -shift) - 0.5 * (shift > 0), op.lo, op.hi)


def _bound(plan: Plan, op: Op, inputs: list[float]) -> float:
    source, result = plan.values[op.inputs[0]], plan.values[op.output]
    if isinstance(op, Conv):
        terms = op.codes.size // op.codes.shape[0] + 8
        return terms * _ULP * max(abs(source.lo), abs(source.hi), 1) * float(_row_sums(op).max())
    if isinstance(op, Requant):
        return _requant_bound(op, inputs[0], max(abs(source.lo), abs(source.hi)), is_codes=result.scale is None)
    if isinstance(op, Add):
        shifts = (op.shift_a, op.shift_b)
        return sum(e * 2.0**-s + 0.5 * (s > 0) for e, s in zip(inputs, shifts, strict=True)) + _float(result)
    if isinstance(op, Clip):
        return inputs[0] + 0.5  # the clip's own bounds are rounded to units
    if isinstance(op, SumPool):
        window = op.kernel[0] * op.kernel[1]
        return inputs[0] * window * 2.0**-op.shift + 0.5 * (op.shift > 0) + window * _float(result)
    return inputs[0]


def _row_sums(op: Conv) -> NDArray[np.int64]:
    return np.abs(op.mul * op.codes.astype(np.int64) + op.add).reshape(op.codes.shape[0], -1).sum(axis=1)


def _requant_bound(op: Requant, before: float, magnitude: int, *, is_codes: bool) -> float:
    """Constants are rounded to integers (half a unit each, of 2^-shift); fixed point also rounds the result."""
    unit = np.ldexp(1.0, -op.shift.astype(np.int64))
    gain = np.abs(op.multiplier.astype(np.float64)) * unit
    constants = 0.5 * (magnitude + 1) * unit
    floats = 8 * _ULP * (gain * magnitude + np.abs(op.bias.astype(np.float64)) * unit)
    return float((gain * before + constants + floats).max()) + (0.0 if is_codes else 0.5)


def _float(value: Value) -> float:
    """What float64 arithmetic of the model may add to a value, an operation."""
    return 4 * _ULP * max(abs(value.lo), abs(value.hi))
