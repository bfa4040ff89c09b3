"""Where batches come from: sources that can start an epoch at any step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, cast

from torch import Tensor

from bitstrata.train.checkpoint import seed_all

Batch = tuple[Tensor, Tensor]


class BatchSource(Protocol):
    """What `bitstrata.data.Loader` offers: the same batches for the same epoch, from any step on."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterable[Batch]: ...
    def __len__(self) -> int: ...


class IterableSource:
    """Makes a plain sized iterable of batches repeatable: generators are seeded at the start of each epoch.

    Skipped batches are drawn and thrown away, so whatever the iterable draws from the global generators repeats.
    """

    def __init__(self, batches: Iterable[Batch], seed: int) -> None:
        if not hasattr(batches, "__len__"):
            raise TypeError(f"Trainer: a loader needs a length, {type(batches).__name__} has none")
        self.batches = batches
        self.seed = seed

    def __len__(self) -> int:
        return len(cast(Any, self.batches))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of `epoch` from `start_step` on."""
        seed_all(self.seed * 1_000_003 + epoch)
        if hasattr(self.batches, "set_epoch"):  # of a loader that accelerate has prepared
            self.batches.set_epoch(epoch)
        iterator = iter(self.batches)
        for _ in range(start_step):
            next(iterator)
        return iterator


def as_source(loader: BatchSource | Iterable[Batch], seed: int) -> BatchSource:
    """`loader` itself if it can start an epoch anywhere, otherwise a wrapper that can."""
    return cast(BatchSource, loader) if hasattr(loader, "epoch") else IterableSource(cast(Any, loader), seed)


def identity(source: BatchSource) -> dict[str, str]:
    """What is known of a source that decides its batches: steps an epoch, and of a `Loader` images and seed."""
    facts: dict[str, Any] = {"steps an epoch": len(source)}
    dataset = getattr(source, "dataset", None)
    if dataset is not None and hasattr(dataset, "__len__"):
        facts["training images"] = len(dataset)
    if isinstance(getattr(source, "seed", None), int):
        facts["seed of the data order"] = source.seed  # type: ignore[attr-defined]
    return {name: str(value) for name, value in facts.items()}
