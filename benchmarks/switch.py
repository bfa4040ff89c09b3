"""Time to change the precision of a session that serves, against loading anew and against a new session of a peer.

    python benchmarks/switch.py --json benchmarks/results/switch.json

"switch" goes back and forth between two precisions that are ready. "first use" prepares a precision that the session
has not run at: the bit-planes and factors that are missing are read, constants derived, weights packed; the session
that it starts from is not timed. "run" is one image at a precision just changed to, against the same run without a
change. All on one thread, files from the operating system's cache.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from _common import Clocked, Effort, Row, Setting, clock, effort, finish, interleave, names, parser, step
from _networks import BITS, CASES, Case, calibration, float_network, pixels, program
from _peers import PACKAGES, export, have_onnx, onnxruntime_session
from numpy.typing import NDArray

import bitstrata as bs
import bitstrata_runtime as runtime

QUICK, FULL = Effort(rounds=3, turn_s=0.02), Effort(rounds=9, turn_s=0.2)
ANEW, PEER, STILL = "own artifact loaded anew", "ONNX Runtime float32 session", "own run without a change"
_SWITCHES = 100  # in one measurement: one takes about as long as asking for the time


def main() -> None:
    """Time every network and print the rows."""
    arguments = _arguments()
    if not runtime.available_isas():
        raise SystemExit("switch: the engine is not built here, so there is no session to measure")
    lacking = [] if have_onnx() else [f"{PEER} left out: onnx or onnxruntime is not installed"]
    for line in lacking:
        print(line)
    rows: list[Row] = []
    for name in arguments.networks:
        with step(name), tempfile.TemporaryDirectory() as folder:
            rows += _network(CASES[name], Path(folder), arguments)
    finish(arguments, rows, PACKAGES, missing_peers=lacking)


def _network(case: Case, folder: Path, arguments: argparse.Namespace) -> list[Row]:
    model = float_network(case)
    artifact = folder / "network.strata"
    bs.pack(program(case, model), artifact)
    low, high = BITS[0], BITS[-1]
    session = runtime.load(artifact, bits=low)
    session.at(high)
    image = pixels(case, 1)
    contestants = {
        "switch": _switch(session, low, high),
        "first use": _first_use(artifact, low, high),
        "run": _run_after_change(session, low, high, image),
        STILL: _run_after_change(session, high, high, image),
        ANEW: clock(lambda: runtime.load(artifact, bits=high)),
    }
    peers = {"switch": [ANEW], "first use": [ANEW], "run": [STILL]}
    if have_onnx():
        path = export(model, calibration(case), folder).float32
        contestants[PEER] = clock(lambda: onnxruntime_session(path, 1))
        peers = {**peers, "switch": [ANEW, PEER], "first use": [ANEW, PEER]}
    times = interleave(contestants, effort(arguments, QUICK, FULL))
    isa, memory = runtime.available_isas()[-1], session.memory
    held = {"codes_bytes": memory.codes, "workspaces_bytes": memory.workspaces}
    held |= {f"packed_bytes_{bits}": size for bits, size in memory.packed}
    return [
        Row.of(Setting(f"{case.name} {what}", 1, isa, f"{low}->{high}"), times, what, peer, **held)
        for what, others in peers.items()
        for peer in others
    ]


def _switch(session: runtime.Session, low: int, high: int) -> Clocked:
    def run() -> float:
        begun = perf_counter()
        for _ in range(_SWITCHES // 2):
            session.set_precision(high)
            session.set_precision(low)
        return (perf_counter() - begun) / _SWITCHES

    return run


def _first_use(artifact: Path, low: int, high: int) -> Clocked:
    """From a session opened anew for each run and not timed."""

    def run() -> float:
        session = runtime.load(artifact, bits=low)
        begun = perf_counter()
        session.set_precision(high)
        return perf_counter() - begun

    return run


def _run_after_change(session: runtime.Session, low: int, high: int, image: NDArray[np.uint8]) -> Clocked:
    def run() -> float:
        session.set_precision(low)
        session.run(image)
        begun = perf_counter()
        session.set_precision(high)
        session.run(image)
        return perf_counter() - begun

    return run


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--networks", type=names, help=f"default {','.join(CASES)}; with --quick resnet20")
    arguments = made.parse_args()
    arguments.networks = arguments.networks or (("resnet20",) if arguments.quick else tuple(CASES))
    for name in arguments.networks:
        if name not in CASES:
            made.error(f"--networks: {name} is not among {', '.join(CASES)}")
    return arguments


if __name__ == "__main__":
    main()
