"""What normalizations with running statistics and an affine a channel share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RunningNorm(nn.Module):
    """Options, affine and running statistics, with the attributes and state_dict keys of torch's BatchNorm.

    A subclass names its statistic of spread, and what its own 1d and 2d forms read.

    Args:
        num_features: channels C.
        eps: at least 0.
        momentum: of the running statistics, r <- (1 - momentum) r + momentum batch; None for the plain average over all
            batches since the last reset.
        affine: weight and bias a channel, initially 1 and 0; else there are none.
        statistics: elements of each running statistic.

    Raises:
        TypeError: the class itself instead of its 1d or 2d form.
        ValueError: an option out of its range.
    """

    shapes: tuple[str, ...] = ()  # what the inputs of a form look like
    ranks: tuple[int, ...] = ()
    spread = "running_var"

    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        *,
        statistics: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not self.ranks:
            raise TypeError(f"{name}: use {name}1d or {name}2d")
        if num_features < 1:
            raise ValueError(f"{name}: num_features must be at least 1, got {num_features}")
        if not eps >= 0:
            raise ValueError(f"{name}: eps must be at least 0, got {eps}")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"{name}: momentum must be in 0..1 or None, got {momentum}")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = True
        if affine:
            self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        self.register_buffer("running_mean", torch.zeros(statistics, device=device, dtype=dtype))
        self.register_buffer(self.spread, torch.ones(statistics, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))

    def reset_running_stats(self) -> None:
        """Mean 0, spread 1, no batches seen."""
        self.running_mean.zero_()
        getattr(self, self.spread).fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Initial statistics and affine."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def _check_shape(self, x: Tensor) -> None:
        name = type(self).__name__
        if x.dim() not in self.ranks:
            raise ValueError(f"{name}: input must be {' or '.join(self.shapes)}, got shape {tuple(x.shape)}")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"{name}: input has {x.shape[1]} channels (shape {tuple(x.shape)}), expected "
                f"num_features={self.num_features}"
            )

    @torch.no_grad()
    def _track(self, mean: Tensor, spread: Tensor) -> None:
        self.num_batches_tracked += 1
        share: Any = 1.0 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
        for running, batch in ((self.running_mean, mean), (getattr(self, self.spread), spread)):
            if running.dtype == batch.dtype:
                running.mul_(1 - share).add_(share * batch.view(-1))
                continue
            running.copy_((1 - share) * running.to(batch.dtype) + share * batch.view(-1))

    def _take_over(self, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        """Affine, counter and what is trained of `norm`."""
        if norm.num_batches_tracked is not None:
            self.num_batches_tracked.copy_(norm.num_batches_tracked)
        if norm.affine:
            self.weight.copy_(norm.weight)
            self.bias.copy_(norm.bias)
            self.weight.requires_grad_(norm.weight.requires_grad)
            self.bias.requires_grad_(norm.bias.requires_grad)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum}, affine={self.affine}"
