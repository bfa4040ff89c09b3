"""`bitstrata train`: from nothing to a verified artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitstrata.cli.common import need_training
from bitstrata.cli.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Train(RunOptions):
    """Train a network of the zoo: float first, then quantized at all bit-widths together; pack and verify it.

    Writes OUT/config.json, metrics.jsonl, checkpoints, model.strata and results.json. An interrupted run continues,
    bit for bit, when the same command is given again.
    """

    model: str = "resnet20"
    """Network of the zoo."""
    float_epochs: int = 10
    """Epochs of float training before quantization."""
    float_lr: float = 0.1
    """Peak learning rate of float training."""
    float_warmup: float = 0.5
    """Epochs of linear warm-up of float training."""
    out: Path | None = None
    """Output directory; default runs/MODEL-DATA."""

    def run(self) -> None:
        """Train, pack, verify; prints the table of results."""
        need_training("train")
        from bitstrata.cli import pipeline

        out = self.out or Path("runs") / f"{self.model}-{self.data}"
        pipeline.train_from_scratch(self, out)
