"""`bitstrata pack`: an artifact from a trained network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bitstrata.cli.common import CommandError, bytes_of, human_bytes, need_training


@dataclass(frozen=True)
class Pack:
    """Lower a run's network and write it as an artifact directory."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory of `train` or `quantize`."""
    artifact: Annotated[Path, tyro.conf.Positional]
    """Artifact to write, customarily NAME.strata; it must not exist."""
    root: Path | None = None
    """Directory of the data set's files, if it has moved."""

    def run(self) -> None:
        """Write the artifact; prints its size."""
        need_training("pack")
        import bitstrata as bs
        from bitstrata.cli.options import provenance
        from bitstrata.cli.saved import SavedRun, example_of

        if self.artifact.exists():
            raise CommandError(f"pack: {self.artifact} exists already")
        run = SavedRun(self.run_dir, self.root)
        dataset = run.data()
        program = bs.lower(run.model(dataset), example_of(dataset))
        bs.pack(program, self.artifact, provenance(run.options))
        files = bytes_of(self.artifact)
        print(f"{self.artifact}: {len(files)} files, {human_bytes(sum(files.values()))}")
