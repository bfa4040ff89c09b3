"""A run in progress, as the stages of `train` and `quantize` pass it on (torch side)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from torch import Tensor

from bitstrata.cli import loading, measure
from bitstrata.cli.options import RunOptions
from bitstrata.data import Dataset, Loader

T = TypeVar("T")


@dataclass
class Run:
    """A run in progress: its options, directory (None writes nothing), data and what has been measured."""

    options: RunOptions
    out: Path | None
    bits: tuple[int, ...]
    train: Dataset
    test: Dataset
    console: Console = field(default_factory=Console)
    seconds: dict[str, float] = field(default_factory=dict)
    refusal: str | None = None  # why the quantized network has no integer program

    @property
    def example(self) -> Tensor:
        """One test input as the network takes it, such as a normalized image (1, C, H, W)."""
        return Loader(self.test, 1, train=False).batch(0, 0)[0]

    def loader(self, train: bool) -> Loader:
        """Batches of the training set (augmented, permuted) or of the test set."""
        if not train:
            return Loader(self.test, measure.BATCH, train=False)
        transform = loading.augmentation(self.options.data, self.train, self.options.augment)
        return Loader(
            self.train,
            self.options.batch_size,
            train=True,
            transform=transform,
            seed=self.options.seed,
            # Batch statistics of a short last batch would disturb every normalization.
            drop_last=len(self.train) >= self.options.batch_size,
        )

    def timed(self, stage: str, work: Callable[[], T]) -> T:
        """Run a stage and note how long it took."""
        begun = time.monotonic()
        result = work()
        self.seconds[stage] = round(time.monotonic() - begun, 1)
        return result
