"""`bitstrata plan`: a bit-width for each layer, within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bitstrata.cli.common import need_training


@dataclass(frozen=True)
class Plan:
    """Choose each layer's bit-width: the least weight error within a budget, with normalizations fitted to it; measure.

    Packs the run's artifact anew with these plans: `bitstrata run RUN/model.strata --bits NAME` runs one. Writes
    RUN/plans.json with every budget's widths, bytes and accuracy, and RUN/plans.png with accuracy against bytes.
    """

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory of `train` or `quantize`, trained at several bit-widths."""
    budget: tuple[str, ...] = ()
    """2.6bits (a weight, on average, of the layers that have a choice), or 150000 or 150KiB (of all weight codes).
    Several make a curve; none makes a curve of eight from the narrowest to the widest."""
    batches: int = 200
    """Training batches that the normalizations are estimated on."""
    batch_size: int = 128
    """Images of such a batch."""
    root: Path | None = None
    """Directory of the data set's files, if it has moved."""

    def run(self) -> None:
        """Print a line a budget."""
        need_training("plan", "matplotlib")
        from bitstrata.cli import planning

        planning.plan(self)
