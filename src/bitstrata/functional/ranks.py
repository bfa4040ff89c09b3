"""Sums, means and maxima over the ranks of a torch.distributed run, and what a batch is a share of.

Everything here is the identity in a run of one rank, and without a process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Samples of this rank's batch and of the joined one, where somebody has counted them.
_BATCH: ContextVar[tuple[int, int] | None] = ContextVar("bitstrata_batch", default=None)


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; every rank's result depends on every rank's tensor, so gradients sum too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks, differentiated. All of them must call it, with tensors of one shape and dtype."""
    return _SumOverRanks.apply(x) if world_size() > 1 else x


def power_mean_over_ranks(value: Tensor, weight: int, power: int) -> Tensor:
    """(sum_r w_r v_r^power / sum_r w_r)^(1/power), without gradient: the statistic of joined data from the ranks' own.

    power 1 joins means of |x|, 2 joins root mean squares; 0 stands for the largest value.

    Args:
        value: one element, not negative.
        weight: what this rank's value is a mean of, elements.

    Returns:
        value's shape and dtype; not finite if any rank's value is not, so that all ranks see it.
    """
    if world_size() == 1:
        return value
    finite = torch.isfinite(value)
    wide = value.detach().double()
    if power == 0:
        largest = torch.where(finite, wide, torch.inf)  # a maximum may pass over NaN
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.to(value.dtype)
    sums = torch.stack([wide.reshape(()) ** power * weight, wide.new_tensor(float(weight))])
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).pow(1 / power).reshape(value.shape).to(value.dtype)


def require_equal(what: str, value: int, device: torch.device | str) -> None:
    """Raise ValueError on every rank unless all have the same number: they would wait for each other forever."""
    if world_size() == 1:
        return
    found = torch.tensor([value, -value], dtype=torch.int64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    most, least = int(found[0]), -int(found[1])
    if most != least:
        raise ValueError(f"{what} on every rank must be the same, it is {value} here and goes from {least} to {most}")


def gather_rows(x: Tensor) -> Tensor:
    """The batches of all ranks joined along the first dimension, in the order of ranks, without gradient.

    They may differ in length, not otherwise. Every rank holds the result, so this is for what happens once a run.
    """
    if world_size() == 1:
        return x
    counts = [torch.zeros((), dtype=torch.long, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor(len(x), device=x.device))
    lengths = [int(count) for count in counts]
    padded = x.new_zeros((max(lengths), *x.shape[1:]))
    padded[: len(x)] = x.detach()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


@contextmanager
def batch_of(samples: int, joined: int) -> Iterator[None]:
    """Inside, this rank's batch of `samples` counts as its share of a joined one of `joined` samples."""
    token = _BATCH.set((samples, joined))
    try:
        yield
    finally:
        _BATCH.reset(token)


def joined_elements(x: Tensor) -> int:
    """Elements of the batch `x` of all ranks together: as `batch_of` says, else that many on every rank."""
    share = _BATCH.get()
    if world_size() == 1 or share is None or share[0] == 0:
        return x.numel() * world_size()
    samples, joined = share
    return x.numel() * joined // samples
