"""The fully quantized layer normalization by the engine's kernels, with a gradient.

The same as `functional.l1norm.quantized_norm` of float32 rows over dimension 1, bit for bit; of the input only its
codes and a number for each row are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitstrata_runtime import _engine

from .engine_codes import FASTEST, array
from .engine_norm import NormRule


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, features: int, rule: NormRule
    ) -> Tensor:
        flat = x.contiguous().view(-1, features)
        affine = (None if t is None else array(t.contiguous()) for t in (weight, bias))
        options = (rule.bits, rule.l2, rule.eps, rule.factor)
        norm = _engine.LayerNorm(*flat.shape, *options, *affine, FASTEST, torch.get_num_threads())
        codes = torch.empty(flat.shape, dtype=torch.int8)
        out = torch.empty(x.shape)
        ctx.finite = norm.forward(array(flat), array(codes), array(out.view(flat.shape)))
        if not ctx.finite:
            out.fill_(torch.nan)
        ctx.save_for_backward(codes)
        ctx.norm, ctx.rule = norm, rule
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        flat = grad.contiguous().view(codes.shape)
        out = torch.empty(grad.shape)
        if ctx.finite and ctx.norm.backward(array(flat), array(codes), ctx.rule.noise(), array(out.view(codes.shape))):
            affine = [torch.from_numpy(g) for g in (ctx.norm.weight_gradient, ctx.norm.bias_gradient)]
        else:
            out.fill_(torch.nan)
            affine = [torch.full((codes.shape[1],), torch.nan) for _ in range(2)]
        return *(g if need else None for g, need in zip((out, *affine), ctx.needs_input_grad, strict=False)), None, None


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, features: int, rule: NormRule) -> Tensor:
    """The result, contiguous, of x's shape. All NaN, and all gradients NaN, if x, weight or bias are not finite.

    Random bits of the gradient's rounding belong to its elements in row-major order.

    Args:
        x: float32 on the CPU, not empty; normalized over its last dimensions, which hold `features` elements.
        weight, bias: (features,) float32, or None.
    """
    return _Normalized.apply(x, weight, bias, features, rule)
