"""Layer-batch normalization (MaQD, Sawada, Saiin and Suetake, 2024), and normalizations folded into affine maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.l1norm import QuantizedNorm
from ..functional.layer_batch import layer_batch_norm
from ..functional.ranks import sum_over_ranks, world_size
from .l1_norm import L1BatchNorm, QuantizedL1BatchNorm
from .running_norm import RunningNorm


class LayerBatchNorm(RunningNorm):
    """Normalization by one mean and one variance of the whole batch tensor; use `LayerBatchNorm1d` or `2d`.

    y_c = weight_c (x - mean) / sqrt(var + eps) + bias_c with scalar mean and biased var over all of x, both
    differentiated. Evaluation uses the running statistics, scalars too: r <- (1 - momentum) r + momentum batch, the
    biased variance here as well. Source: MaQD section 3.1, eqs. 1 and 5.

    Statistics and arithmetic are in float32 for half-precision input, in the input's dtype otherwise. The attributes
    and state_dict keys are those of torch's BatchNorm, with running_mean and running_var of shape (1,).

    Args:
        num_features: channels C.
        eps: at least 0.
        momentum: None for the plain average over all batches since the last reset.
        affine: weight and bias a channel, initially 1 and 0; else there are none.
        sync: under torch.distributed, take the statistics of the batches of all ranks together. All of them must then
            call it in training mode; batches may differ in size.
    """

    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, statistics=1, device=device, dtype=dtype)
        self.sync = sync

    def forward(self, x: Tensor) -> Tensor:
        """Any of `shapes` to the same shape and dtype.

        Raises:
            ValueError: another number of dimensions or of channels, or a training batch of fewer than two elements.
        """
        self._check_shape(x)
        if not self.training:
            wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            centered = wide - self.running_mean.to(wide.dtype)
            gain = (self.running_var.to(wide.dtype) + self.eps).rsqrt()
            if not self.affine:
                return (centered * gain).to(x.dtype)
            shape = (-1, *[1] * (x.dim() - 2))
            weight, bias = self.weight.to(wide.dtype).view(shape), self.bias.to(wide.dtype).view(shape)
            return (centered * (weight * gain) + bias).to(x.dtype)
        over_ranks = sum_over_ranks if self.sync and world_size() > 1 else None
        y, mean, var = layer_batch_norm(x, self.weight, self.bias, self.eps, over_ranks)
        self._track(mean, var)
        return y

    def extra_repr(self) -> str:
        return super().extra_repr() + (", sync=True" if self.sync else "")


class LayerBatchNorm1d(LayerBatchNorm):
    """Layer-batch normalization of (N, C) or (N, C, L); see `LayerBatchNorm`."""

    shapes = ("(N, C)", "(N, C, L)")
    ranks = (2, 3)


class LayerBatchNorm2d(LayerBatchNorm):
    """Layer-batch normalization of (N, C, H, W); see `LayerBatchNorm`."""

    shapes = ("(N, C, H, W)",)
    ranks = (4,)


def layer_batch_norm_from(norm: nn.Module, *, sync: bool = False) -> LayerBatchNorm:
    """A layer-batch normalization with the affine, eps, momentum, running statistics, device and mode of `norm`.

    The scalar statistics are those of all channels pooled: the mean of the channels' means, and, by the law of total
    variance, the mean of their second moments less the square of that mean.

    Args:
        norm: BatchNorm1d or BatchNorm2d with running statistics.

    Raises:
        TypeError: another module.
        ValueError: no running statistics.
    """
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
        raise TypeError(f"layer_batch_norm_from: norm must be BatchNorm1d or BatchNorm2d, got {type(norm).__name__}")
    mean, var = _running(norm, "layer_batch_norm_from")
    form = LayerBatchNorm1d if isinstance(norm, nn.BatchNorm1d) else LayerBatchNorm2d
    assert norm.running_mean is not None
    made = form(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        sync=sync,
        device=norm.running_mean.device,
        dtype=norm.running_mean.dtype,
    )
    with torch.no_grad():
        made.running_mean.copy_(mean.mean())
        made.running_var.copy_(var.mean() + mean.var(correction=0))  # = mean of (var + mean^2) - (mean of mean)^2
        made._take_over(norm)
    return made.train(norm.training)


def fold(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(gain, shift), float64 (C,), with which evaluation computes gain_c x + shift_c.

    Args:
        norm: BatchNorm1d/2d, LayerBatchNorm1d/2d or L1BatchNorm1d/2d, or a fully quantized one that is frozen.

    Raises:
        TypeError: another module; a fully quantized normalization whose grids follow the batch, not frozen.
        ValueError: no running statistics.
    """
    if isinstance(norm, QuantizedL1BatchNorm):
        if not norm.is_frozen:
            raise TypeError(
                f"fold: {type(norm).__name__} quantizes its input and result by the largest magnitude in each batch, "
                "so it is no affine map; freeze_ the model first, or use L1BatchNorm"
            )
        return _fold_codes(norm.affine_codes())
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | LayerBatchNorm | L1BatchNorm):
        raise TypeError(f"fold: norm must be a BatchNorm, LayerBatchNorm or L1BatchNorm, got {type(norm).__name__}")
    mean, var = _running(norm, "fold")
    one = torch.ones(norm.num_features, dtype=torch.float64, device=mean.device)
    gamma = one if norm.weight is None else norm.weight.detach().double()
    beta = 0 * one if norm.bias is None else norm.bias.detach().double()
    if isinstance(norm, L1BatchNorm):
        spread = norm.running_deviation.detach().double() + norm.eps
        spread = spread.masked_fill(spread == 0, 1.0)  # as evaluation does
    else:
        spread = torch.sqrt(var + norm.eps)
    gain = gamma / spread
    return gain, beta - mean * gain


def _fold_codes(codes: QuantizedNorm) -> tuple[Tensor, Tensor]:
    """Gain and shift of a frozen normalization, from its quantized statistics, weight and bias."""
    mean, spread = codes.mean.value[0].double(), codes.deviation.value[0].double()
    gamma = torch.ones_like(mean) if codes.weight is None else codes.weight.value[0].double()
    beta = torch.zeros_like(mean) if codes.bias is None else codes.bias.value[0].double()
    gain = gamma / spread
    return gain, beta - mean * gain


def _running(norm: nn.Module, what: str) -> tuple[Tensor, Tensor]:
    """Running mean and variance, float64."""
    mean, var = norm.running_mean, norm.running_var
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        raise ValueError(f"{what}: {norm} has no running statistics; use track_running_stats=True")
    return mean.detach().double(), var.detach().double()
