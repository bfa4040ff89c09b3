"""What tuning to the machine gains: a session with tuned kernels and tile sizes against one with the engine's own.

    python benchmarks/autotune.py --json benchmarks/results/autotune.json

Both compute the same integers, which is checked. Where tuning finds nothing faster, both are the same session, and the
ratio tells how far two measurements of one thing differ.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from _common import Effort, Row, Setting, clock, effort, finish, interleave, names, numbers, parser, step
from _networks import CASES, Case, float_network, pixels, program

import bitstrata_runtime as runtime

QUICK, FULL = Effort(rounds=3, turn_s=0.05), Effort(rounds=9, turn_s=0.3)
REPEATS = {True: 3, False: 30}  # of tuning; quick or not
PEER = "own, untuned"


def main() -> None:
    """Tune every network at every width on every instruction set, and print the rows."""
    arguments = _arguments()
    if not runtime.available_isas():
        raise SystemExit("autotune: the engine is not built here, so there is nothing to tune")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.networks:
            with step(name):
                rows += _network(CASES[name], Path(folder) / "tune.json", arguments)
    finish(arguments, rows, ())


def _network(case: Case, file: Path, arguments: argparse.Namespace) -> list[Row]:
    made, image, rows = program(case, float_network(case)), pixels(case, 1), []
    for isa in arguments.isas:
        for bits in arguments.bits:
            plain = runtime.Session.from_program(made, bits, isa=isa, threads=arguments.threads)
            found = runtime.tune(plain, image, path=file, repeats=REPEATS[arguments.quick])
            tuned = runtime.Session.from_program(made, bits, isa=isa, threads=arguments.threads, tune=file)
            if not np.array_equal(plain.run_raw(image), tuned.run_raw(image)):
                raise SystemExit(f"autotune: {case.name}, {isa}, {bits} bits: tuning changed a result")
            contestants = {
                "tuned": clock(lambda tuned=tuned: tuned.run_raw(image)),
                PEER: clock(lambda plain=plain: plain.run_raw(image)),
            }
            times = interleave(contestants, effort(arguments, QUICK, FULL))
            setting = Setting(case.name, arguments.threads, isa, str(bits))
            changed = {"kernels": found.choice.kernels, "tile_bytes": found.choice.tile_bytes}
            rows.append(Row.of(setting, times, "tuned", PEER, **changed))
    return rows


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--networks", type=names, help=f"some of {', '.join(CASES)}, separated by commas")
    made.add_argument("--isas", type=names, help="instruction sets; default all, with --quick the fastest")
    made.add_argument("--bits", type=numbers, help="bit-widths; default 1,2,4, with --quick 4")
    made.add_argument("--threads", type=int, default=1)
    arguments = made.parse_args()
    arguments.networks = arguments.networks or (("resnet20",) if arguments.quick else tuple(CASES))
    arguments.isas = arguments.isas or runtime.available_isas()[-1 if arguments.quick else 0 :]
    arguments.bits = arguments.bits or ((4,) if arguments.quick else (1, 2, 4))
    for what, given, known in (
        ("--networks", arguments.networks, tuple(CASES)),
        ("--isas", arguments.isas, runtime.available_isas()),
    ):
        if unknown := [name for name in given if name not in known]:
            raise SystemExit(f"{what} {', '.join(unknown)}: unknown, choose from {', '.join(known)}")
    return arguments


if __name__ == "__main__":
    main()
