"""program_summary: the program on one screen, with the proved accumulator headroom of every layer."""

from __future__ import annotations

import math

from bitstrata_runtime.derive import headroom
from bitstrata_runtime.program import Program


def program_summary(program: Program) -> str:
    """A table of the program's layers: shapes, widths, and bits of accumulator headroom at every precision.

    Headroom is 31 - log2(largest possible |accumulator|): bits that even the worst input leaves unused in int32.
    """
    rooms = {p: headroom(program, p) for p in program.precisions}
    head = ["layer", "kind", "weight shape", "grid", "stored", *(f"headroom@{p}" for p in program.precisions)]
    table = [head]
    for name, layer in program.layers.items():
        stored = f"{layer.source_bits} bit " + ("planes" if layer.planes else "codes")
        shape = "x".join(map(str, layer.shape))
        rows = [f"{rooms[p][name]:.1f}" for p in program.precisions]
        table.append([name, layer.kind, shape, layer.grid, stored, *rows])
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    weights = sum(math.prod(layer.shape) for layer in program.layers.values())
    least = min(min(room.values()) for room in rooms.values())
    lines.append(
        f"{len(program.nodes)} integer operations, {weights:,} weights, input {program.input_kind} "
        f"{'x'.join(map(str, program.input_shape))}; accumulators proved within int32, least headroom {least:.1f} bits"
    )
    return "\n".join(lines)
