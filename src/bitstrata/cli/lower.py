"""`bitstrata lower`: the integer program of a trained network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bitstrata.cli.common import need_training


@dataclass(frozen=True)
class Lower:
    """Lower a run's network to its integer program and print it with the headroom proved for every accumulator."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory of `train` or `quantize`."""
    root: Path | None = None
    """Directory of the data set's files, if it has moved."""

    def run(self) -> None:
        """Print the program's summary."""
        need_training("lower")
        import bitstrata as bs
        from bitstrata.cli.saved import SavedRun, example_of

        run = SavedRun(self.run_dir, self.root)
        dataset = run.data()
        print(bs.program_summary(bs.lower(run.model(dataset), example_of(dataset))))
