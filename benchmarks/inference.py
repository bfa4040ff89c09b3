"""Latency of integer inference at 1 to 8 bits, against 8-bit and float peers on the same network and instructions.

    python benchmarks/inference.py --json benchmarks/results/inference.json

For each ceiling (an instruction set of the engine) a process of its own runs ours at that instruction set and the peers
held to it; under `generic` at the first batch size only, since that is slow. Ours is `Session.run_raw` on uint8 pixels
(N, C, H, W) as a user calls it: checks, conversion to NHWC, and all integer operations of the network. See
benchmarks/README.md for what the peers are and how rows are read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _common import Effort, Row, Setting, clock, effort, finish, interleave, names, numbers, parser, step, usable_cores
from _networks import CASES, normalized
from _peers import CEILINGS, PACKAGES, build, check, missing
from _prepared import EQUAL, WIDTHS, Prepared
from numpy.typing import NDArray

import bitstrata_runtime as runtime

QUICK, FULL = Effort(rounds=3, turn_s=0.01), Effort(rounds=7, turn_s=0.05)
SLOW = Effort(rounds=3, turn_s=0.02)  # under the ceiling `generic`, where a run takes up to seconds
Sessions = dict[str, runtime.Session]  # width -> session


def main() -> None:
    """Time every case and print the rows."""
    arguments = _arguments()
    if arguments.at is not None:
        _run_at(arguments)
        return
    lacking = missing()
    for line in lacking:
        print(line)
    rows: list[Row] = []
    for name in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            with step(f"{name}: float network, ONNX files, artifacts and their exact results"):
                Prepared.make(CASES[name], Path(folder), arguments.bits, max(arguments.batches))
            for ceiling in arguments.ceilings:
                rows += _in_process(arguments, name, Path(folder), ceiling)
    finish(arguments, rows, PACKAGES, ceilings={name: CEILINGS[name] for name in arguments.ceilings}, missing=lacking)


def _in_process(arguments: argparse.Namespace, name: str, folder: Path, ceiling: str) -> list[Row]:
    """The rows of one network under one ceiling: libraries read their limits when they start."""
    result = folder / "rows.json"
    command = [sys.executable, __file__, "--at", ceiling, "--folder", str(folder), "--rows", str(result)]
    for option in ("threads", "batches", "bits"):
        command += [f"--{option}", ",".join(map(str, getattr(arguments, option)))]
    command += ["--cases", name, *(["--quick"] if arguments.quick else [])]
    command += ["--rounds", str(arguments.rounds)] if arguments.rounds else []
    with step(f"{name}: up to {ceiling}"):
        subprocess.run(command, check=True, env=os.environ | CEILINGS[ceiling])
    return [Row.read(columns) for columns in json.loads(result.read_text())]


def _run_at(arguments: argparse.Namespace) -> None:
    """What the process of one ceiling does."""
    (name,) = arguments.cases
    prepared = Prepared.of(CASES[name], arguments.folder, max(arguments.batches))
    rows = [row.columns() for row in _measured(prepared, arguments)]
    arguments.rows.write_text(json.dumps(rows))


def _measured(prepared: Prepared, arguments: argparse.Namespace) -> Iterator[Row]:
    batches = arguments.batches[:1] if arguments.at == "generic" else arguments.batches
    for threads in arguments.threads:
        options: dict[str, Any] = {"executor": "engine", "isa": arguments.at, "threads": threads}
        sessions = {width: prepared.session(width, **options) for width in arguments.bits}
        for batch in batches:
            for width, session in sessions.items():
                _verify(prepared, width, session, batch)
            yield from _group(
                prepared, sessions, batch, Setting(prepared.case.name, threads, arguments.at, ""), arguments
            )


def _verify(prepared: Prepared, width: str, session: runtime.Session, batch: int) -> None:
    """SystemExit unless the session gives the exact integers, in runs of the batch that is timed."""
    first, last = prepared.images[:batch], prepared.images[-batch:]
    found = np.stack([session.run_raw(first)[0], session.run_raw(last)[-1]])
    if not np.array_equal(found, prepared.expected(width)):
        raise SystemExit(f"{prepared.case.name}, bits {width}, batch {batch}: the logits differ from the exact ones")


def _group(
    prepared: Prepared, sessions: Sessions, batch: int, setting: Setting, arguments: argparse.Namespace
) -> Iterator[Row]:
    """Time in turns all that runs one network at one batch and thread count."""
    images, model = prepared.images[:batch], prepared.float_network()
    peers = build(model, prepared.onnx(), normalized(images), setting.threads)
    distances = check(peers, model, normalized(images))
    contestants = {f"ours {width}": clock(_run(session, images)) for width, session in sessions.items()}
    contestants |= {peer.name: clock(peer.run) for peer in peers}
    times = interleave(contestants, effort(arguments, *((SLOW, SLOW) if setting.isa == "generic" else (QUICK, FULL))))
    for width in sessions:
        for peer in peers:
            yield Row.of(
                Setting(setting.case, setting.threads, setting.isa, width),
                times,
                f"ours {width}",
                peer.name,
                batch=batch,
                ceiling=setting.isa,
                peer_kernels=peer.kernels,
                peer_distance=distances[peer.name],
            )


def _run(session: runtime.Session, images: NDArray[np.uint8]) -> Callable[[], object]:
    return lambda: session.run_raw(images)


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--cases", type=names, help=f"default all: {','.join(CASES)}; with --quick resnet20")
    made.add_argument("--batches", type=numbers, help="default 1,16; with --quick 1")
    made.add_argument("--threads", type=numbers, help="default 1,2 as far as there are cores; with --quick 1")
    made.add_argument("--bits", type=names, help=f"default all: {','.join(WIDTHS)}; with --quick {','.join(EQUAL)}")
    made.add_argument("--ceilings", type=names, help="default all instruction sets that this machine has")
    for option in ("--at", "--folder", "--rows"):  # of the processes that this one starts
        made.add_argument(option, type=str if option == "--at" else Path, help=argparse.SUPPRESS)
    arguments = made.parse_args()
    available = runtime.available_isas()
    if not available:
        sys.exit("inference: the engine is not built here, and timing the reference executor would tell nothing")
    arguments.cases = arguments.cases or (("resnet20",) if arguments.quick else tuple(CASES))
    arguments.batches = arguments.batches or ((1,) if arguments.quick else (1, 16))
    arguments.threads = arguments.threads or ((1,) if arguments.quick else (1, 2)[: usable_cores()])
    arguments.bits = arguments.bits or tuple(EQUAL if arguments.quick else WIDTHS)
    arguments.ceilings = arguments.ceilings or available
    for option, known in (("cases", CASES), ("bits", WIDTHS), ("ceilings", available)):
        for value in getattr(arguments, option):
            if value not in known:
                made.error(f"--{option}: {value} is not among {', '.join(map(str, known))}")
    return arguments


if __name__ == "__main__":
    main()
