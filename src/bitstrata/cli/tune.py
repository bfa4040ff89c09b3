"""`bitstrata tune`: the fastest kernels and tile sizes for an artifact on this machine; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bitstrata.cli.common import CommandError, choose, cpu_name, output, parse_bits, write_json


@dataclass(frozen=True)
class Tune:
    """Measure kernels and tile sizes on this machine, and keep the fastest in a file for load(..., tune=True).

    Results never change. ratio = default_ms / tuned_ms, both measured by turns after tuning.
    """

    artifact: Annotated[Path, tyro.conf.Positional]
    """Artifact directory."""
    bits: str | None = None
    """Precisions, as 1,2,4; default all."""
    isa: str | None = None
    """Instruction set; default the fastest."""
    threads: int = 1
    """Threads of the engine."""
    repeats: int = 30
    """Runs of each candidate in each of three turns."""
    file: Path | None = None
    """Where to keep what is found; default BITSTRATA_TUNE_FILE, else bitstrata/tune.json in the cache folder."""
    json: Path | None = None
    """Also write the rows to this file."""

    def run(self) -> None:
        """Print what was chosen for each precision."""
        import numpy as np
        from rich.table import Table

        import bitstrata_runtime as runtime
        from bitstrata_runtime.artifact import Artifact
        from bitstrata_runtime.engine import available_isas

        if min(self.threads, self.repeats) < 1:
            raise CommandError("tune: --threads and --repeats must be at least 1")
        isa = None if self.isa is None else choose(self.isa, available_isas(), "--isa")
        artifact = Artifact.open(self.artifact)
        program, generator = artifact.manifest.program, np.random.default_rng(0)
        size, floats = (1, *program.input_shape), program.input_kind != "pixels"
        image = generator.standard_normal(size) if floats else generator.integers(0, 256, size, dtype=np.uint8)
        shown = Table(title=f"{self.artifact.name}, {cpu_name()}", title_justify="left")
        for column in ("bits", "default ms", "tuned ms", "ratio", "kernels changed", "tile bytes"):
            shown.add_column(column, justify="right")
        rows: list[dict[str, Any]] = []
        for bits in parse_bits(self.bits) if self.bits is not None else artifact.precisions:
            session = runtime.load(self.artifact, bits=bits, isa=isa, threads=self.threads)
            report = runtime.tune(session, image, path=self.file, repeats=self.repeats, floats=floats)
            rows.append(
                {
                    "bits": bits,
                    "threads": self.threads,
                    "default_ms": report.default_seconds * 1e3,
                    "tuned_ms": report.tuned_seconds * 1e3,
                    "ratio": report.default_seconds / report.tuned_seconds,
                    "kernels": report.choice.kernels,
                    "tile_bytes": report.choice.tile_bytes,
                    "file": str(report.path),
                }
            )
            numbers = (f"{rows[-1][key]:.4f}" for key in ("default_ms", "tuned_ms", "ratio"))
            tile = "own" if report.choice.tile_bytes is None else str(report.choice.tile_bytes)
            shown.add_row(str(bits), *numbers, str(len(report.choice.kernels)), tile)
        output().print(shown)
        output().print(f"Kept in {rows[-1]['file']}", soft_wrap=True)
        if self.json is not None:
            write_json(self.json, rows)
