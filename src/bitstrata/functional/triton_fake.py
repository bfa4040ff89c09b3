"""Fake quantization by Triton: tensors on a GPU, and, in its interpreter, on the CPU.

The grids are those of engine/include/bitstrata/fake_kernels.h, in the same operations: division and rounding to nearest
even as IEEE has them, no fused multiply-add. Importing this needs the package triton.
"""

# Triton reads annotations and globals of its functions as they stand: no `from __future__ import annotations` here; and
# it knows neither `in` nor isnan.
# ruff: noqa: PLR0124, PLR0917, PLR1714, SIM109
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fake_layout import Layout, laid_out, layout_of
from .formula import EPS, Formula, Gradients, Needs

_GRIDS = ("uniform", "affine", "symmetric", "nested", "vertical", "unit", "centred")
UNIFORM, AFFINE, SYMMETRIC, NESTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
VERTICAL, UNIT, CENTRED = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
SMALLEST = tl.constexpr(EPS)
BLOCK = 1024


@triton.jit
def _load(at, mask, BF16: tl.constexpr):
    """float32; bfloat16 comes as int16."""
    x = tl.load(at, mask=mask, other=0)
    if BF16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _bfloat_up(x):
    """The upper half is x as bfloat16, rounded to nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    return bits + 0x7FFF + ((bits >> 16) & 1)


@triton.jit
def _store(at, x, mask, BF16: tl.constexpr):
    if BF16:
        half = tl.where(x != x, 0x7FC0, _bfloat_up(x) >> 16)
        tl.store(at, half.to(tl.int16), mask=mask)
    else:
        tl.store(at, x, mask=mask)


@triton.jit
def _nearest(x):
    """To nearest even with the sign of x, for |x| < 2^22: by the addition of 1.5 * 2^23."""
    bits = ((x + 12582912.0) - 12582912.0).to(tl.int32, bitcast=True)
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    return (bits | sign).to(tl.float32, bitcast=True)


@triton.jit
def _floored(x):
    """By comparison: the instruction takes the smallest numbers for 0."""
    near = _nearest(x)
    return tl.where(near > x, near - 1.0, near)


@triton.jit
def _limited(x, lo, hi):
    """NaN stays."""
    above = tl.where(x < lo, lo, x)
    return tl.where(above > hi, hi, above)


@triton.jit
def _divisor(step, GRID: tl.constexpr):
    s = step
    if GRID >= UNIT:
        s = tl.abs(step)
    return tl.where(s < SMALLEST, SMALLEST, s)


@triton.jit
def _position(x, divisor, origin, GRID: tl.constexpr, NARROW: tl.constexpr):
    if GRID == AFFINE:
        x = x - origin
    u = tl.div_rn(x, divisor)
    if NARROW:
        u = tl.where(u != u, u, (_bfloat_up(u) & -65536).to(tl.float32, bitcast=True))
    return u


@triton.jit
def _code(u, lo, hi, power, GRID: tl.constexpr):
    if GRID == SYMMETRIC:
        inside = _limited(u, lo, hi + 1.0)
        whole = _floored(inside)
        half = (whole - lo) * 0.5
        odd = (half - _floored(half)) * 2.0
        code = _limited(whole - tl.where(inside == whole, odd, 0.0), lo, hi)
    elif GRID == NESTED:
        code = _floored(tl.div_rn(_floored(_limited(u, lo, hi)), power))
    elif GRID == VERTICAL:
        code = _floored(tl.div_rn(_nearest(_limited(u, lo, hi)), power))
    elif GRID == UNIT:
        code = _nearest(_limited(u, 0.0, 1.0) * hi)
    elif GRID == CENTRED:
        code = _nearest((_limited(u, -1.0, 1.0) + 1.0) * 0.5 * (hi - lo)) + lo
    else:
        code = _nearest(_limited(u, lo, hi))
    return code


@triton.jit
def _inside(x, u, divisor, lo, hi, GRID: tl.constexpr, OPEN: tl.constexpr):
    first, last, of = lo, hi, u
    if GRID == SYMMETRIC:
        first, last = lo + 0.5, hi + 0.5
    elif GRID == NESTED:
        last = hi + 1.0
    elif GRID == UNIT:
        first, last, of = divisor * 0.0, divisor, x
    elif GRID == CENTRED:
        first, last, of = -divisor, divisor, x
    if GRID == UNIFORM or GRID == AFFINE or GRID == VERTICAL:  # with NaN
        passes = ((of <= first) | (of >= last)) == 0 if OPEN else ((of < first) | (of > last)) == 0
    else:
        passes = (of > first) & (of < last) if OPEN else (of >= first) & (of <= last)
    return passes


@triton.jit
def _forward(
    x_at, out_at, step_at, extra_at, channels, inner, lo, hi, power, add,
    GRID: tl.constexpr, BF16: tl.constexpr, NARROW: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(inner, SIZE)
    row = tl.program_id(0) // blocks
    inside_row = (tl.program_id(0) % blocks) * SIZE + tl.arange(0, SIZE)
    at, mask = row.to(tl.int64) * inner + inside_row, inside_row < inner
    channel = row % channels
    divisor = _divisor(tl.load(step_at + channel), GRID)
    extra = tl.load(extra_at + channel)
    scale = divisor
    if GRID == NESTED:
        scale = tl.where(extra < SMALLEST, SMALLEST, extra) * divisor * power
    elif GRID == VERTICAL:
        scale = divisor * power
    elif GRID == UNIT:
        scale = tl.div_rn(divisor, hi - lo)
    elif GRID == CENTRED:
        scale = tl.div_rn(divisor * 2.0, hi - lo)
    elif GRID == AFFINE:
        add = tl.div_rn(extra, divisor)
    code = _code(_position(_load(x_at + at, mask, BF16), divisor, extra, GRID, NARROW), lo, hi, power, GRID)
    if GRID != UNIFORM and GRID != UNIT:
        code = code + add
    _store(out_at + at, code * scale, mask, BF16)


@triton.jit
def _backward(
    g_at, x_at, out_at, sums_at, step_at, extra_at, channels, inner, lo, hi, power, slope_add,
    GRID: tl.constexpr, OPEN: tl.constexpr, EVERYWHERE: tl.constexpr, CALIBRATED: tl.constexpr,
    BF16: tl.constexpr, NARROW: tl.constexpr, DX: tl.constexpr, SUMS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(inner, SIZE)
    row = tl.program_id(0) // blocks
    inside_row = (tl.program_id(0) % blocks) * SIZE + tl.arange(0, SIZE)
    at, mask = row.to(tl.int64) * inner + inside_row, inside_row < inner
    channel = row % channels
    divisor = _divisor(tl.load(step_at + channel), GRID)
    extra = tl.load(extra_at + channel)
    x, g = _load(x_at + at, mask, BF16), _load(g_at + at, mask, BF16)
    u = _position(x, divisor, extra, GRID, NARROW)
    passes = _inside(x, u, divisor, lo, hi, GRID, OPEN)
    if EVERYWHERE:
        passes = passes | (mask == mask)
    if DX:
        gain = g
        if GRID == NESTED:
            gain = g * tl.where(extra < SMALLEST, SMALLEST, extra)
        _store(out_at + at, tl.where(passes, gain, 0.0), mask, BF16)
    if SUMS:
        level = _code(u, lo, hi, power, GRID)
        if GRID == SYMMETRIC:
            level = level + 0.5
        elif GRID == NESTED:
            level = (level + 0.5) * power
        elif GRID == VERTICAL:
            level = (level + slope_add) * power
        elif GRID == UNIT:
            level = tl.div_rn(level, hi)
        elif GRID == CENTRED:
            level = tl.div_rn((level + 0.5) * 2.0, hi - lo)
        slope = tl.where(passes, level - u, level)
        if GRID >= UNIT and not CALIBRATED:
            slope = tl.where(passes, 0.0, level)
        tl.store(sums_at + 2 * tl.program_id(0), tl.sum(tl.where(mask, slope * g, 0.0)))
        second = tl.where(passes, 0.0, g)
        if GRID == NESTED:
            second = level * g
        tl.store(sums_at + 2 * tl.program_id(0) + 1, tl.sum(tl.where(mask, second, 0.0)))


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _numbers(layout: Layout, add: float) -> tuple[Any, ...]:
    rule = layout.rule
    extra = layout.step if layout.extra is None else layout.extra
    power = float(2**rule.shift)
    return layout.step, extra, layout.channels, layout.inner, float(rule.lo), float(rule.hi), power, add


def _programs(layout: Layout) -> tuple[int]:
    return (layout.outer * layout.channels * triton.cdiv(layout.inner, BLOCK),)


def forward(x: Tensor, step: Tensor, extra: Tensor | None, formula: Formula) -> Tensor | None:
    """The formula's value in one pass, or None if the kernels do not do this."""
    out = torch.empty_like(x)
    dense = laid_out(x, out)
    layout = layout_of(dense, step, extra, formula)
    if layout is None:
        return None
    grid = _GRIDS.index(layout.rule.grid)
    _forward[_programs(layout)](
        _bits(dense),
        _bits(out),
        *_numbers(layout, layout.rule.add if layout.rule.grid == "vertical" else 0.5),
        GRID=grid,
        BF16=x.dtype == torch.bfloat16,
        NARROW=layout.narrow,
        SIZE=BLOCK,
        enable_fp_fusion=False,
    )
    return out


