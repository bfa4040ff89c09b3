"""What the benchmarks share: arguments, interleaved timing, result rows, result files."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bitstrata.cli.common import environment, write_json

Clocked = Callable[[], float]  # one timed run, in seconds; what it prepares before is not in it

_LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # of the last minute, before anything is run
_PAUSE_S = 0.01  # between contestants, so that the thread pool of the last one is asleep when the next one starts
_MOST_RUNS = 500
_SHORT_S = 0.3  # a run that takes longer needs no warm-up: what another contestant evicted is a small part of it
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "BITSTRATA_ISA")  # environment variables
_SIMD = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm")


@dataclass(frozen=True)
class Effort:
    """How long to measure: `rounds` turns of every contestant, each of at least `turn_s` seconds and one run.

    With turn_s = 0 a turn is one run without a warm-up, for contestants that take long; or, where they are to be
    measured as they run when nothing else does, one run that is not counted and then `steady` runs.
    """

    rounds: int
    turn_s: float
    steady: int = 0


@dataclass(frozen=True)
class Times:
    """Milliseconds of one run: over rounds, the median of each round's median, and the least and largest of them."""

    median: float
    least: float
    largest: float


@dataclass(frozen=True)
class Setting:
    """What was run, on our side."""

    case: str
    threads: int
    isa: str
    bits: str


@dataclass(frozen=True)
class Row:
    """One result. ratio = peer_ms / ours_ms, so above 1 ours is faster."""

    case: str
    threads: int
    isa: str
    bits: str
    ours_ms: float
    ours_ms_min: float
    ours_ms_max: float
    peer: str
    peer_ms: float
    peer_ms_min: float
    peer_ms_max: float
    ratio: float
    extra: Mapping[str, Any]

    @classmethod
    def of(cls, setting: Setting, times: Mapping[str, Times], ours: str, peer: str, **extra: Any) -> Row:
        """A row from the times of the contestants `ours` and `peer`; `extra` columns go to the result file."""
        o, p = times[ours], times[peer]
        return cls(
            *(setting.case, setting.threads, setting.isa, setting.bits),
            *(o.median, o.least, o.largest),
            *(peer, p.median, p.least, p.largest),
            p.median / o.median,
            extra,
        )

    def columns(self) -> dict[str, Any]:
        """The row as it is written: `extra` is spread into columns of its own."""
        columns = asdict(self)
        return columns | columns.pop("extra")

    @classmethod
    def read(cls, columns: Mapping[str, Any]) -> Row:
        """The row that `columns` wrote."""
        own = {field.name: columns[field.name] for field in fields(cls) if field.name != "extra"}
        return cls(**own, extra={name: value for name, value in columns.items() if name not in own})


def parser(doc: str | None, *, rounds: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; without --rounds where nothing takes turns."""
    made = argparse.ArgumentParser(description=(doc or "").strip().partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="the short form: fewer cases and repeats, under a minute")
    made.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and versions to FILE")
    if rounds:
        made.add_argument("--rounds", type=int, help="turns of every contestant (default depends on --quick)")
    return made


def numbers(text: str) -> tuple[int, ...]:
    """'1,2' -> (1, 2), for argparse."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers separated by commas, such as 1,2, got {text!r}")
    return found


