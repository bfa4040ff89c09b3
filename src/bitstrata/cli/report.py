"""`bitstrata report`: one page about runs, to look at in a browser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bitstrata.cli.common import CommandError, human_bytes


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one self-contained HTML page about runs: accuracies over time and against bytes, losses, each layer's grid
    and weights, where the time went, verification, environment.

    Runs that differ in nothing but the seed are shown together with their spread. The page needs no network, and says
    what an unfinished run does not have yet. Needs matplotlib, not torch.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories that `train` or `quantize` wrote, finished or not."""
    out: Path | None = None
    """The page; default report.html in the run's directory, or in the current one for several runs."""
    title: str | None = None
    """The page's heading; default the run's name, or how many there are."""

    def run(self) -> None:
        """Read the runs, write the page; prints where it is."""
        if not self.runs:
            raise CommandError("report: name at least one run directory")
        from bitstrata import report

        out = self.out or (self.runs[0] if len(self.runs) == 1 else Path()) / "report.html"
        written = report.write(self.runs, out, self.title)
        print(f"{written}: {human_bytes(written.stat().st_size)}")
