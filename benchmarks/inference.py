"""Latency of integer inference at 1 to 4 bits, against 8-bit and float peers on the same network.

    python benchmarks/inference.py --json benchmarks/results/inference.json

Ours is `Session.run_raw` on uint8 pixels (N, C, H, W) as a user calls it: checks, conversion to NHWC, and all integer
operations of the network. See benchmarks/README.md for what the peers are and how rows are read.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _common import Effort, Row, Setting, clock, effort, finish, interleave, names, numbers, parser, step, usable_cores
from _networks import BITS, CASES, Case, calibration, float_network, normalized, pixels, program
from _peers import PACKAGES, OnnxFiles, build, check, export, have_onnx, limit_isa, missing
from numpy.typing import NDArray
from torch import nn

import bitstrata_runtime as runtime

QUICK, FULL = Effort(rounds=3, turn_s=0.01), Effort(rounds=7, turn_s=0.05)

Sessions = dict[tuple[str, int], runtime.Session]  # (instruction set, bits) -> session


@dataclass(frozen=True)
class Subject:
    """One network in all the forms that are run."""

    case: Case
    model: nn.Module
    integers: runtime.Program
    files: OnnxFiles | None
    images: NDArray[np.uint8]  # a batch is the first of them
    expected: dict[int, NDArray[np.int32]]  # bits -> the reference executor's logits of the first and the last image


def main() -> None:
    """Time every case and print the rows."""
    arguments = _arguments()
    if arguments.peer_isa != "any":
        limit_isa(arguments.peer_isa)
    lacking = missing()
    for line in lacking:
        print(line)
    rows: list[Row] = []
    for name in arguments.networks:
        with tempfile.TemporaryDirectory() as folder:
            rows += _measured(_subject(CASES[name], Path(folder), arguments), arguments)
    finish(arguments, rows, PACKAGES, engine_isas=list(runtime.available_isas()), missing_peers=lacking)


def _subject(case: Case, folder: Path, arguments: argparse.Namespace) -> Subject:
    with step(f"{case.name}: float network and integer program"):
        model = float_network(case)
        integers = program(case, model)
    with step(f"{case.name}: ONNX export and 8-bit quantization"):
        files = export(model, calibration(case), folder) if have_onnx() else None
    images = pixels(case, max(arguments.batches))
    with step(f"{case.name}: reference executor"):
        expected = {
            bits: runtime.Session.from_program(integers, bits, executor="reference").run_raw(images[[0, -1]])
            for bits in arguments.bits
        }
    return Subject(case, model, integers, files, images, expected)


def _measured(subject: Subject, arguments: argparse.Namespace) -> Iterator[Row]:
    for threads in arguments.threads:
        sessions = {
            (isa, bits): runtime.Session.from_program(
                subject.integers, bits, executor="engine", isa=isa, threads=threads
            )
            for isa in arguments.isas
            for bits in arguments.bits
        }
        for batch in arguments.batches:
            with step(f"{subject.case.name}: batch {batch}, {threads} threads"):
                _verify(subject, sessions, batch)
                yield from _group(subject, sessions, batch, threads, effort(arguments, QUICK, FULL))


def _verify(subject: Subject, sessions: Sessions, batch: int) -> None:
    """SystemExit unless every session gives the reference's integers, in runs of the batch that is timed."""
    first, last = subject.images[:batch], subject.images[-batch:]
    for (isa, bits), session in sessions.items():
        found = np.stack([session.run_raw(first)[0], session.run_raw(last)[-1]])
        if not np.array_equal(found, subject.expected[bits]):
            raise SystemExit(f"{isa}, {bits} bits, batch {batch}: the logits differ from the reference executor's")


def _group(subject: Subject, sessions: Sessions, batch: int, threads: int, chosen: Effort) -> Iterator[Row]:
    """Time in turns all that runs one network at one batch and thread count."""
    images = subject.images[:batch]
    peers = build(subject.model, subject.files, normalized(images), threads)
    distances = check(peers, subject.model, normalized(images))
    contestants = {f"{isa} {bits}": clock(_run(session, images)) for (isa, bits), session in sessions.items()}
    times = interleave(contestants | {peer.name: clock(peer.run) for peer in peers}, chosen)
    case = f"{subject.case.name} {'x'.join(map(str, subject.case.shape))} batch {batch}"
    for isa, bits in sessions:
        for peer in peers:
            setting, extra = Setting(case, threads, isa, str(bits)), {"peer_kernels": peer.kernels}
            yield Row.of(setting, times, f"{isa} {bits}", peer.name, **extra, peer_distance=distances[peer.name])


def _run(session: runtime.Session, images: NDArray[np.uint8]) -> Callable[[], object]:
    return lambda: session.run_raw(images)


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--networks", type=names, help=f"default all: {','.join(CASES)}; with --quick resnet20")
    made.add_argument("--batches", type=numbers, default=(1, 16), help="default 1,16")
    made.add_argument("--threads", type=numbers, help="default 1,2 as far as there are cores; with --quick 1")
    made.add_argument("--bits", type=numbers, help="default 1,2,3,4; with --quick 1,4")
    made.add_argument("--isas", type=names, help="of the engine, default all that this machine has")
    made.add_argument(
        "--peer-isa",
        choices=("any", "avx2", "avx2_vnni"),
        default="any",
        help="limit OpenVINO and torch to an instruction set (ONNX Runtime has no such switch)",
    )
    arguments = made.parse_args()
    available = runtime.available_isas()
    if not available:
        sys.exit("inference: the engine is not built here, and timing the reference executor would tell nothing")
    arguments.networks = arguments.networks or (("resnet20",) if arguments.quick else tuple(CASES))
    arguments.threads = arguments.threads or ((1,) if arguments.quick else (1, 2)[: usable_cores()])
    arguments.bits = arguments.bits or ((1, 4) if arguments.quick else BITS)
    arguments.isas = arguments.isas or available
    for option, known in (("networks", tuple(CASES)), ("bits", BITS), ("isas", available)):
        for value in getattr(arguments, option):
            if value not in known:
                made.error(f"--{option}: {value} is not among {', '.join(map(str, known))}")
    return arguments


if __name__ == "__main__":
    main()
