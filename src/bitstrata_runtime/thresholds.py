"""Requantization by comparison: a plan whose requantizations do not multiply (spec/numerics.md, section 8).

clamp((x*M + B) >> s, lo, hi) never falls in x where M > 0, never rises where M < 0, and is constant where M = 0. So it
is lo plus the number of thresholds that x has passed, and each threshold is one integer a channel: the form of SAT's
appendix S7 (batch normalization as bias and clipping level) and of MaQD at two activation states (one threshold).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .plan import Op, Plan, Requant, Thresholds

INT32 = np.iinfo(np.int32)
MOST_LEVELS = 15  # of a 4-bit code: beyond, comparing takes longer than multiplying


def as_thresholds(plan: Plan, most_levels: int = MOST_LEVELS) -> Plan:
    """The plan with each requantization from i32 to codes of at most `most_levels` + 1 values as `Thresholds`.

    Exact: the thresholds are computed in integers of any size from the inequality that defines them, so both forms give
    equal codes for every int32. Other operations, values and bounds stay as they are.

    Raises:
        ValueError: most_levels outside 1..255.
    """
    if not 1 <= most_levels <= 255:
        raise ValueError(f"as_thresholds: most_levels = {most_levels}: must be 1..255")
    return dataclasses.replace(plan, ops=tuple(_changed(plan, op, most_levels) for op in plan.ops))


def _changed(plan: Plan, op: Op, most_levels: int) -> Op:
    if not isinstance(op, Requant) or plan.values[op.inputs[0]].dtype != "i32":
        return op
    codes = plan.values[op.output].dtype != "i32"
    return _thresholds(op) if codes and 1 <= op.hi - op.lo <= most_levels else op


def _thresholds(op: Requant) -> Op:
    """For M > 0: x*M + B >= k << s  <=>  x > ceil(((k << s) - B) / M) - 1. For M < 0 the negation counts down."""
    levels, channels = op.hi - op.lo, len(op.multiplier)
    after = np.full((levels, channels), INT32.max, np.int32)
    sign = np.ones(channels, np.int8)
    base = np.full(channels, op.lo, np.int32)
    for c in range(channels):
        m, b, s = int(op.multiplier[c]), int(op.bias[c]), int(op.shift[c])
        if m < 0:
            sign[c], base[c] = -1, op.hi
        for j in range(levels):
            need = ((op.lo + 1 + j) << s) - b  # the code is above lo + j where x*m >= need
            if m == 0:
                base[c] += need <= 0
                continue
            last = -(-need // m) - 1 if m > 0 else need // m  # x > last passes (m > 0), or fails (m < 0)
            if last < INT32.min:  # every x is beyond it
                base[c] += sign[c]
            else:
                after[j, c] = min(last, INT32.max)
    return Thresholds(op.name, op.inputs, op.output, after, sign, base)
