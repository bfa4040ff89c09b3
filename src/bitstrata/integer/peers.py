"""The quantizers that ShiftQuant is compared with, and the variance of stochastic rounding on each one's steps.

Sources: per-tensor and per-channel symmetric quantization (Guo, Liu et al., section 5, "INT8"); block Hadamard
quantization (Xi, Li, Chen, Zhu, "Training transformers with 4-bit integers", 2023); affine quantization per tensor and
per sample (Chen, Gai, Yao, Mahoney, Gonzalez, "A statistical framework for low-bitwidth training of deep neural
networks", StatQuant, 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import channel_ranges, check_groups, group_exponents, optimal_groups
from .rounding import CounterGenerator, round_codes
from .shiftquant import along, check_axis, check_bits, divide, largest_code, scale_of, working

QUANTIZERS = ("shift", "tensor", "channel", "optimal", "hadamard")
GRANULARITIES = ("tensor", "sample")
LARGEST_BLOCK = 32


@dataclass(frozen=True)
class Scaled:
    """A tensor as value = code * scale.

    Attributes:
        codes: int8 in -B..B, B = 2^(bits-1) - 1.
        scale: float32, () or broadcastable to the codes.
    """

    codes: Tensor
    scale: Tensor
    bits: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code * scale, the shape of the codes, rounded once."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self.codes.to(wide) * self.scale.to(wide)).to(dtype)


def tensor_quantize(
    x: Tensor, bits: int = 8, *, rounding: str = "nearest", generator: CounterGenerator | None = None
) -> Scaled:
    """Symmetric, one scale max|x| / B of the tensor at hand; with 8 bits the INT8 baseline, in either rounding.

    Args:
        x: floating, any shape, finite, not empty. bits: 2..8. rounding, generator: as shift_quantize.

    Raises:
        ValueError: as shift_quantize.
    """
    check_bits(bits, "tensor_quantize")
    values = working(x, "tensor_quantize")
    largest = largest_code(bits)
    scale = scale_of(values.abs().amax(), largest, "tensor_quantize")
    codes = round_codes(
        divide(values, scale), -largest, largest, rounding=rounding, generator=generator, where="tensor_quantize"
    )
    return Scaled(codes, scale, bits)


def channel_quantize(
    x: Tensor,
    bits: int = 8,
    axis: int = 0,
    *,
    rounding: str = "nearest",
    generator: CounterGenerator | None = None,
) -> Scaled:
    """Symmetric, a scale max|x_i| / B for each channel along `axis`, shaped to broadcast; channels of zeros have scale
    0.

    Args:
        x: floating, any shape, finite, not empty. bits: 2..8. rounding, generator: as shift_quantize.

    Raises:
        ValueError: as shift_quantize.
    """
    check_bits(bits, "channel_quantize")
    axis = check_axis(axis, x.dim(), "channel_quantize")
    values = working(x, "channel_quantize")
    largest = largest_code(bits)
    scale = along(scale_of(channel_ranges(values, axis), largest, "channel_quantize"), axis, x.dim())
    codes = round_codes(
        divide(values, scale), -largest, largest, rounding=rounding, generator=generator, where="channel_quantize"
    )
    return Scaled(codes, scale, bits)


def hadamard_block(channels: int, largest: int = LARGEST_BLOCK) -> int:
    """The largest power of two, at most `largest`, that divides `channels`."""
    return min(channels & -channels, largest)


def hadamard_transform(x: Tensor, axis: int = -1, block: int | None = None) -> Tensor:
    """x times the block-diagonal Hadamard matrix H along `axis`, without the factor block^-1/2: H H^T = block * I.

    Sylvester's order, evaluated as log2(block) passes of sums and differences, so integers stay integers.

    Args:
        x: any shape. block: a power of two that divides x.shape[axis]; None takes hadamard_block.

    Raises:
        ValueError: axis out of range; a block that is no power of two or does not divide the axis.
    """
    axis = check_axis(axis, x.dim(), "hadamard_transform")
    channels = x.shape[axis]
    block = hadamard_block(channels) if block is None else block
    if block < 1 or block & (block - 1) or channels % block:
        raise ValueError(f"hadamard_transform: block must be a power of two that divides {channels}, got {block}")
    rows = x.movedim(axis, -1)
    values, half = rows.reshape(-1, block), 1
    while half < block:
        pairs = values.reshape(-1, block // (2 * half), 2, half)
        values = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        values, half = values.reshape(-1, block), 2 * half
    return values.reshape(rows.shape).movedim(-1, axis)


@dataclass(frozen=True)
class HadamardQuantized:
    """Codes of the transformed tensor: value = H^T (code * scale) / sqrt(block).

    Attributes:
        coded: codes and scale of x H / sqrt(block), per tensor. axis: counted from 0. block: the order of H.
    """

    coded: Scaled
    axis: int
    block: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The shape of the codes; the inverse transform acts on the codes, where it is exact."""
        wide = torch.promote_types(dtype, torch.float32)
        back = hadamard_transform(self.coded.codes.to(wide), self.axis, self.block)  # H is symmetric
        return (back * (self.coded.scale.to(wide) / math.sqrt(self.block))).to(dtype)