def backward(
    grad: Tensor, x: Tensor, step: Tensor, extra: Tensor | None, formula: Formula, *, needs: Needs, factor: float
) -> Gradients | None:
    """The formula's gradients in one pass, or None if the kernels do not do this."""
    out = torch.empty_like(x)
    dense = laid_out(x, out)
    layout = layout_of(dense, step, extra, formula)
    if layout is None:
        return None
    rule, programs = layout.rule, _programs(layout)
    summed = needs[1] or needs[2]
    sums = torch.empty((*programs, 2) if summed else (1, 2), device=x.device)
    _backward[programs](
        _bits(laid_out(grad, out)),
        _bits(dense),
        _bits(out),
        sums,
        *_numbers(layout, rule.slope_add),
        GRID=_GRIDS.index(rule.grid),
        OPEN=rule.open_range,
        EVERYWHERE=rule.everywhere,
        CALIBRATED=rule.calibrated,
        BF16=x.dtype == torch.bfloat16,
        NARROW=layout.narrow,
        DX=needs[0],
        SUMS=summed,
        SIZE=BLOCK,
        enable_fp_fusion=False,
    )
    total = sums.view(layout.outer, layout.channels, -1, 2).double().sum((0, 2)) * factor if summed else sums
    return (
        out if needs[0] else None,
        _step_gradient(total[:, 0], layout).to(step.dtype).view(step.shape) if needs[1] else None,
        _extra_gradient(total[:, 1], layout).float().view(step.shape) if needs[2] else None,
    )


def _step_gradient(slopes: Tensor, layout: Layout) -> Tensor:
    if layout.rule.grid == "nested" and layout.extra is not None:
        return slopes * layout.extra.view(-1).clamp_min(EPS)
    if layout.rule.grid in ("unit", "centred"):  # of |alpha|; 1 at 0, where the level must be able to grow
        return torch.where(layout.step.view(-1) < 0, -slopes, slopes)
    return slopes


def _extra_gradient(second: Tensor, layout: Layout) -> Tensor:
    return second * layout.step.view(-1).clamp_min(EPS) if layout.rule.grid == "nested" else second
