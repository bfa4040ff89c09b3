"""Normalized batches whose position (epoch, step) determines every later one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Generator, Tensor

from .dataset import Dataset
from .transforms import Transform

Batch = tuple[Tensor, Tensor]
_AHEAD = 2  # batches prepared before they are asked for
_ORDER, _AUGMENT = 0, 1  # separate random streams


class Loader:
    """Batches of a data set: float32 normalized (B, C, H, W), or floats as they are, and int64 labels (B,).

    train: True permutes each epoch, with randomness from (seed, epoch); False keeps the data set's order.
    transform: applied to the uint8 batch, with randomness from (seed, epoch, step).
    drop_last: leaves out a last batch smaller than `batch_size`.
    prefetch: one background thread prepares two batches ahead. It changes no batch.

    No state is kept between batches, so resuming at (epoch, step) continues bit for bit.
    Raises ValueError for impossible arguments.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        train: bool,
        transform: Transform | None = None,
        seed: int = 0,
        drop_last: bool = False,
        prefetch: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Loader: batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"Loader: seed must not be negative, got {seed}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.train = train
        self.transform = transform
        self.seed = seed
        self.drop_last = drop_last
        self.prefetch = prefetch
        if len(self) == 0:
            raise ValueError(
                f"Loader: no batch of {batch_size} in a data set of {len(dataset)} images (drop_last={drop_last})"
            )

    def __len__(self) -> int:
        """Steps an epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of one epoch from `start_step` on, 0 <= start_step <= len(self).

        An exception in the data set or a transform is raised here, at the batch it belongs to. Closing the iterator
        (or dropping it) ends the background thread.
        """
        self._check("epoch", epoch, start_step, len(self))
        return self._prefetched(epoch, start_step) if self.prefetch else self._plain(epoch, start_step)

    def batch(self, epoch: int, step: int) -> Batch:
        """The one batch at (epoch, step), 0 <= step < len(self)."""
        self._check("batch", epoch, step, len(self) - 1)
        return self._make(self._order(epoch), epoch, step)

    def _check(self, operation: str, epoch: int, step: int, last: int) -> None:
        if epoch < 0 or not 0 <= step <= last:
            raise ValueError(f"Loader.{operation}: need epoch >= 0 and step in 0..{last}, got ({epoch}, {step})")

    def _plain(self, epoch: int, start: int) -> Iterator[Batch]:
        order = self._order(epoch)
        for step in range(start, len(self)):
            yield self._make(order, epoch, step)

    def _prefetched(self, epoch: int, start: int) -> Iterator[Batch]:
        order = self._order(epoch)
        pending: deque[Future[Batch]] = deque()
        pool = ThreadPoolExecutor(1, thread_name_prefix="bitstrata-loader")
        try:
            for step in range(start, len(self)):
                pending.append(pool.submit(self._make, order, epoch, step))
                if len(pending) > _AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _order(self, epoch: int) -> Tensor:
        if not self.train:
            return torch.arange(len(self.dataset))
        return torch.randperm(len(self.dataset), generator=self._generator(_ORDER, epoch))

    def _make(self, order: Tensor, epoch: int, step: int) -> Batch:
        start = step * self.batch_size
        images, labels = self.dataset.batch(order[start : start + self.batch_size])
        if self.transform is not None:
            images = self.transform(images, self._generator(_AUGMENT, epoch, step))
        return self.dataset.normalized(images), labels

    def _generator(self, stream: int, *position: int) -> Generator:
        # Seeds that differ in one number give unrelated streams only after hashing.
        words = np.random.SeedSequence((stream, self.seed, *position)).generate_state(1, np.uint64)
        return Generator().manual_seed(int(words[0]))
