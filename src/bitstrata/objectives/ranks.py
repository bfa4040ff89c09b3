"""One gradient from the batches of all ranks, for objectives that run several backward passes a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..functional.ranks import batch_of, world_size
from ..prepare.wrapped import has_flat_parameters, is_sharded, undistributed

BUCKET = 25 * 2**20  # bytes that travel together


@dataclass(frozen=True)
class Ranks:
    """The part of this rank in a step: `samples` of the `joined` ones.

    network: what runs. Inside `DistributedDataParallel` that is the wrapped network itself: its hooks would exchange
    gradients in every backward pass, and wait for parameters that only another precision uses. Instead `average_`
    exchanges them once, after the last pass. sharded: FSDP, which exchanges gradients itself. exchanges: `average_` has
    something to do; not inside the wrapper's `no_sync`.
    """

    network: nn.Module
    samples: int = 1
    joined: int = 1
    world: int = 1
    sharded: bool = False
    exchanges: bool = False

    @classmethod
    def of(cls, model: nn.Module, inputs: Tensor) -> Ranks:
        """The ranks that train `model`, on `inputs` here; one, if nothing wraps it.

        Raises ValueError for `FullyShardedDataParallel`.
        """
        network = undistributed(model)
        if not (dist.is_available() and dist.is_initialized()):
            return cls(network)
        sharded = is_sharded(model)
        if sharded and has_flat_parameters(model):
            raise ValueError(
                "joint_backward: FullyShardedDataParallel joins parameters that belong to different precisions; shard "
                "the model with torch.distributed.fsdp.fully_shard (FSDP version 2 in accelerate)"
            )
        wrapped = isinstance(model, DistributedDataParallel)
        world = world_size() if wrapped or sharded else 1
        if world == 1:
            return cls(network, sharded=sharded)
        samples = len(inputs)
        total = torch.tensor(samples, dtype=torch.int64, device=inputs.device)
        dist.all_reduce(total)
        exchanges = wrapped and bool(model.require_backward_grad_sync)
        return cls(network, samples, int(total), world, sharded, exchanges)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, what counts elements of the batch counts those of the joined one."""
        with batch_of(self.samples, self.joined):
            yield

    def share(self, loss: Tensor) -> Tensor:
        """A mean over this rank's samples, scaled so that the mean over ranks is the mean over the joined batch."""
        weight = self.samples * self.world / self.joined
        return loss if weight == 1.0 else loss * weight

    def average_(self) -> None:
        """Replace every `.grad` of the network by its mean over ranks; what is equal on all of them stays."""
        if self.exchanges:
            trained = [p for p in self.network.parameters() if p.requires_grad]
            for p, gradient in zip(trained, self.mean([p.grad for p in trained], trained), strict=True):
                p.grad = gradient

    @torch.no_grad()
    def mean(self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Means over ranks; where only some ranks have a gradient, the others' counts as zero. In place if possible."""
        if self.world == 1 or not like:
            return list(gradients)
        present = torch.tensor([g is not None for g in gradients], dtype=torch.uint8, device=like[0].device)
        dist.all_reduce(present, op=dist.ReduceOp.MAX)
        if any(g is not None and g.is_sparse for g in gradients):
            raise ValueError(
                "joint_backward: gradients are averaged over ranks only if they are dense; some are sparse"
            )
        means = [
            g.clone() if g is not None and 0 in g.stride() else g for g in gradients
        ]  # expanded: no room of its own
        for i, needed in enumerate(present.tolist()):
            if needed and means[i] is None:
                means[i] = torch.zeros_like(like[i])
        waiting = []
        for bucket in _buckets([g for g in means if g is not None]):
            flat = torch.cat([g.reshape(-1) for g in bucket]).div_(self.world)
            waiting.append((dist.all_reduce(flat, async_op=True), flat, bucket))
        for work, flat, bucket in waiting:
            work.wait()
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(part.view(g.shape))
        return means


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device in groups of about `BUCKET` bytes."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for t in tensors:
        kinds.setdefault((t.dtype, t.device), []).append(t)
    for group in kinds.values():
        bucket, size = [], 0
        for t in group:
            bucket.append(t)
            size += t.numel() * t.element_size()
            if size >= BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
