"""The fully quantized layer normalization by the engine's kernels, with a gradient.

The same as `functional.l1norm.quantized_norm` of float32 rows over dimension 1, bit for bit; of the input only its
codes and a number for each row are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitstrata_runtime import _engine

from .engine_codes import FASTEST
from .engine_norm import NormRule
from .untraced import untraced


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, features: int, rule: NormRule
    ) -> Tensor:
        rows, threads = x.numel() // features, torch.get_num_threads()
        w, b = (None if t is None else t.detach().float().numpy().reshape(-1) for t in (weight, bias))
        norm = _engine.LayerNorm(rows, features, rule.bits, rule.l2, rule.eps, rule.factor, w, b, FASTEST, threads)
        codes, out = torch.empty((rows, features), dtype=torch.int8), torch.empty(x.shape, dtype=torch.float32)
        ctx.finite = norm.forward(_rows(x, features), codes.numpy(), _rows(out, features))
        if not ctx.finite:
            out.fill_(torch.nan)
        ctx.save_for_backward(codes)
        ctx.norm, ctx.rule, ctx.shape = norm, rule, None if weight is None else weight.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        features, wanted = codes.shape[1], ctx.needs_input_grad
        out, noise = torch.empty(grad.shape, dtype=torch.float32), ctx.rule.noise()
        found = ctx.finite and ctx.norm.backward(_rows(grad, features), codes.numpy(), noise, _rows(out, features))
        if not found:
            out.fill_(torch.nan)
        affine = (
            _vector(sums if found else None, features).view(ctx.shape) if want else None
            for sums, want in ((ctx.norm.weight_gradient, wanted[1]), (ctx.norm.bias_gradient, wanted[2]))
        )
        return out if wanted[0] else None, *affine, None, None


def _rows(x: Tensor, features: int) -> NDArray[Any]:
    """As an array (rows, features), C-contiguous; the same memory if x is."""
    return x.detach().contiguous().numpy().reshape(-1, features)


def _vector(values: NDArray[Any] | None, features: int) -> Tensor:
    return torch.full((features,), torch.nan) if values is None else torch.from_numpy(values)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, features: int, rule: NormRule) -> Tensor:
    """The result, contiguous, of x's shape. All NaN, and all gradients NaN, if x, weight or bias are not finite.

    Random bits of the gradient's rounding belong to its elements in row-major order.

    Args:
        x: float32 on the CPU, not empty; normalized over its last dimensions, which hold `features` elements.
        weight, bias: `features` elements each, float32, of one shape, or None; no bias without a weight.
    """
    return untraced(_Normalized.apply, x, weight, bias, features, rule)
