"""`bitstrata bench`: latency of an artifact, or a profile of its operations; needs no torch."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from bitstrata.cli.common import CommandError, choose, cpu_name, output, parse_bits, write_json
from bitstrata.cli.kernels import LIST, print_kernel_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

GENERIC = "generic"  # the instruction set that every build has


@dataclass(frozen=True)
class Bench:
    """Measure latency per precision, instruction set and thread count, on random pixels.

    The peer of each row is the same program on the engine's own generic kernels, with as many threads;
    ratio = peer_ms / ours_ms. The generic rows have no peer. With --isa alone, list the instruction sets instead.

    With --profile it measures the operations of one run instead, beside what the machine can do at best: time (the
    least of all repeats), operations (two for each product of a convolution), bytes, the share of the peak of the
    kernel's instructions, and of the limit, which is that peak or the bandwidth of the cache that holds the bytes.
    """

    artifact: Annotated[Path | None, tyro.conf.Positional] = None
    """Artifact directory."""
    bits: str | None = None
    """Precisions, as 1,2,4; default all."""
    isa: str | None = None
    """Instruction sets, separated by commas; default all that this machine has. Without a value, or as "list": print
    which there are, which this machine can run and which is used, and measure nothing."""
    threads: str = "1"
    """Thread counts, separated by commas."""
    batch: int = 1
    """Images a run."""
    runs: int = 5
    """Series measured; the median over their medians counts."""
    repeats: int = 20
    """Runs in a series."""
    json: Path | None = None
    """Also write the rows, or the profiles, to this file."""
    profile: bool = False
    """Time, work and limit of every operation; default the fastest instruction set."""

    def run(self) -> None:
        """Print a table of medians, profiles, or instruction sets."""
        if self.isa == LIST:
            return print_kernel_table()
        if self.artifact is None:
            raise CommandError("bench: name the artifact to measure, or give --isa alone to list instruction sets")
        return self._measure_all(self.artifact)

    def _measure_all(self, path: Path) -> None:
        import numpy as np

        from bitstrata_runtime.artifact import Artifact

        if min(self.batch, self.runs, self.repeats) < 1:
            raise CommandError("bench: --batch, --runs and --repeats must be at least 1")
        artifact = Artifact.open(path)
        program, generator = artifact.manifest.program, np.random.default_rng(0)
        size = (self.batch, *program.input_shape)
        pixels = program.input_kind == "pixels"
        image = generator.integers(0, 256, size, dtype=np.uint8) if pixels else generator.standard_normal(size)
        bits = parse_bits(self.bits) if self.bits is not None else artifact.precisions
        if self.profile:
            self._profile(path, bits, image)
        else:
            self._compare(path, bits, image)

    def _compare(self, path: Path, bits: tuple[int, ...], image: NDArray[Any]) -> None:
        from rich.table import Table

        rows = self._rows(path, bits, image)
        shown = Table(title=f"{path.name}, batch {self.batch}, {cpu_name()}", title_justify="left")
        for column in ("bits", "isa", "threads", "ms", "peer", "peer ms", "ratio"):
            shown.add_column(column, justify="right")
        for row in rows:
            peer = ("-", "-") if row["peer_ms"] is None else (f"{row['peer_ms']:.3f}", f"{row['ratio']:.2f}")
            shown.add_row(
                str(row["bits"]), row["isa"], str(row["threads"]), f"{row['ours_ms']:.3f}", row["peer"], *peer
            )
        output().print(shown)
        if self.json is not None:
            write_json(self.json, rows)

    def _profile(self, path: Path, bits: tuple[int, ...], image: NDArray[Any]) -> None:
        import bitstrata_runtime as runtime
        from bitstrata.cli.profile import show_profile
        from bitstrata_runtime.engine import available_isas

        known, found = available_isas(), []
        isas = known[-1:] if self.isa is None else tuple(choose(name, known, "--isa") for name in self.isa.split(","))
        for threads in _thread_counts(self.threads):
            for precision in bits:
                for isa in isas:
                    session = runtime.load(path, bits=precision, isa=isa, threads=threads)
                    floats = image.dtype != "uint8"
                    profile = runtime.profile(session, image, self.runs * self.repeats, floats=floats)
                    case = f"{path.name}, {precision} bit, {isa}, {threads} thread{'s' * (threads > 1)}"
                    show_profile(case, profile)
                    found.append({"case": path.name, "bits": precision, **profile.as_dict()})
        if self.json is not None:
            write_json(self.json, found)

    def _rows(self, path: Path, bits: tuple[int, ...], image: NDArray[Any]) -> list[dict[str, Any]]:
        from bitstrata_runtime.engine import available_isas

        known = available_isas()
        isas = known if self.isa is None else tuple(choose(name, known, "--isa") for name in self.isa.split(","))
        rows: list[dict[str, Any]] = []
        for threads in _thread_counts(self.threads):
            for precision in bits:
                ours = {
                    isa: self._measure(path, precision, isa, threads, image) for isa in dict.fromkeys((GENERIC, *isas))
                }
                for isa in isas:
                    peer_ms = None if isa == GENERIC else ours[GENERIC]
                    rows.append(
                        {
                            "case": f"{path.name} batch {self.batch}",
                            "threads": threads,
                            "isa": isa,
                            "bits": precision,
                            "ours_ms": round(ours[isa], 5),
                            "peer": "none" if peer_ms is None else f"own {GENERIC} kernels",
                            "peer_ms": None if peer_ms is None else round(peer_ms, 5),
                            "ratio": None if peer_ms is None else round(peer_ms / ours[isa], 3),
                        }
                    )
        return rows

    def _measure(self, path: Path, bits: int, isa: str, threads: int, image: NDArray[Any]) -> float:
        """Median of the medians of `runs` series, in milliseconds, after a warm-up."""
        import bitstrata_runtime as runtime

        session = runtime.load(path, bits=bits, isa=isa, threads=threads)
        for _ in range(3):
            session.run(image, floats=image.dtype != "uint8")
        return statistics.median(self._series(session, image) for _ in range(self.runs))

    def _series(self, session: Any, image: NDArray[Any]) -> float:
        times = []
        for _ in range(self.repeats):
            begun = time.perf_counter()
            session.run(image, floats=image.dtype != "uint8")
            times.append(time.perf_counter() - begun)
        return statistics.median(times) * 1e3


def _thread_counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise CommandError(f"--threads {text!r}: expected positive numbers separated by commas, such as 1,2")
    return counts
