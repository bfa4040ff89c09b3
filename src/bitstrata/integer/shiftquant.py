"""ShiftQuant: one scale a tensor, and for each channel a power of two by which its step is finer.

Source: Guo, Liu et al., "Towards accurate and efficient sub-8-bit integer training", section 4.1 and eq. 43.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import engine_codes
from .groups import channel_ranges, check_groups, group_exponents, pack_bits, pack_groups, unpack_bits, unpack_groups
from .rounding import CounterGenerator, check_rounding, round_codes

SMALLEST_SCALE = 2.0**-118  # so that 2^7 / scale, the largest factor that a group has, is finite


def largest_code(bits: int, signed: bool = True) -> int:
    """B = 2^(b-1) - 1 for codes -B..B; 2^b - 1 for codes 0..2^b - 1."""
    return int(2 ** (bits - 1) - 1) if signed else int(2**bits - 1)


def check_bits(bits: int, where: str) -> None:
    """ValueError, naming `where`, unless bits is in 2..8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{where}: bits must be an integer in 2..8, got {bits!r}")


def check_axis(axis: int, dim: int, where: str) -> int:
    """The axis counted from 0; ValueError, naming `where`, if a tensor of `dim` dimensions has none such."""
    if not -dim <= axis < dim:
        raise ValueError(f"{where}: axis {axis} is out of range for a tensor of {dim} dimensions")
    return axis % dim


