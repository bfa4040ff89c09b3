"""Cost of one joint training step at 1 to 4 bits, against a float training step of the same network.

    python benchmarks/training_step.py --json benchmarks/results/training_step.json

Both sides clear the gradients, run forward and backward in training mode on the same batch, and let the same
optimizer step. A joint step runs every precision once, so a ratio of 1/4 would mean that quantization itself is free.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _common import Effort, Row, Setting, clock, effort, finish, interleave, numbers, parser, step, usable_cores
from _networks import BITS, CASES, MEAN, STD, calibration, float_network, normalized, pixels
from torch import nn

import bitstrata as bs

QUICK, FULL = Effort(rounds=2, turn_s=0.0), Effort(rounds=9, turn_s=0.0)
CASE = CASES["resnet20"]
DTYPES: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}


def main() -> None:
    """Time both data types and print the rows."""
    arguments = _arguments()
    rows: list[Row] = []
    for threads in arguments.threads:
        for dtype in DTYPES:
            with step(f"{dtype}, {threads} threads"):
                rows += _group(dtype, threads, arguments)
    finish(arguments, rows, ())


def _group(dtype: str, threads: int, arguments: argparse.Namespace) -> list[Row]:
    batch = arguments.batch
    x = normalized(pixels(CASE, batch)).contiguous(memory_format=torch.channels_last)
    targets = torch.arange(batch) % 10
    peer = f"torch {dtype} step" + (", autocast" if DTYPES[dtype] else "")
    joint = ",".join(map(str, BITS))
    chosen = {joint: BITS} if arguments.quick else {joint: BITS, "4": (4,), "1": (1,)}
    contestants = {bits: clock(_joint_step(x, targets, DTYPES[dtype], levels)) for bits, levels in chosen.items()}
    contestants[peer] = clock(_float_step(x, targets, DTYPES[dtype]))
    torch.set_num_threads(threads)  # after the models are made, which sets it to 1
    times = interleave(contestants, effort(arguments, QUICK, FULL))
    isa = torch.backends.cpu.get_cpu_capability()
    case = f"{CASE.name} training step batch {batch} {dtype}"
    return [Row.of(Setting(case, threads, isa, bits), times, bits, peer) for bits in chosen]


def _float_step(x: torch.Tensor, targets: torch.Tensor, amp: torch.dtype | None) -> Callable[[], None]:
    model = float_network(CASE).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
            loss = F.cross_entropy(model(x), targets)
        loss.backward()
        optimizer.step()

    return run


def _joint_step(
    x: torch.Tensor, targets: torch.Tensor, amp: torch.dtype | None, levels: tuple[int, ...]
) -> Callable[[], None]:
    model = _quantized().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(bs.parameter_groups(model, 1e-4), lr=1e-4, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        bs.joint_backward(model, x, targets, precisions=levels, amp=amp)
        optimizer.step()

    return run


def _quantized() -> nn.Module:
    model = float_network(CASE).train()
    bs.quantize_(model, bs.recipes.strata(w=BITS), calibration(CASE)[0][:1], input=bs.Pixels(MEAN, STD))
    return bs.calibrate_(model, calibration(CASE)).train()


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--batch", type=int, help="default 128; with --quick 32")
    made.add_argument("--threads", type=numbers, help="default all cores; with --quick 1")
    arguments = made.parse_args()
    arguments.batch = (32 if arguments.quick else 128) if arguments.batch is None else arguments.batch
    arguments.threads = arguments.threads or ((1,) if arguments.quick else (usable_cores(),))
    if arguments.batch < 2:
        made.error(f"--batch {arguments.batch}: batch normalization needs at least 2 images")
    return arguments


if __name__ == "__main__":
    main()
