"""Normalized batches whose position (epoch, step) determines every later one."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from torch import Generator, Tensor

from .dataset import Dataset
from .transforms import Part, Transform

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

    `shard` gives the share of one rank of several.
    """

    rank = 0
    ranks = 1

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

    def shard(self, rank: int, ranks: int) -> Self:
        """The share of rank `rank` of `ranks`; this loader stays as it is.

        What the ranks get at (epoch, step), joined in their order, is to the bit what one loader of ranks * batch_size
        images has there, augmentation included; a smaller last batch is split evenly, shares differing by one image at
        most. Transforms that do not take a `Part` run on the joined batch, of which the rest is thrown away.

        Raises ValueError for impossible arguments, a loader that is a share already, and a last batch with fewer images
        than ranks.
        """
        if not 0 <= rank < ranks:
            raise ValueError(f"Loader.shard: need 0 <= rank < ranks, got rank={rank}, ranks={ranks}")
        if self.ranks != 1:
            raise ValueError(f"Loader.shard: this is the share of rank {self.rank} of {self.ranks} already")
        share = copy.copy(self)
        share.rank, share.ranks = rank, ranks
        rest = len(self.dataset) % (self.batch_size * ranks)
        if len(share) == 0 or (0 < rest < ranks and not self.drop_last):
            raise ValueError(
                f"Loader.shard: {len(self.dataset)} images in batches of {self.batch_size} on each of {ranks} ranks "
                f"leave {rest} for the last step, not one a rank; use drop_last=True or another batch_size"
            )
        return share

    def __len__(self) -> int:
        """Steps an epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size * self.ranks)
        return whole + bool(rest and not self.drop_last)

    def epoch(self, epoch: int, start_step: int = 0, every: int = 1) -> Iterator[Batch]:
        """Batches of one epoch from `start_step` on, 0 <= start_step <= len(self); only each `every`-th of them.

        An exception in the data set or a transform is raised here, at the batch it belongs to. Closing the iterator
        (or dropping it) ends the background thread.
        """
        self._check("epoch", epoch, start_step, len(self))
        if every < 1:
            raise ValueError(f"Loader.epoch: every must be at least 1, got {every}")
        steps = range(start_step, len(self), every)
        return self._prefetched(epoch, steps) if self.prefetch else self._plain(epoch, steps)

    def batch(self, epoch: int, step: int) -> Batch:
        """The one batch at (epoch, step), 0 <= step < len(self)."""
        self._check("batch", epoch, step, len(self) - 1)
        return self._make(self._order(epoch), epoch, step)

    def _check(self, operation: str, epoch: int, step: int, last: int) -> None:
        if epoch < 0 or not 0 <= step <= last:
            raise ValueError(f"Loader.{operation}: need epoch >= 0 and step in 0..{last}, got ({epoch}, {step})")

    def _plain(self, epoch: int, steps: range) -> Iterator[Batch]:
        order = self._order(epoch)
        for step in steps:
            yield self._make(order, epoch, step)

    def _prefetched(self, epoch: int, steps: range) -> Iterator[Batch]:
        order = self._order(epoch)
        pending: deque[Future[Batch]] = deque()
        pool = ThreadPoolExecutor(1, thread_name_prefix="bitstrata-loader")
        try:
            for step in steps:
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
        joined = self.batch_size * self.ranks
        indices = order[step * joined : (step + 1) * joined]
        total = len(indices)
        mine = slice(total * self.rank // self.ranks, total * (self.rank + 1) // self.ranks)
        generator = self._generator(_AUGMENT, epoch, step)
        if self.transform is None:
            images, labels = self.dataset.batch(indices[mine])
        elif self.ranks > 1 and getattr(self.transform, "takes_part", False):
            images, labels = self.dataset.batch(indices[mine])
            images = self.transform(images, generator, Part(mine.start, total))  # type: ignore[call-arg]
        else:
            images, labels = self.dataset.batch(indices)
            images, labels = self.transform(images, generator)[mine], labels[mine]
        return self.dataset.normalized(images), labels

    def _generator(self, stream: int, *position: int) -> Generator:
        # Seeds that differ in one number give unrelated streams only after hashing.
        words = np.random.SeedSequence((stream, self.seed, *position)).generate_state(1, np.uint64)
        return Generator().manual_seed(int(words[0]))
