"""Integer products of ShiftQuant operands: the definition, and the forms that equal it.

With channel c along the inner dimension of a product, its codes count in units of d 2^-e_c. The left-shift form
accumulates sum_c (q_c w_c) << (N_G - 1 - e_c) in units of d 2^-(N_G - 1) and loses nothing. Source: Guo, Liu et al.,
eqs. 4, 44 and 45, in left-shift form (eq. 4 shifts right, which truncates).

Accumulators are int64 here; `headroom` says up to which inner dimension int32 holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import engine_products
from .groups import check_groups
from .shiftquant import ShiftQuantized, check_bits, largest_code

INT32_MAX = 2**31 - 1
LARGEST_INT8 = 127
EXACT_FLOAT64 = 2**53


@dataclass(frozen=True)
class Headroom:
    """How much room int32 accumulators leave.

    Attributes:
        product: the largest |product| of two codes, shifted as far as it can be.
        limit: the largest inner dimension that int32 holds whatever the codes.
        fits: whether the inner dimension asked for is within it.
    """

    product: int
    limit: int
    fits: bool


def headroom(
    bits: int, groups: int = 4, inner: int = 1, *, other_bits: int | None = None, signed: bool = True
) -> Headroom:
    """The bound of an int32 accumulator: inner * largest * other's largest << (groups - 1) <= 2^31 - 1.

    Args:
        bits: of the shifted operand, 2..8; signed: whether its codes are -B..B, else 0..2^bits - 1.
        groups: N_G, 1..8; 1 for products without shifts, such as the weight gradient.
        inner: inner dimension, >= 1 (channels times taps; batch times positions for the weight gradient).
        other_bits: of the signed other operand; None for `bits`.

    Raises:
        ValueError: bits, other_bits, groups or inner out of range.
    """
    other = bits if other_bits is None else other_bits
    check_bits(bits, "headroom")
    check_bits(other, "headroom")
    check_groups(groups, "headroom")
    if inner < 1:
        raise ValueError(f"headroom: inner must be at least 1, got {inner}")
    product = largest_code(bits, signed) * largest_code(other) << (groups - 1)
    limit = INT32_MAX // product
    return Headroom(product, limit, inner <= limit)


@dataclass(frozen=True)
class ShiftSplit:
    """Which left shifts each operand of an 8-bit product can take: `first` and `second` add up to groups - 1."""

    first: int
    second: int

    def parts(self, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """Shifts of each channel, split: as much as fits into the first operand, the rest into the other's rows."""
        first = shifts.clamp(max=self.first)
        return first, shifts - first


def split_shifts(bits: int, groups: int = 4, *, other_bits: int | None = None) -> ShiftSplit:
    """How shifts of up to groups - 1 are put into 8-bit operands while they are packed, so that a plain GEMM remains.

    A b-bit operand takes 8 - b: (2^(b-1) - 1) << (8 - b) = 128 - 2^(8-b) <= 127 in int8, and (2^b - 1) << (8 - b) <=
    255 in uint8 for unsigned codes. The first operand takes what it can, the other's rows the rest.

    Args:
        bits: of the operand with the groups, 2..8. groups: N_G, 1..8. other_bits: of the other operand; None for
            `bits`.

    Raises:
        ValueError: arguments out of range; shifts that do not fit (8-bit codes in several groups, for one): order the
            inner dimension by group and shift the accumulator instead, as grouped_matmul does.
    """
    other = bits if other_bits is None else other_bits
    check_bits(bits, "split_shifts")
    check_bits(other, "split_shifts")
    check_groups(groups, "split_shifts")
    needed, room = groups - 1, (8 - bits) + (8 - other)
    if needed > room:
        raise ValueError(
            f"split_shifts: {groups} groups shift by up to {needed}, but operands of {bits} and {other} bits leave "
            f"room for {room} in 8 bits; use grouped_matmul"
        )
    first = min(needed, 8 - bits)
    return ShiftSplit(first, needed - first)


def _check(x: ShiftQuantized, other: Tensor, where: str) -> None:
    if x.codes.dim() != 2 or x.axis != 1:
        raise ValueError(
            f"{where}: x must be (rows, inner) with groups along axis 1, got {tuple(x.codes.shape)}, axis {x.axis}"
        )
    if other.dim() != 2 or other.shape[0] != x.codes.shape[1]:
        raise ValueError(f"{where}: other must be ({x.codes.shape[1]}, columns), got {tuple(other.shape)}")
    if other.is_floating_point():
        raise ValueError(f"{where}: other must hold integer codes, got {other.dtype}")


