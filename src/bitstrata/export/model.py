"""`export_c`: a plan as a folder of C files for microcontrollers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitstrata_runtime.errors import ProgramError
from bitstrata_runtime.plan import Conv, Plan
from bitstrata_runtime.reference import OracleExecutor, check_codes

from .emit import Emitter, scratch_name
from .memory import Arena, Buffer, element_bytes, plan_arena, plan_bytes
from .packing import PackedConv, pack, scratch_bytes
from .schedule import Schedule, schedule
from .tables import Tables

RUNTIME = ("bitstrata_mcu.h", "bitstrata_mcu.c")
TILES = (16, 8, 4, 2)  # pixels, over which a row of weights is unpacked once
_WORTH = 1.1  # how much larger than the smallest arena one with larger tiles may be
_MOST_BYTES = (1 << 31) - 1  # positions in maps and in the arena are 32-bit numbers


@dataclass(frozen=True)
class Exported:
    """What `export_c` has written. Bytes: arena_bytes of RAM, table_bytes of constants (structures come on top)."""

    files: tuple[Path, ...]
    arena_bytes: int
    table_bytes: int
    kernels: dict[str, int]  # kernel of the C runtime -> operations that use it


def export_c(
    plan: Plan, out: Path, *, name: str = "model", title: str = "", vector: NDArray[Any] | None = None
) -> Exported:
    """Write the plan as C99 to the folder `out`: NAME.h, NAME.c, the runtime they need, and main.c.

    name: a C identifier, the prefix of what NAME.h declares. vector: an input's codes (H, W, C), of the plan's input
    dtype, which main.c runs and compares with the reference executor's integers; None: random codes. Raises ValueError
    for a name that C does not allow or a vector that is no input of the plan, ProgramError for a network whose maps
    32-bit positions cannot address.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name.startswith("bs_") or name == "main":
        raise ValueError(f"export: name {name!r} must be a C identifier, not 'main', and not begin with 'bs_'")
    codes = _vector(plan, vector)
    planned = _plan(plan)
    emitter = Emitter(planned.schedule, planned.convs, planned.arena, planned.tiles)
    tables = emitter.write()
    out.mkdir(parents=True, exist_ok=True)
    runtime = resources.files(__package__) / "c"
    texts = {file: (runtime / file).read_text(encoding="utf-8") for file in RUNTIME}
    texts[f"{name}.h"] = _header(plan, name, title, planned.arena.bytes)
    texts[f"{name}.c"] = _source(name, title, tables, planned, _input_type(plan))
    texts["main.c"] = _main(plan, name, codes)
    for file, text in texts.items():
        (out / file).write_text(text, encoding="utf-8")
    files = tuple(out / file for file in texts)
    return Exported(files, planned.arena.bytes, emitter.tables.size, emitter.forms)


@dataclass(frozen=True)
class _Planned:
    schedule: Schedule
    convs: dict[int, PackedConv]
    arena: Arena
    tiles: list[int]


def _plan(plan: Plan) -> _Planned:
    """The schedule with the largest tiles that cost no memory worth speaking of."""
    scheduled = schedule(plan)
    convs = {op.output: pack(op, plan.values[op.inputs[0]]) for op in _convs(scheduled)}
    found: list[tuple[Arena, list[int]]] = []
    for most in TILES:
        tiles = [min(most, group.pixels) for group in scheduled.groups]
        found.append((plan_arena(scheduled, _tile_buffers(scheduled, convs, tiles), tiles), tiles))
    allowed = _WORTH * min(arena.bytes for arena, _ in found)
    best = next(one for one in found if one[0].bytes <= allowed)
    roomy = _widened(scheduled, convs, *best)
    raised = (plan_arena(scheduled, _tile_buffers(scheduled, convs, roomy), roomy), roomy)
    best = raised if raised[0].bytes <= allowed else best
    largest = max([best[0].bytes, *(int(np.prod(value.shape)) * 4 for value in scheduled.values)])
    if largest > _MOST_BYTES:
        raise ProgramError(f"export: {largest} bytes, of a map or of all, are more than 32-bit positions can address")
    return _Planned(scheduled, convs, *best)


def _widened(plan: Schedule, convs: dict[int, PackedConv], arena: Arena, tiles: list[int]) -> list[int]:
    """The largest tiles for groups which then still need less than the arena."""
    spans = plan.first_last()
    wide = [min(TILES[0], group.pixels) for group in plan.groups]
    alive = [0] * len(wide)
    for index, (first, last) in spans.items():
        if index not in (plan.input, plan.output):
            for position in range(first, last + 1):
                alive[position] += plan_bytes(plan, index)
    for buffer in _tile_buffers(plan, convs, wide):
        alive[buffer.first] += buffer.bytes
    return [w if bytes_ <= arena.bytes else t for w, t, bytes_ in zip(wide, tiles, alive, strict=True)]


