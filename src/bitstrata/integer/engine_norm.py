"""The fully quantized normalization of a batch by the engine's kernels, with a gradient.

The same as `functional.l1norm.quantized_norm` of float32, bit for bit; of the input only its codes are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitstrata_runtime import _engine

from ..functional.l1norm import Rounding, nearest
from .engine_codes import FASTEST, array, noise_of, rows_of, takes
from .rounding import CounterGenerator, CounterRounding
from .untraced import untraced


@dataclass(frozen=True)
class NormRule:
    """What a normalization computes: bits, l2, eps as of `quantized_norm`; factor: of the mean absolute deviation.

    generator: of the gradient's stochastic rounding; None for rounding to nearest.
    """

    bits: int
    l2: bool
    eps: float
    factor: float
    generator: CounterGenerator | None

    @staticmethod
    def of(rounding: Rounding, *, bits: int, l2: bool, eps: float, factor: float) -> NormRule | None:
        """The rule whose gradients are rounded by `rounding`, or None if the engine does not know how that rounds."""
        if isinstance(rounding, CounterRounding):
            return NormRule(bits, l2, eps, factor, rounding.generator)
        return NormRule(bits, l2, eps, factor, None) if rounding is nearest else None

    def start(self, rows: int, channels: int, weight: Tensor | None, bias: Tensor | None) -> Any:
        """The engine's normalization of one batch of `rows` positions."""
        w, b = (None if t is None else array(t.float()) for t in (weight, bias))
        threads = torch.get_num_threads()
        return _engine.Norm(rows, channels, self.bits, self.l2, self.eps, self.factor, w, b, FASTEST, threads)

    def noise(self) -> tuple[int, int] | None:
        """Seed and stream for the next gradient."""
        return noise_of("nearest" if self.generator is None else "stochastic", self.generator)


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rule: NormRule
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = rows_of(x, 1)
        flat = rows.view(-1, rows.shape[-1])
        shape = flat.shape
        norm = rule.start(shape[0], shape[1], weight, bias)
        codes = torch.empty(shape, dtype=torch.int8)
        like = rows.movedim(-1, 1)
        out = torch.empty_strided(like.shape, like.stride())  # no view, so that what follows may write into it
        ctx.finite = norm.forward(array(flat), None, None, None, array(codes))
        if ctx.finite:
            norm.to_f32(array(codes), False, None, array(out.movedim(1, -1).view(shape)), None)
            mean, deviation = torch.from_numpy(norm.mean), torch.from_numpy(norm.deviation)
        else:
            out.fill_(torch.nan)
            mean, deviation = torch.full((2, rows.shape[-1]), torch.nan).unbind()
        ctx.save_for_backward(codes)
        ctx.norm, ctx.rule = norm, rule
        ctx.mark_non_differentiable(mean, deviation)
        return out, mean, deviation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        rows = rows_of(grad.float(), 1)
        flat = rows.view(codes.shape)
        gradient = torch.empty(codes.shape, dtype=torch.int8)
        out = torch.empty_like(rows)
        if ctx.finite and ctx.norm.backward(
            array(flat), None, None, array(codes), False, ctx.rule.noise(), array(gradient)
        ):
            ctx.norm.gradient_f32(array(gradient), array(codes), array(out.view(codes.shape)))
            affine = [torch.from_numpy(g) for g in (ctx.norm.weight_gradient, ctx.norm.bias_gradient)]
        else:
            out.fill_(torch.nan)
            affine = [torch.full((codes.shape[1],), torch.nan) for _ in range(2)]
        found = (out.movedim(-1, 1), *affine)
        return *(g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=False)), None


def norm_applies(x: Tensor, weight: Tensor | None) -> bool:
    """Whether `batch_norm` computes this: float32 on the CPU, not empty."""
    return x.dtype == torch.float32 and takes(x) and (weight is None or weight.dtype == torch.float32)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, rule: NormRule) -> tuple[Tensor, Tensor, Tensor]:
    """The result, channels last in memory, and the batch's mean and deviation (channels,), not differentiable.

    All NaN if x is not finite.

    Args:
        x: (N, C, ...), float32 on the CPU, not empty. weight, bias: (C,) or None.
    """
    return untraced(_Normalized.apply, x, weight, bias, rule)