def names(text: str) -> tuple[str, ...]:
    """'a,b' -> ('a', 'b'), for argparse."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def effort(arguments: argparse.Namespace, quick: Effort, full: Effort) -> Effort:
    """The effort that the arguments ask for."""
    chosen = quick if arguments.quick else full
    if arguments.rounds is not None and arguments.rounds < 1:
        raise SystemExit(f"--rounds {arguments.rounds}: must be at least 1")
    return chosen if arguments.rounds is None else replace(chosen, rounds=arguments.rounds)


def clock(work: Callable[[], object]) -> Clocked:
    """A contestant that needs no preparation before each run."""

    def run() -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    return run


def interleave(contestants: Mapping[str, Clocked], chosen: Effort) -> dict[str, Times]:
    """Time the contestants in turns, forwards in even rounds and backwards in odd ones.

    A machine that slows down or is busy for a while then slows all of them. A turn is a pause, one run that is not
    counted where runs are short (it warms the caches and wakes the threads), and as many runs as fill the turn; its
    median is the result.
    """
    estimates: dict[str, float] = {}
    for name, run in contestants.items():
        run()
        estimates[name] = run() if chosen.turn_s else math.inf
    medians: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(chosen.rounds):
        for name in reversed(contestants) if round_number % 2 else contestants:
            run, estimate = contestants[name], max(estimates[name], 1e-7)
            time.sleep(_PAUSE_S)
            if estimate < _SHORT_S or chosen.steady:
                run()
            counted = chosen.steady or min(_MOST_RUNS, max(1, math.ceil(chosen.turn_s / estimate)))
            medians[name].append(statistics.median(run() for _ in range(counted)) * 1e3)
    return {name: Times(statistics.median(ms), min(ms), max(ms)) for name, ms in medians.items()}


def report(rows: Sequence[Row]) -> None:
    """Print the numbered peers of each case, then a line for each thing of ours with its ratio to every peer."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        batch = f", batch {row.extra['batch']}" if "batch" in row.extra else ""
        ceiling = f", up to {row.isa}" if "ceiling" in row.extra else ""
        threads = f"{row.threads} thread{'s' if row.threads > 1 else ''}"
        cases.setdefault(f"{row.case}{batch}, {threads}{ceiling}", []).append(row)
    for case, group in cases.items():
        print(f"\n{case}")
        peers = {row.peer: row for row in group}
        for number, row in enumerate(peers.values(), 1):
            print(f"  [{number}] {row.peer:34} {_shown(row.peer_ms, row.peer_ms_min, row.peer_ms_max)}")
        ours: dict[tuple[str, str, str], list[Row]] = {}
        for row in group:
            ours.setdefault((row.extra.get("mode", "ours"), row.isa, row.bits), []).append(row)
        numbered = "".join(f"{f'to [{number}]':>9}" for number in range(1, len(peers) + 1))
        print(f"{'':74}ratio{numbered}")
        for (mode, isa, bits), same in ours.items():
            ratios = {row.peer: f"{row.ratio:9.3g}" for row in same}
            first = same[0]
            shown = _shown(first.ours_ms, first.ours_ms_min, first.ours_ms_max)
            print(
                f"      {f'{mode}, {isa}, bits {bits}':34} {shown:38}" + "".join(ratios.get(p, " " * 9) for p in peers)
            )


def _shown(median: float, least: float, largest: float) -> str:
    return f"{median:10.3f} ms ({least:.3f} to {largest:.3f})"


def finish(arguments: argparse.Namespace, rows: Sequence[Row], packages: Sequence[str], **notes: Any) -> None:
    """Print the rows, and write the result file if one is asked for."""
    report(rows)
    if _LOAD is not None and _LOAD > 0.5:
        print(f"\nOther programs were running (load average {_LOAD:.1f} at the start): these ratios are not reliable.")
    if arguments.json is not None:
        machine = machine_record(packages)
        write_json(arguments.json, {**machine, **notes, "rows": [row.columns() for row in rows]})
        print(f"\n{len(rows)} rows written to {arguments.json}")


def machine_record(packages: Sequence[str]) -> dict[str, Any]:
    """Command, processor and its instruction sets, versions, commit, and how busy the machine is."""
    record: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), **environment()}
    record["versions"].update({name: version_of(name) for name in packages})
    record["uncommitted_changes"] = _uncommitted()
    record["instruction_sets"] = _instruction_sets()
    record["usable_cores"] = usable_cores()
    record["load_average_at_start"] = _LOAD
    record["limits"] = {name: os.environ[name] for name in _LIMITS if name in os.environ}
    return record


def version_of(package: str) -> str | None:
    """The installed version, None if the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say on standard error what is being done and how long it took."""
    begun = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)


def _instruction_sets() -> list[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return []
    flags = next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return [name for name in _SIMD if name in flags.split()]


def _uncommitted() -> bool | None:
    """Whether the tracked source differs from the commit; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent.parent), "status", "--porcelain", "--untracked-files=no"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    # Results are written to the repository, so they do not count as a change of what is measured.
    changed = [line for line in result.stdout.splitlines() if "benchmarks/results/" not in line]
    return bool(changed) if result.returncode == 0 else None