def hadamard_quantize(
    x: Tensor,
    bits: int = 4,
    axis: int = -1,
    block: int | None = None,
    *,
    rounding: str = "nearest",
    generator: CounterGenerator | None = None,
) -> HadamardQuantized:
    """Block Hadamard transform along the inner axis, then per-tensor symmetric quantization (Xi et al., section 4.2).

    The transform spreads outliers over their block. In a product along the axis the other operand is transformed too,
    and the transforms cancel.

    Args:
        x: floating, any shape, finite, not empty. bits: 2..8. axis, block: as hadamard_transform. rounding, generator:
            as shift_quantize.

    Raises:
        ValueError: as shift_quantize and hadamard_transform.
    """
    axis = check_axis(axis, x.dim(), "hadamard_quantize")
    values = working(x, "hadamard_quantize")
    block = hadamard_block(x.shape[axis]) if block is None else block
    mixed = hadamard_transform(values, axis, block) / math.sqrt(block)
    return HadamardQuantized(tensor_quantize(mixed, bits, rounding=rounding, generator=generator), axis, block)


@dataclass(frozen=True)
class AffineQuantized:
    """A tensor as value = code * scale + zero.

    Attributes:
        codes: int8 (uint8 at 8 bits) in 0..2^bits - 1. scale, zero: float32, () or (samples, 1, ...).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code * scale + zero, the shape of the codes."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self.codes.to(wide) * self.scale.to(wide) + self.zero.to(wide)).to(dtype)


def affine_quantize(
    x: Tensor,
    bits: int = 8,
    per: str = "tensor",
    *,
    rounding: str = "nearest",
    generator: CounterGenerator | None = None,
) -> AffineQuantized:
    """Affine: zero = min x, scale = (max x - min x) / (2^b - 1), of the tensor or of each sample (StatQuant's PTQ and
    PSQ).

    Stochastic rounding takes floor(z + u), the same as rounding z plus a uniform of -1/2..1/2 to nearest.

    Args:
        x: floating, finite, not empty; for "sample" its first dimension holds the samples. bits: 2..8.
        per: "tensor" or "sample". rounding, generator: as shift_quantize.

    Raises:
        ValueError: as shift_quantize; unknown `per`; a tensor of no dimensions per sample.
    """
    check_bits(bits, "affine_quantize")
    if per not in GRANULARITIES:
        raise ValueError(f"affine_quantize: per must be 'tensor' or 'sample', got {per!r}")
    values = working(x, "affine_quantize")
    if per == "sample" and x.dim() == 0:
        raise ValueError("affine_quantize: per 'sample' needs a first dimension of samples, got a tensor of none")
    rows = values.reshape(values.shape[0] if per == "sample" else 1, -1)
    shape = [len(rows)] + [1] * (x.dim() - 1) if per == "sample" else []
    lowest = rows.amin(dim=1)
    largest = largest_code(bits, signed=False)
    # halves, so that max - min cannot overflow where the halved difference over `largest` does not
    scale = scale_of((rows.amax(dim=1) / 2 - lowest / 2), largest, "affine_quantize") * 2
    scale, zero = scale.reshape(shape), lowest.to(torch.float32).reshape(shape)
    z = divide(values - zero.to(values.dtype), scale)
    return AffineQuantized(
        round_codes(z, 0, largest, rounding=rounding, generator=generator, where="affine_quantize"), scale, zero, bits
    )


def channel_steps(x: Tensor, quantizer: str = "shift", *, bits: int = 4, groups: int = 4, axis: int = 1) -> Tensor:
    """The step of each channel along `axis`: float64 (channels,), 0 for steps of nothing but zeros.

    Args:
        quantizer: "shift"; "tensor"; "channel" (each its own); "optimal" (N_G groups whose ranges minimize the
            variance's bound); "hadamard" (the step of the transformed tensor, the same for all).

    Raises:
        ValueError: as shift_quantize; unknown quantizer.
    """
    if quantizer not in QUANTIZERS:
        raise ValueError(f"channel_steps: quantizer must be one of {', '.join(QUANTIZERS)}, got {quantizer!r}")
    check_bits(bits, "channel_steps")
    check_groups(groups, "channel_steps")
    axis = check_axis(axis, x.dim(), "channel_steps")
    values = working(x, "channel_steps")
    if quantizer == "hadamard":
        values = _mixed(values, axis)
    ranges = channel_ranges(values, axis)
    scales = scale_of(ranges, largest_code(bits), "channel_steps").double()
    if quantizer == "channel":
        return scales
    if quantizer == "optimal":
        best = optimal_groups(ranges, groups, "variance")
        taus = best.thresholds.to(ranges)[best.index.long().to(ranges.device)]
        return scale_of(taus, largest_code(bits), "channel_steps").double()
    steps = scales.amax().expand_as(scales)
    if quantizer == "shift":
        return steps * torch.exp2(-group_exponents(ranges, groups).double())
    return steps.clone()


def _mixed(values: Tensor, axis: int) -> Tensor:
    return hadamard_transform(values, axis) / math.sqrt(hadamard_block(values.shape[axis]))


def quantization_variance(
    x: Tensor, quantizer: str = "shift", *, bits: int = 4, groups: int = 4, axis: int = 1
) -> float:
    """The variance that stochastic rounding adds to x, summed over its elements: sum d^2 f (1 - f), f = frac(x / d).

    Exact up to float64's rounding and the 24 bits of the uniforms; no sampling. Stochastic rounding has no bias, so
    this is the expected squared error.

    Args:
        x: floating, any shape, finite, not empty. quantizer, bits, groups, axis: as channel_steps. The Hadamard
            transform preserves lengths, so the variance of the transformed tensor is that of the result.

    Raises:
        ValueError: as channel_steps.
    """
    steps = channel_steps(x, quantizer, bits=bits, groups=groups, axis=axis)
    axis = axis % x.dim()
    values = working(x, "quantization_variance")
    values = (_mixed(values, axis) if quantizer == "hadamard" else values).double()
    step = along(steps, axis, x.dim())
    largest = largest_code(bits)
    z = divide(values, step).clamp(-largest, largest)
    fraction = z - z.floor()
    return float((step.square() * fraction * (1 - fraction)).sum())


@dataclass(frozen=True)
class VarianceBounds:
    """Upper bounds U = (N/4) sum_j d_j^2 of the variance, N elements a channel (appendix B, eq. 28)."""

    shift: float
    fine: float
    coarse: float
    limit: float


def variance_bounds(ranges: Tensor, bits: int = 4, groups: int = 4, count: int = 1) -> VarianceBounds:
    """Appendix B's bound: shift <= limit = 4 fine + 4^-(N_G - 1) coarse (eq. 25 with the exponent derived in eqs. 31 to
    34).

    Args:
        ranges: (channels,) floating, finite, not negative. bits: 2..8. groups: N_G, 1..8. count: N.

    Raises:
        ValueError: as group_exponents; bits out of range.
    """
    check_bits(bits, "variance_bounds")
    exponents = group_exponents(ranges, groups)
    fine = ranges.detach().double() / largest_code(bits)
    coarse = fine.amax().expand_as(fine)
    shift = coarse * torch.exp2(-exponents.double())
    u_shift, u_fine, u_coarse = (count / 4 * float(d.square().sum()) for d in (shift, fine, coarse))
    return VarianceBounds(u_shift, u_fine, u_coarse, 4 * u_fine + 4.0 ** (1 - groups) * u_coarse)
