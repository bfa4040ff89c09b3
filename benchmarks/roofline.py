"""The share of this machine's limit that each layer reaches, and what holds back the worst three.

    python benchmarks/roofline.py --json benchmarks/results/roofline.json

writes the rows to the JSON file and the tables beside it, with the suffix .md. A layer is a convolution with what runs
tile by tile behind it (requantization, addition, pooling). Its limit is the sum of its operations' limits, each the
larger of two times: that of its products at the measured peak of the kernel's instructions, and that of its bytes at
the measured bandwidth of the cache that holds them (`bitstrata_runtime.profile`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path

from _common import machine_record, names, numbers, parser, step
from _networks import CASES, Case, float_network, pixels, program

import bitstrata_runtime as runtime
from bitstrata_runtime.engine import EngineExecutor
from bitstrata_runtime.plan import Conv, Plan
from bitstrata_runtime.profile import OpProfile, Profile

BITS = (1, 2, 4, 8)
WORST = 3
LEAST_REPEATS, MOST_REPEATS = 10, 400


@dataclass(frozen=True)
class LayerShare:
    """One layer at one width. us: of one image. share: limit / time, 1 is as fast as the machine allows.

    products_us, rest_us: what the convolution (its staging included) and the operations behind it take beyond their
    limits; a requantization that the convolution does with its sums is in the former.
    """

    case: str
    isa: str
    bits: int
    layer: str
    kernel: str
    us: float
    share_of_time: float
    share: float
    bound: str
    products_us: float
    rest_us: float
    shape: str
    held_back_by: str

    @property
    def lost_us(self) -> float:
        """Time beyond the limit."""
        return self.products_us + self.rest_us


def layers_of(case: str, bits: int, plan: Plan, found: Profile) -> list[LayerShare]:
    """Every group of operations that run together, in the order in which they run."""
    convs = {op.name: op for op in plan.ops if isinstance(op, Conv)}
    rows = []
    for _, group in groupby(found.ops, key=lambda op: op.group):
        ops = list(group)
        conv = next((op for op in ops if op.name in convs), None)
        seconds, limit = sum(op.seconds for op in ops), sum(op.limit_seconds for op in ops)
        products = _lost(conv) if conv is not None else 0.0
        head = conv or max(ops, key=lambda op: op.limit_seconds)
        rows.append(
            LayerShare(
                *(case, found.machine.isa, bits),
                layer=convs[conv.name].layer if conv is not None else head.name,
                kernel=head.kernel or head.kind,
                us=seconds * 1e6,
                share_of_time=seconds / found.seconds,
                share=limit / seconds if seconds > 0 else 0.0,
                bound=head.bound,
                products_us=products * 1e6,
                rest_us=(seconds - limit - products) * 1e6,
                shape=shape_of(plan, convs[conv.name]) if conv is not None else "x".join(map(str, head.shape)),
                held_back_by=held_back_by(plan, convs[conv.name], ops) if conv is not None else head.kind,
            )
        )
    return rows


def shape_of(plan: Plan, conv: Conv) -> str:
    """Kernel, channels, stride and the size of the result's map."""
    height, width, _ = plan.values[conv.output].shape
    out, group_in, kh, kw = conv.codes.shape
    groups = f" in {conv.groups} groups" if conv.groups > 1 else ""
    return f"{kh}x{kw}/{conv.stride[0]}, {group_in * conv.groups} to {out}{groups}, {height}x{width}"


def held_back_by(plan: Plan, conv: Conv, ops: Sequence[OpProfile]) -> str:
    """What the layer's time beyond its limit comes from: its larger part, and what its shape has to do with it."""
    product = next(op for op in ops if op.name == conv.name)
    behind = [op for op in ops if op.name != conv.name]
    if behind and sum(map(_lost, behind)) > _lost(product):
        worst = max(behind, key=_lost)
        return f"what follows the products, above all {worst.kind} ({worst.seconds * 1e6:.1f} us)"
    height, width, _ = plan.values[conv.output].shape
    out, group_in, kh, kw = conv.codes.shape
    if group_in == 1 and conv.groups > 1:
        return f"products: depthwise, {kh * kw} products an output and nothing shared between channels"
    if product.scratch_bytes > product.input_bytes:
        return (
            f"products: staging its input ({product.scratch_bytes / 1e3:.0f} kB written and read again, of "
            f"{product.input_bytes / 1e3:.0f} kB read)"
        )
    if product.weight_bytes > product.input_bytes + product.output_bytes:
        return f"products: {product.weight_bytes / 1e3:.0f} kB of weights pass by for {height * width} pixels"
    if group_in * kh * kw < 64:
        return f"products: {group_in * kh * kw} products an output, few beside reading inputs and writing {out} sums"
    return f"products: {group_in * kh * kw} an output, {out} outputs a pixel, {height * width} pixels"


def _lost(op: OpProfile) -> float:
    return op.seconds - op.limit_seconds


def worst(rows: Sequence[LayerShare], count: int = WORST) -> list[LayerShare]:
    """The layers that lose most time to their limits, most first."""
    return sorted(rows, key=lambda row: -row.lost_us)[:count]


