"""Codes that are 0 or a power of two: few bits for tensors with many small and few large elements, as gradients are.

Source: Chmiel, Banner, Hoffer, Ben Yaacov and Soudry, "Accurate neural training with 4-bit matrix multiplications at
standard formats" (2023): logarithmic unbiased quantization. Here on integers: a code of b bits is multiplied as one of
at most 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import engine_codes
from .rounding import RESOLUTION, CounterGenerator, check_rounding
from .shiftquant import ShiftQuantized, check_axis, divide, scale_of, working

WIDEST = 4  # bits: 2^6 is the largest power in 8


def check_powers(bits: int, where: str) -> None:
    """ValueError, naming `where`, unless codes of so many bits can be powers of two."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= WIDEST:
        raise ValueError(f"{where}: codes that are powers of two have 2..{WIDEST} bits, got {bits!r}")


def largest_power(bits: int) -> int:
    """The largest of the 2^(b-1) - 1 powers 1, 2, 4... that a code of b bits, with sign and 0, tells apart."""
    return 1 << ((1 << (bits - 1)) - 2)


def product_bits(bits: int) -> int:
    """Bits of the integers that codes of b bits are multiplied as."""
    return largest_power(bits).bit_length() + 1


def power_quantize(
    x: Tensor, bits: int, axis: int = 1, *, rounding: str = "nearest", generator: CounterGenerator | None = None
) -> ShiftQuantized:
    """Codes in 0, +-1, +-2, +-4 ... +-B, with one scale d = max |x| / B, B = `largest_power(bits)`.

    Between two powers, and between 0 and 1, the upper one is drawn with the probability that makes the mean that of
    x / d, to within 2^-16 of their distance; or, to nearest, it is taken from the middle on. x / d is in float32.

    Args:
        x: floating, any shape, finite, not empty.
        bits: b, 2..4.
        axis: the dimension of the channels; all have the exponent 0.
        rounding: "nearest" or "stochastic" (one stream of `generator`, in the order of `shift_quantize`).

    Returns:
        Codes in one group, of `product_bits(bits)` bits.

    Raises:
        ValueError: bits, axis or rounding out of range; x not floating, empty, NaN or infinite.
    """
    where = "power_quantize"
    check_powers(bits, where)
    axis = check_axis(axis, x.dim(), where)
    check_rounding(rounding, generator, where)
    if engine_codes.takes(x):
        noise = engine_codes.noise_of(rounding, generator)
        codes, exponents, scale = engine_codes.shift_codes(x, bits, 1, axis, noise, powers=True)
        if not bool(scale.isnan()):
            return ShiftQuantized(codes, exponents, scale, product_bits(bits), axis, 1)
    return power_quantize_reference(x, bits, axis, rounding=rounding, generator=generator)


def power_quantize_reference(
    x: Tensor, bits: int, axis: int = 1, *, rounding: str = "nearest", generator: CounterGenerator | None = None
) -> ShiftQuantized:
    """The definition of `power_quantize` in torch, which computes it where the engine's kernels do not apply.

    The mantissa of a float, as an integer, is how far it is from a power of two to the next: noise is added to it, and
    a carry raises the exponent.
    """
    where = "power_quantize"
    values = working(x, where)
    scale = scale_of(values.abs().amax(), largest_power(bits), where)
    z = divide(values, scale).to(torch.float32).movedim(axis, -1)
    size = z.abs()
    if rounding == "stochastic" and generator is not None:
        noise = (generator.uniform(size.shape, size.device) * RESOLUTION).to(torch.int64)
    else:
        noise = torch.full(size.shape, RESOLUTION // 2, dtype=torch.int64, device=size.device)
    exponent = (size.contiguous().view(torch.int32).to(torch.int64) + (noise << 7) >> 23) - 127
    few = (size.clamp(max=1) * RESOLUTION).to(torch.int64) + noise >> 16
    power = torch.where(size < 1, few, 1 << exponent.clamp(min=0)).clamp_(max=largest_power(bits))
    codes = torch.where(z < 0, -power, power).to(torch.int8).movedim(-1, axis)
    exponents = torch.zeros(x.shape[axis], dtype=torch.uint8, device=x.device)
    return ShiftQuantized(codes, exponents, scale, product_bits(bits), axis, 1)


def power_variance(x: Tensor, bits: int) -> float:
    """The variance that stochastic rounding to powers of two adds to x: sum (|x| - a) (b - |x|), a, b the neighbours.

    It is at most 1/8 of x^2 where |x| is at least max |x| / B. Closed form, in float64.

    Args:
        x: floating, any shape, finite, not empty.
        bits: 2..4.

    Raises:
        ValueError: bits out of range; x not floating, empty, NaN or infinite.
    """
    where = "power_variance"
    check_powers(bits, where)
    values = working(x, where).double()
    scale = scale_of(values.abs().amax(), largest_power(bits), where).double()
    z = divide(values, scale).abs().clamp_(max=largest_power(bits))
    below = torch.where(z < 1, 0.0, torch.exp2(z.clamp(min=1).log2().floor()))
    above = below + below.clamp(min=1)
    return float(scale.square() * ((z - below) * (above - z)).sum())
