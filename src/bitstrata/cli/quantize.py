"""`bitstrata quantize`: a user's own float checkpoint becomes a verified artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bitstrata.cli.common import need_training
from bitstrata.cli.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Quantize(RunOptions):
    """Quantize a trained float network at all bit-widths together, from its checkpoint; pack and verify it.

    Writes the same files as `train`, and continues in the same way after an interruption.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Float weights: a .safetensors file, or a .pt/.pth file with a state dict in any usual wrapping (read without
    running code)."""
    entry: str | None = None
    """Entry of the .pt file that holds the state dict, such as ema; found by itself where there is only one."""
    model: str = "resnet20"
    """Network: a name of the zoo, or PACKAGE.MODULE:FACTORY of your own (also from the current directory), called with
    the options of --model-set."""
    mean: str | None = None
    """Pixel mean per channel that the network was trained with, in [0, 1], as 0.49,0.48,0.45; default the data's."""
    std: str | None = None
    """Pixel standard deviation per channel, likewise."""
    out: Path | None = None
    """Output directory; default runs/NAME-OF-CHECKPOINT."""

    def run(self) -> None:
        """Load, quantize, train, pack, verify; prints the table of results."""
        need_training("quantize")
        from bitstrata.cli import pipeline

        pipeline.quantize_checkpoint(self, self.out or Path("runs") / self.checkpoint.stem)
