"""Time and bytes to open an artifact, and to upgrade it by one bit, against loading float32 weights; and to import.

    python benchmarks/load.py --json benchmarks/results/load.json

Ours ends with a session that is ready to run: files read and their hashes checked, constants derived, weights packed
for the kernels. Reading arrays (numpy, safetensors) ends with arrays; only an ONNX Runtime session is ready to run too.
All files come from the operating system's cache. "import" is what a new process takes from its first statement until
the package is there, numpy included; interpreters write no bytecode meanwhile, they find it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from _common import Clocked, Effort, Row, Setting, clock, effort, finish, interleave, names, parser, step
from _networks import BITS, CASES, Case, calibration, float_network, program
from _peers import PACKAGES, export, have_onnx, onnxruntime_session
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

import bitstrata as bs
import bitstrata_runtime as runtime

QUICK, FULL = Effort(rounds=5, turn_s=0.0), Effort(rounds=9, turn_s=0.2)


@dataclass(frozen=True)
class Loader:
    """One way to load the same network. size: bytes read."""

    load: Clocked
    size: int


def main() -> None:
    """Time every network and print the rows."""
    arguments = _arguments()
    if not runtime.available_isas():
        raise SystemExit("load: the engine is not built here, so there is no session to make ready")
    lacking = [] if have_onnx() else ["ONNX Runtime float32 session left out: onnx or onnxruntime is not installed"]
    for line in lacking:
        print(line)
    with step("import"):
        rows = _imports(arguments)
    sized = len(rows)
    for name in arguments.networks:
        with step(name), tempfile.TemporaryDirectory() as folder:
            rows += _network(CASES[name], Path(folder), arguments)
    finish(arguments, rows, PACKAGES, missing_peers=lacking)
    print("\nbytes read")
    sizes = {f"{row.case}, bits {row.bits}": row.extra["ours_bytes"] for row in rows[sized:]}
    sizes |= {f"{row.case.partition(' ')[0]}, {row.peer}": row.extra["peer_bytes"] for row in rows[sized:]}
    for what, size in sizes.items():
        print(f"{size:13,}  {what}")


def _imports(arguments: argparse.Namespace) -> list[Row]:
    peers = ["numpy", "safetensors.numpy", *(["onnxruntime"] if have_onnx() else [])]
    times = interleave({name: _import(name) for name in ("bitstrata_runtime", *peers)}, effort(arguments, QUICK, QUICK))
    setting = Setting("import", 1, runtime.available_isas()[-1], "none")
    return [Row.of(setting, times, "bitstrata_runtime", peer) for peer in peers]


def _import(name: str) -> Clocked:
    code = f"from time import perf_counter as now; begun = now(); import {name}; print(now() - begun)"

    def run() -> float:
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    return run


def _network(case: Case, folder: Path, arguments: argparse.Namespace) -> list[Row]:
    model = float_network(case)
    artifact = folder / "network.strata"
    bs.pack(program(case, model), artifact)
    ours = {("load", str(bits)): _opening(artifact, bits) for bits in (BITS[0], BITS[-1])}
    ours |= {("upgrade", f"{bits - 1}->{bits}"): _upgrade(artifact, bits) for bits in BITS[1:]}
    peers = _peers(case, model, folder)
    contestants = {" ".join(key): loader.load for key, loader in ours.items()}
    contestants |= {name: loader.load for name, loader in peers.items()}
    times = interleave(contestants, effort(arguments, QUICK, FULL))
    isa = runtime.available_isas()[-1]
    return [
        Row.of(
            Setting(f"{case.name} {what}", 1, isa, bits),
            times,
            f"{what} {bits}",
            name,
            ours_bytes=loader.size,
            peer_bytes=peer.size,
        )
        for (what, bits), loader in ours.items()
        for name, peer in peers.items()
    ]


def _opening(artifact: Path, bits: int) -> Loader:
    size = sum(count for _, count in runtime.load(artifact, bits=bits).reads)
    return Loader(clock(lambda: runtime.load(artifact, bits=bits)), size)


def _upgrade(artifact: Path, bits: int) -> Loader:
    """From a session that holds one bit less, opened anew for each run and not timed."""

    def run() -> float:
        session = runtime.load(artifact, bits=bits - 1)
        begun = perf_counter()
        session.upgrade(bits)
        return perf_counter() - begun

    session = runtime.load(artifact, bits=bits - 1)
    before = len(session.reads)
    session.upgrade(bits)
    return Loader(run, sum(count for _, count in session.reads[before:]))


def _peers(case: Case, model: nn.Module, folder: Path) -> dict[str, Loader]:
    weights = {name: np.ascontiguousarray(tensor.detach().numpy()) for name, tensor in model.state_dict().items()}
    npz, tensors = folder / "weights.npz", folder / "weights.safetensors"
    np.savez(npz, **weights)
    save_file(weights, tensors)
    peers = {
        "numpy.load, float32 npz": _reader(npz, lambda: _read_npz(npz)),
        "safetensors load_file, float32": _reader(tensors, lambda: load_file(tensors)),
    }
    if have_onnx():
        path = export(model, calibration(case), folder).float32
        peers["ONNX Runtime float32 session"] = _reader(path, lambda: onnxruntime_session(path, 1))
    return peers


def _reader(path: Path, read: Callable[[], object]) -> Loader:
    return Loader(clock(read), path.stat().st_size)


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as file:  # reads an array when it is asked for
        return {name: file[name] for name in file.files}


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    known = [name for name in CASES if name != "mobilenetv2"]
    made.add_argument("--networks", type=names, help=f"default {','.join(known)}; with --quick resnet20")
    arguments = made.parse_args()
    arguments.networks = arguments.networks or (("resnet20",) if arguments.quick else tuple(known))
    for name in arguments.networks:
        if name not in CASES:
            made.error(f"--networks: {name} is not among {', '.join(CASES)}")
    return arguments


if __name__ == "__main__":
    main()
