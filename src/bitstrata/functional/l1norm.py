"""Normalization by the mean absolute deviation, in float and with every tensor of it in low-bit integers.

Source: Guo, Liu et al., "Towards Accurate and Efficient Sub-8-Bit Integer Training", section 3.3, eqs. 5 and 36-42.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reduce import sum_to

L1_SCALES = {"1": 1.0, "sqrt(pi/2)": math.sqrt(math.pi / 2)}
Rounding = Callable[[Tensor], Tensor]
HALF = (torch.float16, torch.bfloat16)
SMALLEST_STEP = 2.0**-118  # of integer training: reciprocals stay far from the ends of float32


def l1_factor(l1_scale: str, owner: str) -> float:
    """What the mean absolute deviation is multiplied by; `owner` is for the ValueError on an unknown `l1_scale`."""
    if l1_scale not in L1_SCALES:
        raise ValueError(f"{owner}: l1_scale must be one of {', '.join(map(repr, L1_SCALES))}, got {l1_scale!r}")
    return L1_SCALES[l1_scale]


def nearest(z: Tensor) -> Tensor:
    """Round to nearest, ties to even."""
    return z.round()


def stochastic(z: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """floor(z + u) with u uniform in [0, 1), drawn an element: the mean over draws is z.

    Args:
        z: floating; whole numbers stay as they are.
        generator: on z's device; torch's default one otherwise. The draws do not depend on z's memory format.
    """
    low = z.floor()
    u = torch.rand(z.shape, dtype=z.dtype, device=z.device, generator=generator)
    return low + ((z - low) + u >= 1)  # z + u itself would be rounded, up to the next whole number at times


def stochastic_rounding(generator: torch.Generator) -> Rounding:
    """`stochastic` with the draws of `generator`."""
    return partial(stochastic, generator=generator)


class _L1Normalize(torch.autograd.Function):
    """h = (x - mu)/D with mu = mean(x), D = c mean|x - mu| + eps, both differentiated.

    g = dL/dh, s = sign(x - mu) with sign(0) = 0: dL/dx = (g - mean(g) - c (s - mean(s)) mean(g h)) / D.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...], eps: float, factor: float) -> tuple[Tensor, Tensor, Tensor]:
        mean = x.mean(dims, keepdim=True)
        centered = x - mean
        deviation = centered.abs().mean(dims, keepdim=True).mul_(factor)
        spread = _divisor(deviation + eps)
        h = centered.div_(spread)
        ctx.save_for_backward(h, spread)
        ctx.config = (dims, factor)
        ctx.mark_non_differentiable(mean, deviation)
        return h, mean, deviation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        h, spread = ctx.saved_tensors
        dims, factor = ctx.config
        return _through_statistics(grad, h, h.sign().mul_(factor), spread, dims), None, None, None


def _divisor(spread: Tensor) -> Tensor:
    """1 in the place of 0, which only constant inputs without an eps have: they are centered to 0 and stay it."""
    return spread.masked_fill(spread == 0, 1.0)


