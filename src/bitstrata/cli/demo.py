"""`bitstrata demo`: the whole idea in about a minute, on scikit-learn's handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitstrata.cli.common import need_training


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train one small network at 1 to 4 bits, pack it, then run the artifact at 1 bit and upgrade it step by step.

    Each row: bytes read so far, accuracy of the integer engine and of the trained network, how often both predict
    the same class, in how many layers the engine differs from the reference executor, and latency.
    Writes OUT/digits.strata, results.json and accuracy_vs_bytes.png.
    """

    out: Path = Path("build/demo")
    """Output directory."""
    float_epochs: int = 20
    """Epochs of float training."""
    epochs: int = 15
    """Epochs of quantized training, all precisions together."""
    seed: int = 0
    """Seed of everything random."""
    isa: str | None = None
    """Instruction set of the engine; the best one by default."""
    threads: int | None = None
    """Threads of training."""

    def run(self) -> None:
        """Train, pack, run, upgrade, plot."""
        need_training("demo", "sklearn", "matplotlib")
        from bitstrata.cli import tour

        tour.run(self)
