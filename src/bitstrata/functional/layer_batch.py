"""Layer-batch normalization of a training batch: one mean and one variance of the whole tensor.

Source: Sawada, Saiin and Suetake, "MaQD" (2024), section 3.1, eqs. 1 and 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dorefa import widened

Normalized = tuple[Tensor, Tensor, Tensor]


def layer_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Normalized:
    """y_c = weight_c (x - mean) / sqrt(var + eps) + bias_c, with the mean and the biased variance of all of x, both
    differentiated.

    Statistics and arithmetic are in float32 for half-precision input, in the input's dtype otherwise.

    Args:
        x: (N, C, ...), floating, of more than one element over all ranks.
        weight, bias: (C,), or None for 1 and 0.
        over_ranks: the sum over all ranks, differentiated, whose batches may differ in size; None for this batch alone.

    Returns:
        y of x's shape and dtype; mean and var (1,), in the dtype of the arithmetic, not differentiable.

    Raises:
        ValueError: a batch of fewer than two elements, over all ranks.
    """
    if over_ranks is None and x.numel() <= 1:
        raise _few(x)
    plain = over_ranks is None and x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()
    if plain and not torch.jit.is_tracing():  # type: ignore[attr-defined]
        return _LayerBatchNorm.apply(x, weight, bias, eps)
    return _composed(x, weight, bias, eps, over_ranks)


def _few(x: Tensor) -> ValueError:
    return ValueError(
        f"layer-batch normalization: training needs more than one element a batch, got shape {tuple(x.shape)}"
    )


def _composed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, over_ranks: Callable[[Tensor], Tensor] | None
) -> Normalized:
    """The definition, in torch's own operations.

    The variance is that of the centered tensor, across ranks too: a difference of large sums would cancel.
    """
    wide = widened(x)
    own = torch.stack([wide.sum(), wide.new_tensor(float(x.numel()))])
    total, count = (own if over_ranks is None else over_ranks(own)).unbind()
    if x.numel() <= 1 and float(count) <= 1:  # a look at the count would stall accelerators, and others need none
        raise _few(x)
    mean = total / count.detach()
    centered = wide - mean
    squares = centered.square().sum()
    var = (squares if over_ranks is None else over_ranks(squares)) / count.detach()
    gain = (var + eps).rsqrt()
    if weight is None or bias is None:
        y = centered * gain
    else:
        y = centered * (_wide_channels(weight, wide) * gain) + _wide_channels(bias, wide)
    return y.to(x.dtype), mean.detach().view(1), var.detach().view(1)


def _wide_channels(p: Tensor, like: Tensor) -> Tensor:
    return p.to(like.dtype).view(-1, *[1] * (like.dim() - 2))


class _LayerBatchNorm(torch.autograd.Function):
    """By the kernels of torch's batch normalization, which read a tensor as often as it takes: the definition above
    writes several of the input's size, twice as wide in half precision, forward and backward.

    With statistics that are the same for every channel, theirs in evaluation is this one. Its gradient lacks what flows
    through mean and variance, which its gradients of weight and bias give.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Normalized:
        dtype = torch.promote_types(x.dtype, torch.float32)
        empty = x.new_zeros(x.shape[1], dtype=dtype)
        # of running statistics it takes the dtype alone: without, half precision would have half-precision statistics
        means, variances = torch.batch_norm_update_stats(x, empty, empty.clone(), 0.0)
        mean = means.mean()
        var = variances.mean() + (means - mean).square().mean()  # the law of total variance
        channels = (mean.expand_as(means).contiguous(), var.expand_as(means).contiguous())
        affine = [None if p is None else p.to(dtype) for p in (weight, bias)]
        y = F.batch_norm(x, *channels, affine[0], affine[1], False, 0.0, eps)
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.eps = eps
        statistics = mean.view(1), var.view(1)
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var = ctx.saved_tensors
        needs, eps = ctx.needs_input_grad, ctx.eps
        if torch.is_grad_enabled():  # create_graph: mean and variance depend on x for further derivatives
            wanted = [p for p, need in zip((x, weight, bias), needs, strict=False) if need]
            y = _composed(x, weight, bias, eps, None)[0]
            found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
            return *(next(found) if need else None for need in needs[:3]), None
        gain = x.new_ones(x.shape[1], dtype=mean.dtype) if weight is None else weight.to(mean.dtype)
        channels = (mean.expand_as(gain).contiguous(), var.expand_as(gain).contiguous())
        gx, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient.to(x.dtype), x, gain, *channels, None, None, False, eps, [needs[0], True, True]
        )
        if needs[0]:
            rsqrt = (var + eps).rsqrt()
            # per element, of the gradient of the normalized input and of its product with the normalized input
            flat, along = ((gain * found).sum() / x.numel() for found in (of_bias, of_weight))
            slope = along * rsqrt.square()
            gx.addcmul_(x, -slope.to(x.dtype)).add_((slope * mean - flat * rsqrt).to(x.dtype))
        of = [None if p is None or not need else g.to(p.dtype) for p, need, g in
              ((weight, needs[1], of_weight), (bias, needs[2], of_bias))]  # fmt: skip
        return gx, *of, None
