"""Latency of integer inference at 1 to 4 bits, against 8-bit and float peers on the same network.

    python benchmarks/inference.py --json benchmarks/results/inference.json

Ours is `Session.run_raw` on uint8 pixels (N, C, H, W) as a user calls it: checks, conversion to NHWC, and all integer
operations of the network. See benchmarks/README.md for what the peers are and how rows are read.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from _common import Effort, Row, clock, effort, finish, interleave, names, numbers, parser, step, usable_cores
from _networks import BITS, CASES, Case, calibration, float_network, normalized, pixels, program
from _peers import PACKAGES, OnnxFiles, build, check, export, have_onnx, limit_isa, missing
from numpy.typing import NDArray
from torch import nn

import bitstrata_runtime as runtime

QUICK, FULL = Effort(rounds=3, turn_s=0.01), Effort(rounds=7, turn_s=0.05)


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
        rows += _network(CASES[name], arguments)
    finish(arguments, rows, PACKAGES, engine_isas=list(runtime.available_isas()), missing_peers=lacking)


def _network(case: Case, arguments: argparse.Namespace) -> list[Row]:
    with step(f"{case.name}: float network and integer program"):
        model = float_network(case)
        integers = program(case, model)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        files = None
        if have_onnx():
            with step(f"{case.name}: ONNX export and 8-bit quantization"):
                files = export(model, calibration(case), Path(folder))
        with step(f"{case.name}: reference executor"):
            images = pixels(case, max(arguments.batches))
            expected = {bits: _reference(integers, bits, images) for bits in arguments.bits}
        for threads in arguments.threads:
            sessions = _sessions(integers, threads, arguments)
            for batch in arguments.batches:
                with step(f"{case.name}: batch {batch}, {threads} threads"):
                    _verify(sessions, expected, images, batch)
                    rows += _group(case, model, files, sessions, images[:batch], threads, arguments)
    return rows


def _sessions(
    integers: runtime.Program, threads: int, arguments: argparse.Namespace
) -> dict[tuple[str, int], runtime.Session]:
    return {
        (isa, bits): runtime.Session.from_program(integers, bits, executor="engine", isa=isa, threads=threads)
        for isa in arguments.isas
        for bits in arguments.bits
    }


def _reference(integers: runtime.Program, bits: int, images: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Logits of the first and the last image by the normative executor."""
    return runtime.Session.from_program(integers, bits, executor="reference").run_raw(images[[0, -1]])


def _verify(
    sessions: dict[tuple[str, int], runtime.Session],
    expected: dict[int, NDArray[np.int32]],
    images: NDArray[np.uint8],
    batch: int,
) -> None:
    """SystemExit unless every session gives the reference's integers, in a run of the batch that is timed."""
    ends = (images[:batch], images[len(images) - batch :])
    for (isa, bits), session in sessions.items():
        found = np.stack([session.run_raw(ends[0])[0], session.run_raw(ends[1])[-1]])
        if not np.array_equal(found, expected[bits]):
            raise SystemExit(f"{isa}, {bits} bits, batch {batch}: the logits differ from the reference executor's")


def _group(
    case: Case,
    model: nn.Module,
    files: OnnxFiles | None,
    sessions: dict[tuple[str, int], runtime.Session],
    images: NDArray[np.uint8],
    threads: int,
    arguments: argparse.Namespace,
) -> list[Row]:
    """All that is timed in turns: one network, batch and thread count."""
    x = normalized(images)
    peers = build(model, files, x, threads)
    distances = check(peers, model, x)
    contestants = {f"{isa} {bits}": clock(_run(session, images)) for (isa, bits), session in sessions.items()}
    contestants |= {peer.name: clock(peer.run) for peer in peers}
    times = interleave(contestants, effort(arguments, QUICK, FULL))
    shape = "x".join(map(str, case.shape))
    return [
        Row.of(
            f"{case.name} {shape} batch {len(images)}", threads, isa, str(bits), times[f"{isa} {bits}"],
            peer.name, times[peer.name], peer_kernels=peer.kernels, peer_distance=distances[peer.name],
        )
        for isa, bits in sessions
        for peer in peers
    ]  # fmt: skip


def _run(session: runtime.Session, images: NDArray[np.uint8]):  # noqa: ANN202
    return lambda: session.run_raw(images)


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--networks", type=names, help=f"default all: {','.join(CASES)}; with --quick resnet20")
    made.add_argument("--batches", type=numbers, default=(1, 16))
    made.add_argument("--threads", type=numbers, help="default 1,2 as far as there are cores; with --quick 1")
    made.add_argument("--bits", type=numbers, help="default 1,2,3,4; with --quick 1,4")
    made.add_argument("--isas", type=names, help="of the engine, default all that this machine has")
    made.add_argument(
        "--peer-isa", choices=("any", "avx2", "avx2_vnni"), default="any",
        help="limit OpenVINO and torch to an instruction set (ONNX Runtime has no such switch)",
    )  # fmt: skip
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