def _convs(plan: Schedule) -> list[Conv]:
    return [op for group in plan.groups for op in group.ops if isinstance(op, Conv)]


def _tile_buffers(plan: Schedule, convs: dict[int, PackedConv], tiles: list[int]) -> list[Buffer]:
    """Values that exist as tiles, and scratch."""
    buffers = []
    for position, group in enumerate(plan.groups):
        last: dict[int, int] = {index: step for step, op in enumerate(group.ops) for index in op.inputs}
        for step, op in enumerate(group.ops):
            if op.output not in plan.maps:
                value = plan.values[op.output]
                size = tiles[position] * value.shape[2] * element_bytes(value.dtype)
                buffers.append(Buffer(f"value {op.output}", size, position, position, (step, last[op.output])))
            if op.output in convs:
                size = scratch_bytes(convs[op.output], tiles[position])
                buffers.append(Buffer(scratch_name(op), size, position, position, (step, step)))
    return buffers


def _vector(plan: Plan, vector: NDArray[Any] | None) -> NDArray[Any]:
    value = plan.values[plan.input]
    if vector is None:
        dtype = np.uint8 if value.dtype == "u8" else np.int8
        return np.random.default_rng(0).integers(value.lo, value.hi + 1, value.shape).astype(dtype)
    check_codes(value, vector[np.newaxis])
    return vector


def _guard(name: str) -> str:
    return f"{name.upper()}_H"


def _input_type(plan: Plan) -> str:
    return "uint8_t" if plan.values[plan.input].dtype == "u8" else "int8_t"


def _header(plan: Plan, name: str, title: str, arena_bytes: int) -> str:
    source, result, prefix = plan.values[plan.input], plan.values[plan.output], name.upper()
    sizes = {
        f"{prefix}_{end}_{what}": size
        for end, value in (("INPUT", source), ("OUTPUT", result))
        for what, size in zip(("HEIGHT", "WIDTH", "CHANNELS"), value.shape, strict=True)
    }
    defines = "\n".join(f"#define {key} {size}" for key, size in sizes.items())
    offsets = ", ".join(f"{z!r}" for z in plan.input_offset[:4]) + (", ..." if len(plan.input_offset) > 4 else "")
    return f"""/* {title or name}: made by bitstrata export. */
#ifndef {_guard(name)}
#define {_guard(name)}

#include <stdint.h>

{defines}

/* RAM that {name}_run uses beside its stack, in bytes; it is static. */
#define {prefix}_ARENA_BYTES {arena_bytes}

/* A result's real value is {prefix}_OUTPUT_SCALE times its integer; nothing here computes it. */
#define {prefix}_OUTPUT_SCALE {result.scale!r}

/* One input to one output; both are (height, width, channels), channels fastest. Not for two callers at a time.
 * An input code c, from {source.lo} to {source.hi}, stands for {plan.input_step!r} * (c + z); z = {offsets}. */
void {name}_run(const {_input_type(plan)} *input, int32_t *output);

#endif
"""


def _source(name: str, title: str, tables: str, planned: _Planned, ctype: str) -> str:
    words = max(planned.arena.bytes // 4, 1)
    return f"""/* {title or name}: made by bitstrata export. bitstrata_mcu.h explains the types of these tables. */
#include "{name}.h"

#include "bitstrata_mcu.h"

static uint32_t arena[{words}];

{tables}
void {name}_run(const {ctype} *input, int32_t *output) {{
  bs_run(groups, {len(planned.schedule.groups)}, (uint8_t *)arena, input, output);
}}
"""


def _main(plan: Plan, name: str, codes: NDArray[Any]) -> str:
    expected = OracleExecutor(plan).run(codes[np.newaxis])
    tables = Tables()
    ctype = _input_type(plan)
    values = ", ".join(map(str, codes.reshape(-1).tolist()))
    tables.array("expected", expected.astype(np.int32))
    return f"""/* Runs {name} on one input and compares every integer of the output with the expected ones. */
#include <inttypes.h>
#include <stdio.h>

#include "{name}.h"

static const {ctype} input[{codes.size}] = {{{values}}};

{tables.text[0]}
int main(void) {{
  static int32_t output[{expected.size}];
  int different = 0;
  {name}_run(input, output);
  for (int i = 0; i < {expected.size}; ++i) {{
    printf("%d: %" PRId32 "\\n", i, output[i]);
    different += output[i] != expected[i];
  }}
  printf(different ? "%d integers differ\\n" : "all integers as expected\\n", different);
  return different != 0;
}}
"""