def shift_matmul(x: ShiftQuantized, other: Tensor) -> Tensor:
    """sum_c (x_nc other_cm) << (N_G - 1 - e_c), in int64: the definition (ShiftMM).

    Args:
        x: (rows, inner), groups along axis 1. other: integer codes (inner, columns).

    Returns:
        int64 (rows, columns), in units of x.scale * 2^-(N_G - 1) * (unit of other).

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(x, other, "shift_matmul")
    return (x.codes.to(torch.int64) << x.shifts()) @ other.to(torch.int64)


def float64_matmul(x: ShiftQuantized, other: Tensor) -> Tensor:
    """The same integers by a float64 GEMM, which is exact while every partial sum is below 2^53; faster than int64.

    Arguments, result, errors: as shift_matmul; also a ValueError if the codes' bound allows sums of 2^53 or more.
    """
    _check(x, other, "float64_matmul")
    shifted = x.codes.double() * torch.exp2(x.shifts().double())
    largest = int(other.abs().max()) if other.numel() else 0
    bound = x.codes.shape[1] * (x.largest << (x.groups - 1)) * largest
    if bound >= EXACT_FLOAT64:
        raise ValueError(f"float64_matmul: sums may reach {bound}, beyond the 2^53 up to which float64 is exact")
    return (shifted @ other.double()).to(torch.int64)


def group_order(exponents: Tensor, groups: int) -> tuple[Tensor, list[int]]:
    """The rearrangement that makes groups contiguous: (permutation of the channels int64, channels in each group).

    Within a group channels keep their order.
    """
    counts = torch.bincount(exponents.to(torch.int64), minlength=groups)
    return torch.argsort(exponents.to(torch.int64), stable=True), [int(c) for c in counts]


def grouped_matmul(x: ShiftQuantized, other: Tensor) -> Tensor:
    """N_G plain GEMMs on the channels of one group each, shifted and summed; equal to shift_matmul.

    Arguments, result, errors: as shift_matmul.
    """
    _check(x, other, "grouped_matmul")
    order, counts = group_order(x.exponents, x.groups)
    codes, rows = x.codes[:, order].to(torch.int64), other[order].to(torch.int64)
    total = torch.zeros(len(codes), other.shape[1], dtype=torch.int64, device=codes.device)
    begin = 0
    for e, count in enumerate(counts):
        part = codes[:, begin : begin + count] @ rows[begin : begin + count]
        total += part << (x.groups - 1 - e)
        begin += count
    return total


def absorb_shifts(x: ShiftQuantized, other: Tensor, other_bits: int) -> tuple[Tensor, Tensor]:
    """Operands with the shifts already in them: a plain 8-bit GEMM of the two is the left-shift accumulator.

    Args:
        x, other: as shift_matmul. other_bits: width of the codes in `other`, -B..B.

    Returns:
        (rows, inner) int8, or uint8 if x is unsigned; (inner, columns) int8.

    Raises:
        ValueError: as shift_matmul and split_shifts; codes of `other` beyond its width.
    """
    _check(x, other, "absorb_shifts")
    first, second = split_shifts(x.bits, x.groups, other_bits=other_bits).parts(x.shifts())
    largest = largest_code(other_bits)
    if other.numel() and int(other.to(torch.int64).abs().max()) > largest:
        raise ValueError(f"absorb_shifts: other must be codes of {other_bits} bits, -{largest}..{largest}")
    left = (x.codes.to(torch.int64) << first).to(torch.int8 if x.signed else torch.uint8)
    right = (other.to(torch.int64) << second[:, None]).to(torch.int8)
    return left, right


def absorbed_matmul(x: ShiftQuantized, other: Tensor, other_bits: int) -> Tensor:
    """The plain GEMM of absorb_shifts in int32, as a kernel computes it; equal to shift_matmul.

    Arguments, errors: as absorb_shifts; also a ValueError if the inner dimension is beyond `headroom`.

    Returns:
        int32 (rows, columns).
    """
    left, right = absorb_shifts(x, other, other_bits)
    room = headroom(x.bits, x.groups, max(left.shape[1], 1), other_bits=other_bits, signed=x.signed)
    if not room.fits:
        raise ValueError(
            f"absorbed_matmul: inner dimension {left.shape[1]} is beyond the {room.limit} that int32 accumulators hold"
        )
    return left.to(torch.int32) @ right.to(torch.int32)


def right_shift_matmul(x: ShiftQuantized, other: Tensor) -> Tensor:
    """Eq. 4 as printed: each product shifted right by e_c, which rounds it towards minus infinity; an approximation.

    Arguments, errors: as shift_matmul. Returns int64 (rows, columns) in units of x.scale * (unit of other).
    """
    _check(x, other, "right_shift_matmul")
    products = x.codes.to(torch.int64)[:, :, None] * other.to(torch.int64)[None]
    return (products >> x.exponents.to(torch.int64)[None, :, None]).sum(dim=1)


def engine_matmul(x: ShiftQuantized, other: Tensor) -> Tensor:
    """shift_matmul by the engine's kernels where int32 is proved to hold the sums and the tensors are on the CPU; else
    by float64_matmul.

    Arguments, result, errors: as float64_matmul.
    """
    _check(x, other, "engine_matmul")
    largest = int(other.abs().max()) if other.numel() else LARGEST_INT8 + 1
    if not engine_products.fits(x, other.shape[0], largest):
        return float64_matmul(x, other)
    return engine_products.matmul(x, other)


FORMS: dict[str, Callable[[ShiftQuantized, Tensor, int], Tensor]] = {
    "shift": lambda x, other, _: shift_matmul(x, other),
    "float64": lambda x, other, _: float64_matmul(x, other),
    "grouped": lambda x, other, _: grouped_matmul(x, other),
    "absorbed": lambda x, other, bits: absorbed_matmul(x, other, bits).to(torch.int64),
    "engine": lambda x, other, _: engine_matmul(x, other),
}


def check_form(form: str) -> None:
    """ValueError unless the form is known."""
    if form not in FORMS:
        raise ValueError(f"product: form must be one of {', '.join(FORMS)}, got {form!r}")


def product(form: str, x: ShiftQuantized, other: Tensor, other_bits: int) -> Tensor:
    """The left-shift accumulator in one of the forms "shift", "float64", "grouped", "absorbed", "engine": int64 (rows,
    columns).

    Raises:
        ValueError: unknown form; as the form.
    """
    check_form(form)
    return FORMS[form](x, other, other_bits)


def plain_product(form: str, g: ShiftQuantized, x: ShiftQuantized, left: Tensor, right: Tensor) -> Tensor:
    """left @ right without shifts, for the weight gradient, whose channels are all outer: int64.

    Args:
        form: "shift" and "grouped" compute in int64, "float64" by a float64 GEMM, "absorbed" in int32; "engine" as
            "float64", for what the engine does not compute.
        g, x: the operands that `left` and `right` hold codes of; their widths bound the sums.
        left: (..., rows, inner). right: (..., inner, columns).

    Raises:
        ValueError: unknown form; for "absorbed" an inner dimension that int32 does not hold.
    """
    check_form(form)
    if form in ("float64", "engine"):  # sums of 16-bit products reach 2^53 only beyond an inner dimension of 10^11
        return (left.double() @ right.double()).to(torch.int64)
    if form == "absorbed":
        limit = INT32_MAX // (g.largest * x.largest)
        if left.shape[-1] > limit:
            raise ValueError(f"plain_product: inner dimension {left.shape[-1]} is beyond the {limit} that int32 holds")
        return (left.to(torch.int32) @ right.to(torch.int32)).to(torch.int64)
    return left.to(torch.int64) @ right.to(torch.int64)


def unit(x: ShiftQuantized) -> Tensor:
    """scale * 2^-(N_G - 1), what one unit of a left-shift accumulator stands for: float64 ()."""
    return x.scale.double() * 2.0 ** (1 - x.groups)


def scaled(acc: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """float32(acc) * float32(factor), or for float64 results in float64; then `dtype`.

    Args:
        acc: integers. factor: float64, broadcastable.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (acc.to(wide) * factor.to(wide)).to(dtype)