def _through_statistics(g: Tensor, h: Tensor, slope: Tensor, spread: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Gradient of x for that of h = (x - mean)/spread, with d spread/dx_i = (slope_i - mean(slope))/n."""
    together = (g * h).mean(dims, keepdim=True)
    slope = slope - slope.mean(dims, keepdim=True)
    return (g - g.mean(dims, keepdim=True)).sub_(slope.mul_(together)).div_(spread)


def l1_normalize(
    x: Tensor, dims: tuple[int, ...], *, eps: float = 1e-5, l1_scale: str = "1"
) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / (deviation + eps), with deviation = c mean|x - mean|, both over `dims`.

    The paper's eq. 39 writes a sum for the deviation; over n elements that would shrink the result n-fold.

    Args:
        x: floating, any shape; statistics of half-precision x are taken in float32.
        dims: dimensions to normalize over, all others have statistics of their own.
        eps: at least 0, added to the deviation. With 0, what is constant is normalized to 0.
        l1_scale: c; "1", or "sqrt(pi/2)", with which the deviation of Gaussian x is its standard deviation.

    Returns:
        The normalized x, of its shape and dtype, differentiable once; mean and deviation (without eps), with the
        dimensions `dims` kept as 1, float32 or wider, not differentiable.

    Raises:
        ValueError: unknown `l1_scale`, or nothing to take a mean of.
    """
    factor = l1_factor(l1_scale, "l1_normalize")
    _refuse_empty("l1_normalize", x)
    h, mean, deviation = _L1Normalize.apply(x.float() if x.dtype in HALF else x, dims, eps, factor)
    return h.to(x.dtype), mean, deviation


def _refuse_empty(owner: str, x: Tensor) -> None:
    if x.numel() == 0:
        raise ValueError(f"{owner}: the input has no elements, shape {tuple(x.shape)}")


@dataclass(frozen=True)
class Codes:
    """A tensor on a symmetric grid without zero point: value = step * codes.

    codes: whole numbers in the floating dtype of what was quantized. step: one element of it.
    """

    codes: Tensor
    step: Tensor

    @property
    def value(self) -> Tensor:
        return self.codes * self.step


def symmetric_dynamic(x: Tensor, bits: int = 8, rounding: Rounding = nearest) -> Codes:
    """Codes in -B..B, B = 2^(bits-1) - 1, with the one step max|x| / B of the whole tensor; 1 if that is below 2^-118.

    NaN or infinite elements make every code NaN.

    Args:
        x: float32 or float64, any shape with elements.
        bits: 2..8.
        rounding: of x * (1/step) to whole numbers.

    Raises:
        ValueError: `bits` out of range.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"symmetric_dynamic: bits must be 2..8, got {bits}")
    bound = 2 ** (bits - 1) - 1
    step = _step(x.detach().abs().amax(), bound)
    return Codes(rounding(x.detach() * step.reciprocal()).clamp_(-bound, bound), step)


def _step(largest: Tensor, bound: int) -> Tensor:
    step = largest / bound
    return step.masked_fill_(step < SMALLEST_STEP, 1.0)


@dataclass(frozen=True)
class QuantizedNorm:
    """Every tensor of one fully quantized normalization: what is quantized, and the result.

    x, mean, deviation, normalized, weight, bias: on their grids; weight and bias None where there are none.
    batch_mean, batch_deviation: of x's codes, in real numbers, before they are quantized; without eps.
    result: weight * normalized + bias, not quantized: the next layer quantizes what it reads.
    """

    x: Codes
    batch_mean: Tensor
    mean: Codes
    batch_deviation: Tensor
    deviation: Codes
    normalized: Codes
    weight: Codes | None
    bias: Codes | None
    result: Tensor


def _spread(deviation: Tensor, eps: float, l2: bool) -> Tensor:
    """What to divide by, for a deviation without eps."""
    if not l2:
        return deviation + eps
    return deviation.double().square().add_(eps).sqrt_().to(deviation.dtype)  # in float32 torch's root is not exact


@torch.no_grad()
def quantized_norm_codes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: tuple[int, ...],
    *,
    bits: int = 8,
    eps: float = 1e-5,
    l1_scale: str = "1",
    l2: bool = False,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> QuantizedNorm:
    """The fully quantized normalization, every tensor on a dynamic symmetric grid of its own, rounded to nearest.

    In this order: x; its mean, from the sum of integer codes; the deviation of x from the quantized mean, from integer
    sums too, eps included, its codes at least 1; (x - mean)/deviation of the quantized three; weight; bias. All sums
    are of integers, all else is elementwise in x's dtype, so the result does not depend on the order of summation; the
    engine's kernels compute the same.

    Args:
        x: float32 or float64, any shape with elements.
        weight, bias: broadcastable to x, or None.
        dims, eps, l1_scale: as for `l1_normalize`.
        bits: width of every grid, 2..8.
        l2: normalize by sqrt(mean (x - mean)^2 + eps) instead, whatever `l1_scale`.
        statistics: mean and deviation (without eps) to use and quantize in the place of x's own, broadcastable to x.

    Raises:
        ValueError: `bits` out of range, unknown `l1_scale`, or x without elements.
    """
    factor = l1_factor(l1_scale, "quantized_norm_codes")
    _refuse_empty("quantized_norm_codes", x)
    xq = symmetric_dynamic(x, bits)
    if statistics is None:
        total = _total(xq.codes, dims)
        count = x.numel() // total.numel()
        batch_mean = total.to(x.dtype) / count * xq.step
    else:
        batch_mean = statistics[0]
    mean = symmetric_dynamic(batch_mean, bits)
    centered = xq.value - mean.value
    if statistics is not None:
        batch_deviation = statistics[1]
    elif l2:
        batch_deviation = _root_mean_square(xq, total, mean.value, dims, count)
    else:
        batch_deviation = _mean_deviation(xq, centered.sign(), mean.value, dims, count, factor)
    grid = symmetric_dynamic(_spread(batch_deviation, eps, l2), bits)
    deviation = Codes(grid.codes.clamp(min=1), grid.step)
    inverse = deviation.value.reciprocal()
    bound = 2 ** (bits - 1) - 1
    step = _step((centered * inverse).abs().amax(), bound)
    normalized = Codes(nearest(centered * (inverse * step.reciprocal())).clamp_(-bound, bound), step)
    weight_q = None if weight is None else symmetric_dynamic(weight.to(x.dtype), bits)
    bias_q = None if bias is None else symmetric_dynamic(bias.to(x.dtype), bits)
    result = normalized.codes * (step if weight_q is None else step * weight_q.value)
    result = result if bias_q is None else result.add_(bias_q.value)
    return QuantizedNorm(xq, batch_mean, mean, batch_deviation, deviation, normalized, weight_q, bias_q, result)


def _total(codes: Tensor, dims: tuple[int, ...]) -> Tensor:
    return codes.sum(dims, keepdim=True, dtype=torch.int64)


def _mean_deviation(  # noqa: PLR0917
    x: Codes, sign: Tensor, mean: Tensor, dims: tuple[int, ...], count: int, factor: float
) -> Tensor:
    """factor * mean|x - mean|, by sign: step * sum(sign * code) - mean * sum(sign), in float64."""
    codes = _total(sign * x.codes, dims).double()
    return ((x.step.double() * codes - mean.double() * _total(sign, dims).double()) / count * factor).to(mean.dtype)


def _root_mean_square(x: Codes, total: Tensor, mean: Tensor, dims: tuple[int, ...], count: int) -> Tensor:
    """sqrt(mean (x - mean)^2) = sqrt((step^2 sum code^2 - 2 mean step sum code + count mean^2) / count), in float64."""
    step, mu = x.step.double(), mean.double()
    square = step * step * _total(x.codes.square(), dims).double() - 2.0 * mu * step * total.double() + count * mu * mu
    return (square / count).clamp_(min=0).sqrt_().to(mean.dtype)


@dataclass(frozen=True)
class _Setting:
    """What a fully quantized normalization does besides its tensors; options: keywords of `quantized_norm_codes`."""

    dims: tuple[int, ...]
    statistics: tuple[Tensor, Tensor] | None
    rounding: Rounding
    options: dict[str, Any]


class _QuantizedNorm(torch.autograd.Function):
    """Straight through every quantizer, clamps of codes included; what the float formula reads is quantized."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, setting: _Setting
    ) -> tuple[Tensor, Tensor, Tensor]:
        fixed = setting.statistics is not None
        out = quantized_norm_codes(x, weight, bias, setting.dims, statistics=setting.statistics, **setting.options)
        inverse = out.deviation.value.reciprocal()
        gamma = (None, None) if out.weight is None else (out.weight.codes, out.weight.step)
        ctx.save_for_backward(out.normalized.codes.to(torch.int8), out.normalized.step, inverse, *gamma)
        ctx.shapes = [None if t is None else t.shape for t in (weight, bias)]
        ctx.setting = (fixed, setting.dims, setting.rounding, setting.options)
        mean, deviation = out.batch_mean.clone(), out.batch_deviation.clone()
        ctx.mark_non_differentiable(mean, deviation)
        return out.result, mean, deviation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        h, step, inverse, gamma, gamma_step = ctx.saved_tensors
        fixed, dims, rounding, options = ctx.setting
        gq = symmetric_dynamic(grad, options["bits"], rounding)
        of_weight, of_bias = ctx.shapes
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            slope = _slope(gq.step * inverse, gq.codes, h, None if gamma is None else Codes(gamma, gamma_step), dims)
            grad_x = slope.factor * slope.codes
            if not fixed:
                factor = None if options["l2"] else L1_SCALES[options["l1_scale"]]
                grad_x = _less_statistics(grad_x, h, step, slope, dims, factor)
        if ctx.needs_input_grad[1]:
            together = sum_to((gq.codes * h).double(), of_weight)
            grad_weight = (together * gq.step.double() * step.double()).to(grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = (sum_to(gq.codes.double(), of_bias) * gq.step.double()).to(grad.dtype)
        return grad_x, grad_weight, grad_bias, None


@dataclass(frozen=True)
class _Slope:
    """factor * codes: the gradient of the normalized x, over the deviation; mean, together: of it, and of its product
    with the codes h of the normalized x, both over `dims` in float64."""

    factor: Tensor
    codes: Tensor
    mean: Tensor
    together: Tensor


def _slope(unit: Tensor, g: Tensor, h: Tensor, weight: Codes | None, dims: tuple[int, ...]) -> _Slope:
    """A weight that differs over `dims` multiplies by its codes, so that sums over `dims` are of integers."""
    if weight is not None and any(weight.codes.shape[d] != 1 for d in dims):
        unit, g = unit * weight.step, g * weight.codes
    elif weight is not None:
        unit = unit * weight.value
    wide, total = unit.double(), g.double().sum(dims, keepdim=True)
    count = g.numel() // total.numel()
    return _Slope(unit, g, wide * total / count, wide * (g * h).double().sum(dims, keepdim=True) / count)


def _less_statistics(  # noqa: PLR0917
    grad: Tensor, h: Tensor, step: Tensor, slope: _Slope, dims: tuple[int, ...], factor: float | None
) -> Tensor:
    """What the mean and the deviation, which depend on x too, take off: with the sign s of the normalized x's codes,
    mean + (s - mean(s)) * factor * together; with l2, where factor is None, h in the place of factor * s."""
    wide = step.double()
    together = slope.together * wide
    if factor is None:
        of_h = h.double().mean(dims, keepdim=True)
        constant = slope.mean - of_h * wide * together
        return (grad - constant.to(grad.dtype)) - h.to(grad.dtype) * (wide * together).to(grad.dtype)
    signs = h.sign().double().mean(dims, keepdim=True)
    negative, zero, positive = ((slope.mean + (s - signs) * factor * together).to(grad.dtype) for s in (-1.0, 0.0, 1.0))
    return grad - torch.where(h < 0, negative, torch.where(h > 0, positive, zero))


def quantized_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: tuple[int, ...],
    *,
    bits: int = 8,
    eps: float = 1e-5,
    l1_scale: str = "1",
    l2: bool = False,
    statistics: tuple[Tensor, Tensor] | None = None,
    rounding: Rounding = stochastic,
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantized_norm_codes(...).result` with a gradient.

    The gradient of the result is quantized first, with `rounding`, to `bits` bits. Then, straight through all other
    quantizers and clamps of codes, the gradients are those of the float normalization with the quantized weight,
    deviation and normalized x in the place of the real ones; with `statistics` given, these are constants. s of
    `l1_normalize` is the sign of quantized normalized x; with `l2` normalized x is in the place of c s.

    Args:
        x: floating, any shape with elements; half precision is computed in float32.
        weight, bias: of x's rank with sizes 1 where they are broadcast, or None.
        dims, bits, eps, l1_scale, l2, statistics: as for `quantized_norm_codes`.
        rounding: real numbers, gradient/step, to whole numbers: `stochastic`, `stochastic_rounding(generator)`,
            `nearest` or a function of one's own.

    Returns:
        The result in x's shape and dtype, differentiable once; mean and deviation (without eps) before they are
        quantized, not differentiable: of the batch, or those given.

    Raises:
        ValueError: as for `quantized_norm_codes`.
    """
    options = {"bits": bits, "eps": eps, "l1_scale": l1_scale, "l2": l2}
    wide = x.float() if x.dtype in HALF else x
    weight, bias = (None if t is None else t.to(wide.dtype) for t in (weight, bias))
    y, mean, deviation = _QuantizedNorm.apply(wide, weight, bias, _Setting(dims, statistics, rounding, options))
    return y.to(x.dtype), mean, deviation
