"""Requantization by table: a plan whose requantizations look results up (spec/numerics.md, section 9).

An accumulator of few additions takes few values, which derivation has proved. Where they are few enough, a
requantization is a table a channel: no multiplication, comparison or shift, and equal for every value that can occur.
With three weight states and two activation states (MaQD) even the residual stream and the logits are made so.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .plan import Op, Plan, Requant, Table

MOST_ENTRIES = 4096  # of a channel: 16 KiB


def as_tables(plan: Plan, most_entries: int = MOST_ENTRIES) -> Plan:
    """The plan with each requantization from i32 as a `Table`, where its input has at most `most_entries` values.

    Exact: an entry is the requantization's own result for that input, and the plan's bounds are proved. Other
    operations and requantizations, values and bounds stay as they are. After `as_thresholds`, only what that has left
    is changed: results in fixed point, and codes of many values.

    Raises:
        ValueError: most_entries outside 1..2^20.
    """
    if not 1 <= most_entries <= 1 << 20:
        raise ValueError(f"as_tables: most_entries = {most_entries}: must be 1..2^20")
    return dataclasses.replace(plan, ops=tuple(_changed(plan, op, most_entries) for op in plan.ops))


def _changed(plan: Plan, op: Op, most_entries: int) -> Op:
    source = plan.values[op.inputs[0]]
    if not isinstance(op, Requant) or source.dtype != "i32" or source.hi - source.lo >= most_entries:
        return op
    x = np.arange(source.lo, source.hi + 1, dtype=np.int64)[:, None]
    with np.errstate(over="ignore"):
        found = np.clip((x * op.multiplier.astype(np.int64) + op.bias) >> op.shift.astype(np.int64), op.lo, op.hi)
    # The bounds are those of all channels: what one channel never sees may wrap there, and is kept within the result's.
    result = plan.values[op.output]
    table = np.clip(found, result.lo, result.hi).astype(np.int32)
    return Table(op.name, op.inputs, op.output, table, source.lo)