def working(x: Tensor, where: str, name: str = "x") -> Tensor:
    """x detached, in float32 or wider; ValueError, naming `where`, if it is not floating or has no elements."""
    if not x.is_floating_point():
        raise ValueError(f"{where}: {name} must be floating, got {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"{where}: {name} of shape {tuple(x.shape)} has no elements, so no range")
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def scale_of(ranges: Tensor, largest: int, where: str, name: str = "x") -> Tensor:
    """range / largest in float32; 0 below 2^-118, so that products with its reciprocal stay accurate.

    Raises:
        ValueError: a range that is NaN, infinite, or beyond float32.
    """
    if not bool(ranges.isfinite().all()):
        raise ValueError(f"{where}: {name} contains NaN or infinity")
    scale = ranges.to(torch.float32) / largest
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{where}: {name} reaches {float(ranges.max()):g}, beyond the range of float32")
    return torch.where(scale >= SMALLEST_SCALE, scale, torch.zeros_like(scale))


def divide(x: Tensor, scale: Tensor) -> Tensor:
    """x * (1 / scale), and 0 where the scale is 0: nothing but zeros (or tiny ranges) has a scale of 0.

    The product with the reciprocal, both rounded in x's dtype, is what kernels compute.
    """
    step = scale.to(x.dtype)
    return x * torch.where(step > 0, step.reciprocal(), 0.0)


def along(values: Tensor, axis: int, dim: int) -> Tensor:
    """(channels,) reshaped to broadcast along `axis` of a tensor of `dim` dimensions."""
    shape = [1] * dim
    shape[axis] = -1
    return values.reshape(shape)


@dataclass(frozen=True)
class ShiftQuantized:
    """A tensor as codes, a scale, and an exponent for each channel: value = code * scale * 2^-e.

    Attributes:
        codes: int8 in -B..B, B = 2^(bits-1) - 1; for signed=False 0..2^bits - 1, uint8 at 8 bits, int8 below.
        exponents: uint8 (codes.shape[axis],), e in 0..groups - 1.
        scale: float32 (), tau_0 / B; 0 for a tensor of zeros.
        bits, axis, groups, signed: as given to shift_quantize; axis counted from 0.
    """

    codes: Tensor
    exponents: Tensor
    scale: Tensor
    bits: int
    axis: int
    groups: int
    signed: bool = True

    @property
    def largest(self) -> int:
        """The largest code of the format."""
        return largest_code(self.bits, self.signed)

    def factors(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """2^-e of each channel: (channels,) of `dtype`, exact."""
        return torch.exp2(-self.exponents.to(dtype))

    def shifts(self) -> Tensor:
        """groups - 1 - e of each channel, the left shifts of the integer product: int64 (channels,)."""
        return self.groups - 1 - self.exponents.to(torch.int64)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code * (scale * 2^-e), the shape of the codes. In float32 and float64 rounded at most once."""
        wide = torch.promote_types(dtype, torch.float32)
        steps = self.scale.to(wide) * self.factors(wide)
        return (self.codes.to(wide) * along(steps, self.axis, self.codes.dim())).to(dtype)

    def pack(self) -> PackedShift:
        """The same, in as few bytes as the widths allow; in the order of the memory, if its channels are last."""
        rows = self.codes.movedim(self.axis, -1)
        channels_last = rows.is_contiguous() and not self.codes.is_contiguous()
        return PackedShift(
            _packed(rows if channels_last else self.codes, self.bits),
            pack_groups(self.exponents, self.groups),
            self.scale,
            tuple(self.codes.shape),
            self.bits,
            self.axis,
            self.groups,
            self.signed,
            channels_last,
        )


@dataclass(frozen=True)
class PackedShift:
    """A ShiftQuantized at rest: bits / 8 bytes a code, ceil(log2 groups) / 8 bytes a channel, 4 bytes for the scale.

    Attributes:
        codes, exponents: uint8, packed. scale: float32 (). shape: of the codes. bits, axis, groups, signed: as there.
        channels_last: whether codes were packed in the order with `axis` last.
    """

    codes: Tensor
    exponents: Tensor
    scale: Tensor
    shape: tuple[int, ...]
    bits: int
    axis: int
    groups: int
    signed: bool = True
    channels_last: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of codes, exponents and scale together."""
        return self.codes.numel() + self.exponents.numel() + self.scale.numel() * self.scale.element_size()

    def unpack(self) -> ShiftQuantized:
        """The ShiftQuantized that was packed, equal to the last bit."""
        shape = self.shape
        if self.channels_last:
            shape = (*shape[: self.axis], *shape[self.axis + 1 :], shape[self.axis])
        codes = unpack_codes(self.codes, self.bits, shape, self.signed)
        codes = codes.movedim(-1, self.axis) if self.channels_last else codes
        exponents = unpack_groups(self.exponents, self.groups, self.shape[self.axis])
        return ShiftQuantized(codes, exponents, self.scale, self.bits, self.axis, self.groups, self.signed)


def shift_quantize(
    x: Tensor,
    bits: int,
    groups: int = 4,
    axis: int = 1,
    *,
    rounding: str = "nearest",
    generator: CounterGenerator | None = None,
    unsigned_nonneg: bool = False,
    clip_ratio: float = 1.0,
) -> ShiftQuantized:
    """ShiftQuant: scale d = tau_0 / B, exponents e_i of section 4.1, codes clip(R(x / (d 2^-e_i)), -B, B).

    The range is that of the tensor at hand. float16 and bfloat16 are computed in float32, float64 in float64 with the
    scale still float32. A tensor whose scale would be below 2^-118 counts as zeros.

    Args:
        x: floating, any shape, finite, not empty.
        bits: b, 2..8.
        groups: N_G, 1..8; 1 is per-tensor quantization.
        axis: the dimension of the channels, the inner one of the product to come.
        rounding: R, "nearest" (ties to even) or "stochastic" (one stream of `generator`; element i is the i-th in
            row-major order with `axis` last, whatever the memory format).
        unsigned_nonneg: codes 0..2^b - 1 for tensors without negative elements, which buys a bit after a ReLU. Others
            stay signed.
        clip_ratio: above 0 and at most 1, multiplies all ranges: a finer step, and what lies beyond gets the outermost
            code. Less than 1 is for rounding to nearest; it is not the paper's, whose ratio is 1.

    Raises:
        ValueError: bits, groups, axis, rounding or clip_ratio out of range; x not floating, empty, NaN or infinite.
    """
    where = "shift_quantize"
    check_bits(bits, where)
    check_groups(groups, where)
    axis = check_axis(axis, x.dim(), where)
    check_rounding(rounding, generator, where)
    check_clip(clip_ratio, rounding, where)
    if engine_codes.takes(x):
        signed = not (unsigned_nonneg and bool(x.detach().amin() >= 0))
        noise = engine_codes.noise_of(rounding, generator)
        codes, exponents, scale = engine_codes.shift_codes(
            x, bits, groups, axis, noise, signed=signed, clip_ratio=clip_ratio
        )
        if not bool(scale.isnan()):
            return ShiftQuantized(codes, exponents, scale, bits, axis, groups, signed)
    return shift_quantize_reference(
        x,
        bits,
        groups,
        axis,
        rounding=rounding,
        generator=generator,
        unsigned_nonneg=unsigned_nonneg,
        clip_ratio=clip_ratio,
    )


def shift_quantize_reference(
    x: Tensor,
    bits: int,
    groups: int = 4,
    axis: int = 1,
    *,
    rounding: str = "nearest",
    generator: CounterGenerator | None = None,
    unsigned_nonneg: bool = False,
    clip_ratio: float = 1.0,
) -> ShiftQuantized:
    """The definition of `shift_quantize` in torch, which computes it where the engine's kernels do not apply."""
    where = "shift_quantize"
    check_bits(bits, where)
    check_groups(groups, where)
    axis = check_axis(axis, x.dim(), where)
    check_clip(clip_ratio, rounding, where)
    values = working(x, where)
    ranges = channel_ranges(values, axis) * clip_ratio
    signed = not (unsigned_nonneg and bool(values.amin() >= 0))
    largest = largest_code(bits, signed)
    scale = scale_of(ranges, largest, where).amax()
    exponents = group_exponents(ranges, groups)
    # the power of two multiplies the quotient: exact, where scale * 2^-e may be subnormal
    factors = along(torch.exp2(exponents.to(values.dtype)), axis, x.dim())
    z = divide(values, scale) * factors
    lo = -largest if signed else 0
    codes = round_codes(z, lo, largest, rounding=rounding, generator=generator, where=where, axis=axis)
    return ShiftQuantized(codes, exponents, scale, bits, axis, groups, signed)


def check_clip(clip_ratio: float, rounding: str, where: str) -> None:
    """ValueError, naming `where`, unless a clipping ratio is one and goes with the rounding."""
    if not 0 < clip_ratio <= 1:
        raise ValueError(f"{where}: clip_ratio must be above 0 and at most 1, got {clip_ratio}")
    if clip_ratio < 1 and rounding != "nearest":
        raise ValueError(f"{where}: clip_ratio {clip_ratio} needs rounding to nearest, got {rounding!r}")


def pack_codes(codes: Tensor, bits: int, signed: bool = True) -> Tensor:
    """Packs codes into `bits` bits each, as two's complement if signed: uint8 (ceil(count * bits / 8),).

    A byte takes four codes of 2 bits or two of 4, the first in the low bits; other widths form one stream of bits, low
    bits first, that crosses the edges of bytes (8 codes take `bits` bytes).

    Args:
        codes: integers, any shape, in -2^(bits-1)..2^(bits-1) - 1, or 0..2^bits - 1 if not signed.
        bits: 2..8.

    Raises:
        ValueError: bits out of range; a code that does not fit.
    """
    check_bits(bits, "pack_codes")
    lo, hi = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if codes.numel() and not lo <= int(codes.min()) <= int(codes.max()) <= hi:
        raise ValueError(
            f"pack_codes: {bits}-bit codes must be in {lo}..{hi}, got {int(codes.min())}..{int(codes.max())}"
        )
    return _packed(codes, bits)


def _packed(codes: Tensor, bits: int) -> Tensor:
    if codes.device.type == "cpu" and codes.element_size() == 1 and codes.numel():
        return engine_codes.pack(codes, bits)
    digits = codes.reshape(-1).contiguous()
    digits = digits.view(torch.uint8) if digits.dtype == torch.int8 else (digits.to(torch.int64) & 255).to(torch.uint8)
    return pack_bits(digits & ((1 << bits) - 1), bits)


def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, ...], signed: bool = True) -> Tensor:
    """Inverse of pack_codes: `shape`, int8, or uint8 for unsigned codes of 8 bits.

    Raises:
        ValueError: bits out of range; a length that does not belong to `shape`.
    """
    check_bits(bits, "unpack_codes")
    count = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or packed.shape != ((count * bits + 7) // 8,):
        raise ValueError(
            f"unpack_codes: shape {tuple(shape)} at {bits} bits takes {(count * bits + 7) // 8} bytes, "
            f"got {tuple(packed.shape)} of {packed.dtype}"
        )
    if packed.device.type == "cpu" and count:
        made = engine_codes.unpack(packed, bits, count, signed=signed)
        return (made if bits == 8 and not signed else made.view(torch.int8)).reshape(shape)
    digits = unpack_bits(packed, bits, count)
    if signed:
        half = 1 << (bits - 1)
        digits = ((digits ^ half) - half).view(torch.int8)  # sign extension; uint8 wraps as two's complement does
    elif bits < 8:
        digits = digits.view(torch.int8)
    return digits.reshape(shape)