def measured(case: Case, bits: Sequence[int], isas: Sequence[str], seconds: float) -> list[LayerShare]:
    """The layers of one network at every width and instruction set; one thread, one image, `seconds` of runs each."""
    made = program(case, float_network(case), w=tuple(bits))
    image, rows = pixels(case, 1), []
    for isa in isas:
        for width in bits:
            session = runtime.Session.from_program(made, width, executor="engine", isa=isa)
            executor = session.executor
            assert isinstance(executor, EngineExecutor)
            estimate = min(took for took, _ in executor.time_ops(session.encode(image), 2))
            repeats = min(MOST_REPEATS, max(LEAST_REPEATS, round(seconds / estimate)))
            found = runtime.profile(session, image, repeats)
            rows += layers_of(case.name, width, session.plan, found)
    return rows


def tables(rows: Sequence[LayerShare]) -> str:
    """Markdown: a table of shares a network and instruction set, and its worst layers at every width."""
    parts = ["# The share of the machine's limit that each layer reaches\n"]
    for (case, isa), group in groupby(rows, key=lambda row: (row.case, row.isa)):
        same = list(group)
        by_width = {bits: [row for row in same if row.bits == bits] for bits in dict.fromkeys(r.bits for r in same)}
        parts += [f"## {case}, {isa}\n", _shares(by_width), _worst_table(by_width)]
    return "\n".join(parts)


def _shares(by_width: dict[int, list[LayerShare]]) -> str:
    """Per cent of the limit and microseconds; a width may have groups that another has not."""
    lines = ["| layer | shape | " + " | ".join(f"{bits} bit" for bits in by_width) + " |"]
    lines.append("|---|---|" + "---|" * len(by_width))
    found = {bits: {row.layer: row for row in rows} for bits, rows in by_width.items()}
    shapes = {row.layer: row.shape for rows in by_width.values() for row in rows}
    for layer, shape in shapes.items():
        cells = (_cell(found[bits].get(layer)) for bits in by_width)
        lines.append(f"| `{layer}` | {shape} | " + " | ".join(cells) + " |")
    whole = []
    for rows in by_width.values():
        us, limit = sum(row.us for row in rows), sum(row.us * row.share for row in rows)
        whole.append(f"{limit / us:.0%}, {us:.0f} us" if us > 0 else "")
    lines.append("| all layers | | " + " | ".join(whole) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: LayerShare | None) -> str:
    return "" if row is None else f"{row.share:.0%}, {row.us:.1f} us"


def _worst_table(by_width: dict[int, list[LayerShare]]) -> str:
    lines = ["| bits | layer | kernel | of the time | of its limit | us lost: products, behind them | held back by |"]
    lines.append("|---|---|---|---|---|---|---|")
    for bits, rows in by_width.items():
        for row in worst(rows):
            lost = f"{row.products_us:.1f}, {row.rest_us:.1f}"
            lines.append(
                f"| {bits} | `{row.layer}` | {row.kernel} | {row.share_of_time:.0%} | {row.share:.0%} ({row.bound}) | "
                f"{lost} | {row.held_back_by} |"
            )
    return f"The {WORST} layers that lose most time at each width:\n\n" + "\n".join(lines) + "\n"


def write(path: Path, rows: Sequence[LayerShare]) -> Path:
    """The JSON file, a row a line under the names in `columns`, and the tables; returns the path of the latter."""
    columns = [field.name for field in fields(LayerShare)]
    record = json.dumps({**machine_record(("numpy", "torch")), "columns": columns}, indent=2, allow_nan=False)
    lines = [json.dumps([_rounded(value) for value in asdict(row).values()], allow_nan=False) for row in rows]
    _replace(path, record.removesuffix("\n}") + ',\n  "rows": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n")
    table = path.with_suffix(".md")
    _replace(table, tables(rows))
    return table


def _rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write both files if asked for."""
    chosen = _arguments(arguments)
    rows: list[LayerShare] = []
    for name in chosen.cases:
        with step(f"{name}: {', '.join(chosen.isas)} at {', '.join(map(str, chosen.bits))} bits"):
            rows += measured(CASES[name], chosen.bits, chosen.isas, 0.05 if chosen.quick else 2.0)
    print(tables(rows))
    if chosen.json is not None:
        print(f"{len(rows)} rows written to {chosen.json}, tables to {write(chosen.json, rows)}")


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    available = runtime.available_isas()
    if not available:
        sys.exit("roofline: the engine is not built here")
    made = parser(__doc__, rounds=False)
    made.add_argument("--cases", type=names, help=f"default all: {','.join(CASES)}; with --quick resnet20")
    made.add_argument("--bits", type=numbers, default=BITS, help="default 1,2,4,8")
    made.add_argument("--isas", type=names, default=available[-1:], help="default the fastest that this machine has")
    arguments = made.parse_args(given)
    arguments.cases = arguments.cases or (("resnet20",) if arguments.quick else tuple(CASES))
    for option, known in (("cases", CASES), ("isas", available), ("bits", range(1, 9))):
        for value in getattr(arguments, option):
            if value not in known:
                made.error(f"--{option}: {value} is not among {', '.join(map(str, known))}")
    return arguments


if __name__ == "__main__":
    main()
