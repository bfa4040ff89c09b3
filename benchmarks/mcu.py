"""Flash, RAM, stack and instructions of exported networks on Cortex-M4 and M7, beside what 8 bits would take.

    python benchmarks/mcu.py --json benchmarks/results/mcu.json

Ours is measured: compiled by arm-none-eabi-gcc -O2, sizes from the linker's map (the network and the runtime, C library
included, the test board's own file not), stack from a painted memory, instructions from a timer of qemu's board with
-icount shift=0. Before a row is written its output must equal the reference executor's. Instructions are not cycles:
qemu knows neither wait states nor caches, and a multiplication counts as much as a move.

What an int8 deployment in the manner of CMSIS-NN would take is computed, not measured, from the same network:
flash: a byte a weight, 12 bytes an output channel (int32 bias, multiplier, shift); its code is left out. RAM: the
largest sum, over the layers, of the int8 maps alive and the layer's scratch buffer as the library's functions give it
for processors with DSP instructions (convolution: 2 * 2 * depth of the window in bytes, 0 for 1x1; depthwise: 2 *
channels * window), additions and activations in place, no loss to placement. The network's input and output are in no
number.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import machine_record, parser, step

import bitstrata as bs
from bitstrata.cli.common import write_json
from bitstrata.export import export_c
from bitstrata_runtime import Plan, Program, derive
from bitstrata_runtime.plan import Add, Clip, Conv, Requant
from bitstrata_runtime.reference import OracleExecutor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers_export import BOARDS, BoardRun, missing_arm_tools, run_on_board

NETWORKS = {"digits_cnn": (1, 8, 8), "resnet20": (3, 32, 32)}
BITS = (1, 2, 3, 4, 8)


def main() -> None:
    """Measure, print and write the rows."""
    arguments = _arguments()
    missing = missing_arm_tools()
    if missing:
        raise SystemExit(f"mcu: not installed: {', '.join(missing)}")
    rows: list[dict[str, Any]] = []
    for name in arguments.networks:
        made = _program(name)
        for bits in BITS:
            plan = derive(made, bits)
            for cpu in ("cortex-m4",) if arguments.quick else BOARDS:
                with step(f"{name}, {bits} bits, {cpu}"):
                    rows.append(_row(name, bits, cpu, plan))
    _report(rows)
    if arguments.json is not None:
        tools = {tool: _version(tool) for tool in ("arm-none-eabi-gcc", "qemu-system-arm")}
        notes = {"int8": "computed, see benchmarks/mcu.py; everything else is measured"}
        write_json(arguments.json, {**machine_record(()), "tools": tools, **notes, "rows": rows})


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--networks", type=lambda text: text.split(","), help=f"of {', '.join(NETWORKS)}")
    arguments = made.parse_args()
    arguments.networks = arguments.networks or (["digits_cnn"] if arguments.quick else list(NETWORKS))
    unknown = set(arguments.networks) - set(NETWORKS)
    if unknown:
        raise SystemExit(f"mcu: --networks {', '.join(sorted(unknown))}: choices are {', '.join(NETWORKS)}")
    return arguments


def _program(name: str) -> Program:
    """Random weights, calibrated on random inputs: sizes and instructions hardly depend on either."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    channels, *_ = shape = NETWORKS[name]
    example = torch.randn(8, *shape)
    model = bs.zoo.create(name, 10, **({} if channels == 3 else {"in_channels": channels})).train()
    pixels = bs.Pixels((0.5,) * channels, (0.25,) * channels)
    bs.quantize_(model, bs.recipes.strata(w=BITS), example, input=pixels)
    bs.calibrate_(model, [example])
    with warnings.catch_warnings():  # few fraction bits cost accuracy, which random weights have none of
        warnings.simplefilter("ignore")
        return bs.lower(model.eval(), example[:1])


def _row(name: str, bits: int, cpu: str, plan: Plan) -> dict[str, Any]:
    source = plan.values[plan.input]
    codes = np.random.default_rng(0).integers(source.lo, source.hi + 1, (1, *source.shape)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        made = export_c(plan, Path(folder))
        found: BoardRun = run_on_board(Path(folder), codes, plan.values[plan.output].shape, cpu)
    if not np.array_equal(found.outputs, OracleExecutor(plan).run(codes)):
        raise SystemExit(f"mcu: {name} at {bits} bits on {cpu}: wrong integers")
    int8 = int8_deployment(plan)
    macs = sum(op.codes.size * math.prod(plan.values[op.output].shape[:2]) for op in plan.ops if isinstance(op, Conv))
    return {
        "case": name,
        "bits": bits,
        "cpu": cpu,
        "flash_bytes": found.flash,
        "flash_code_bytes": found.flash_code,
        "ram_bytes": found.ram,
        "arena_bytes": made.arena_bytes,
        "stack_bytes": found.stack,
        "instructions": found.instructions,
        "macs": macs,
        "instructions_a_mac": round(found.instructions / macs, 3),
        "int8_flash_bytes": int8["flash"],
        "int8_ram_bytes": int8["ram"],
        "int8_scratch_bytes": int8["scratch"],
        # Constants against constants: the code of an int8 library is not known here.
        "flash_ratio": round(int8["flash"] / (found.flash - found.flash_code), 3),
        "ram_ratio": round(int8["ram"] / found.ram, 3),
    }


def int8_deployment(plan: Plan) -> dict[str, int]:
    """Bytes of flash and RAM, and the largest scratch buffer, by the formulas above."""
    tensor = list(range(len(plan.values)))  # value -> the int8 tensor that holds it
    for op in plan.ops:
        if isinstance(op, Requant | Clip):
            tensor[op.output] = tensor[op.inputs[0]]
    last = {tensor[index]: position for position, op in enumerate(plan.ops) for index in op.inputs}
    outside = {tensor[plan.input], tensor[plan.output]}
    alive: dict[int, int] = {}
    flash = ram = largest = 0
    for position, op in enumerate(plan.ops):
        scratch, target = 0, tensor[op.output]
        if isinstance(op, Conv):
            out, per_group, height, width = op.codes.shape
            flash += op.codes.size + 12 * out
            window = per_group * height * width
            scratch = 2 * op.groups * window if per_group == 1 < op.groups else 4 * window * (height * width > 1)
        dying = [index for index in {tensor[i] for i in op.inputs} if last[index] == position]
        if isinstance(op, Add) and dying:
            alive.pop(dying[0], None)
        if target not in outside:
            alive[target] = math.prod(plan.values[op.output].shape)
        ram, largest = max(ram, sum(alive.values()) + scratch), max(largest, scratch)
        for index in dying:
            if index != target:
                alive.pop(index, None)
    return {"flash": flash, "ram": ram, "scratch": largest}


def _version(tool: str) -> str:
    assert shutil.which(tool) is not None
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    return re.sub(r"\s+", " ", said.splitlines()[0])


def _report(rows: list[dict[str, Any]]) -> None:
    columns = ("case", "bits", "cpu", "flash_bytes", "ram_bytes", "stack_bytes", "instructions", "instructions_a_mac")
    columns += ("int8_flash_bytes", "int8_ram_bytes")
    print("".join(f"{name:>20}" for name in columns))
    for row in rows:
        print("".join(f"{row[name]:>20}" for name in columns))


if __name__ == "__main__":
    main()
