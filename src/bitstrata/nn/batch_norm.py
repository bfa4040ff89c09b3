"""Batch normalization by the statistics of the joined batch of all ranks, on any device and backend."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..functional.ranks import world_size


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


class _JoinedNorm(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) with mean and biased var a channel over all ranks; also returns mean, var, count.

    Means and squared deviations of the ranks are merged (Chan, Golub and LeVeque, 1979), so that nothing cancels; one
    collective forward and one backward. With d = dL/dy, y the normalized input and means over the joined batch:
    dx = (d - mean d - y mean(d y)) / sqrt(var + eps), L the sum of the ranks' losses.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        over = [d for d in range(x.dim()) if d != 1]
        count = x.numel() // x.shape[1]
        mean = x.mean(over) if count else x.new_zeros(x.shape[1])
        squares = (x - _per_channel(mean, x)).square().sum(over)
        mine = torch.cat([mean, squares, x.new_tensor([float(count)])])
        parts = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(parts, mine)
        everyone = torch.stack(parts)
        means, deviations, counts = everyone[:, : len(mean)], everyone[:, len(mean) : -1], everyone[:, -1:]
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = (deviations + counts * (means - mean).square()).sum(0) / total
        gain = (var + eps).rsqrt()
        y = (x - _per_channel(mean, x)).mul_(_per_channel(gain, x))
        ctx.save_for_backward(x, mean, gain, total)
        ctx.mark_non_differentiable(mean, var, total)
        return y, mean, var, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None]:
        x, mean, gain, total = ctx.saved_tensors
        over = [d for d in range(x.dim()) if d != 1]
        y = (x - _per_channel(mean, x)).mul_(_per_channel(gain, x))
        sums = torch.stack([grad.sum(over), (grad * y).sum(over)])
        dist.all_reduce(sums)
        shift, slope = (_per_channel(s, x) for s in sums / total)
        return (grad - shift - y * slope) * _per_channel(gain, x), None


class _Joined(nn.modules.batchnorm._BatchNorm):
    """What both forms share; in evaluation, or in a run of one rank, it is the plain normalization."""

    def forward(self, x: Tensor) -> Tensor:
        """The shapes of the plain normalization, to the same shape and dtype.

        Ranks' batches may differ in size, and all ranks must call it in training mode.

        Raises:
            ValueError: another shape, or one element a channel in the joined batch.
        """
        if not self.training or world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y, mean, var, count = _JoinedNorm.apply(wide, self.eps)
        self._track(mean, var, count, x)
        if self.affine:
            y = torch.addcmul(_per_channel(self.bias.to(y.dtype), y), y, _per_channel(self.weight.to(y.dtype), y))
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor, x: Tensor) -> None:
        """Move the running statistics as the plain normalization does, with the unbiased variance."""
        if x.numel() <= x.shape[1] and float(count) <= 1:  # reading the count would stall accelerators
            raise ValueError(
                f"{type(self).__name__}: training needs more than one element a channel in the batches of all ranks "
                f"together, got shape {tuple(x.shape)} here"
            )
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share: Any = self.momentum
        if share is None:
            share = 1.0 / self.num_batches_tracked.to(mean.dtype)
        unbiased = var * (count / (count - 1))
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.copy_((1 - share) * running.to(batch.dtype) + share * batch)


class JoinedBatchNorm1d(_Joined, nn.BatchNorm1d):
    """`nn.BatchNorm1d` by the statistics of the joined batch of all ranks; see `synchronize_`."""


class JoinedBatchNorm2d(_Joined, nn.BatchNorm2d):
    """`nn.BatchNorm2d` by the statistics of the joined batch of all ranks; see `synchronize_`."""


JOINED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: JoinedBatchNorm1d,
    nn.BatchNorm2d: JoinedBatchNorm2d,
}
PLAIN = {joined: plain for plain, joined in JOINED.items()}
