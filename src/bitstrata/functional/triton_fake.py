"""Fake quantization by Triton: tensors on a GPU, and, in its interpreter, on the CPU.

The grids are those of engine/include/bitstrata/fake_kernels.h, in the same operations: division and rounding to nearest
even as IEEE has them, no fused multiply-add. Importing this needs the package triton.
"""

# Triton reads annotations and globals of its functions as they stand: no `from __future__ import annotations` here; and
# it knows neither `in` nor isnan.
# ruff: noqa: PLR0124, PLR0917, PLR1714, SIM109
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fake_layout import Layout, laid_out, layout_of
from .formula import EPS, Formula, Gradients, Needs

_GRIDS = (
    "uniform", "affine", "symmetric", "nested", "vertical", "unit", "centred", "tanh", "tanh_floor", "scaled",
    "sigmoids",
)  # fmt: skip
_WITH_ADD = ("vertical", "tanh_floor", "scaled", "sigmoids")  # their rules say what is added to codes; else 1/2
UNIFORM, AFFINE, SYMMETRIC, NESTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
VERTICAL, UNIT, CENTRED, TANH = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
TANH_FLOOR, SCALED, SIGMOIDS = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)
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
    if GRID == UNIT or GRID == CENTRED:
        s = tl.abs(step)
    if GRID < TANH:
        s = tl.where(s < SMALLEST, SMALLEST, s)
    return s


@triton.jit
def _position(x, divisor, origin, GRID: tl.constexpr, NARROW: tl.constexpr):
    if GRID == AFFINE:
        x = x - origin
    u = x
    if GRID == SCALED:
        u = x * origin
    elif GRID != SIGMOIDS:
        u = tl.div_rn(x, divisor)
    if NARROW:
        u = tl.where(u != u, u, (_bfloat_up(u) & -65536).to(tl.float32, bitcast=True))
    return u


@triton.jit
def _code(u, lo, hi, power, rounded, GRID: tl.constexpr):
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
    elif GRID == UNIT or GRID == SIGMOIDS:
        code = _nearest(_limited(u, 0.0, 1.0) * hi)
    elif GRID == TANH_FLOOR:
        code = _limited(_floored(u * -lo), lo, hi)
    elif GRID == SCALED:
        code = _limited(_nearest(_limited(u * rounded, lo, hi)) * power, lo, hi)
    elif GRID == CENTRED or GRID == TANH:
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
    elif GRID == SCALED:
        first, last = lo * 0.0 - 1.0, hi * 0.0 + 1.0
    if GRID == UNIFORM or GRID == AFFINE or GRID == VERTICAL:  # with NaN
        passes = ((of <= first) | (of >= last)) == 0 if OPEN else ((of < first) | (of > last)) == 0
    else:
        passes = (of > first) & (of < last) if OPEN else (of >= first) & (of <= last)
    return passes


@triton.jit
def _falling_exp(s):
    """e^-s for |s| < 80; NaN stays."""
    turns = s * -1.44269504 + 12582912.0
    whole = turns - 12582912.0
    r = (-s - whole * 0.693359375) - whole * -2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 0.5
    p = p * (r * r) + r + 1.0
    return p * ((turns.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _slopes(x, ratios_at, count, alpha):
    """The sum of e / (1 + e)^2 with e = ratio e^((1/2 - x) / alpha), over ratios."""
    reach = 20.0 + tl.div_rn(alpha * 0.0 + 0.5, alpha)
    falling = _falling_exp(_limited(tl.div_rn(x - 0.5, alpha), -reach, reach))
    total = x * 0.0
    total = tl.where(total == total, 0.0, total)
    for m in range(0, count):
        e = falling * tl.load(ratios_at + m)
        rest = e + 1.0
        total += tl.div_rn(e, rest * rest)
    return total


@triton.jit
def _forward(
    x_at, out_at, step_at, extra_at, channels, inner, lo, hi, power, add, factor, rounded,
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
    elif GRID == TANH:
        scale = tl.div_rn(lo * 0.0 + 2.0, hi - lo)
    elif GRID == TANH_FLOOR:
        scale = tl.div_rn(lo * 0.0 + 1.0, -lo)
    elif GRID == SCALED or GRID == SIGMOIDS:
        scale = tl.div_rn(lo * 0.0 + 1.0, hi)
    origin = extra
    if GRID == SCALED:
        origin = factor
    u = _position(_load(x_at + at, mask, BF16), divisor, origin, GRID, NARROW)
    code = _code(u, lo, hi, power, rounded, GRID)
    if GRID != UNIFORM and GRID != UNIT:
        code = code + add
    _store(out_at + at, code * scale, mask, BF16)


@triton.jit
def _backward(
    g_at, x_at, out_at, sums_at, step_at, extra_at, channels, inner, lo, hi, power, slope_add, factor, rounded, gain,
    count,
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
    origin = extra
    if GRID == SCALED:
        origin = factor
    u = _position(x, divisor, origin, GRID, NARROW)
    passes = _inside(x, u, divisor, lo, hi, GRID, OPEN)
    if EVERYWHERE:
        passes = passes | (mask == mask)
    if DX:
        d_x = g
        if GRID == NESTED:
            d_x = g * tl.where(extra < SMALLEST, SMALLEST, extra)
        elif GRID == SCALED:
            d_x = g * gain
        if GRID == SIGMOIDS:
            d_x = g * (_slopes(x, extra_at, count, factor) * gain)
        elif GRID == TANH or GRID == TANH_FLOOR:
            d_x = tl.div_rn(g, divisor) * (1.0 - x * x)
        else:
            d_x = tl.where(passes, d_x, 0.0)
        _store(out_at + at, d_x, mask, BF16)
    if SUMS and (GRID == TANH or GRID == TANH_FLOOR):
        tl.store(sums_at + 2 * tl.program_id(0), tl.sum(tl.where(mask, u * g, 0.0)))
    elif SUMS:
        level = _code(u, lo, hi, power, rounded, GRID)
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
        if (GRID == UNIT or GRID == CENTRED) and not CALIBRATED:
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
    if rule.grid == "sigmoids":
        extra = _ratios(rule.hi, rule.factor).to(layout.step.device)
    bounds = float(rule.lo), float(rule.hi)
    return layout.step, extra, layout.channels, layout.inner, *bounds, power, add, rule.factor, rule.rounded


@lru_cache(maxsize=64)
def _ratios(top: int, alpha: float) -> Tensor:
    """e^((b - 1/2) / alpha) for the thresholds b of `top` sigmoids."""
    return torch.tensor([math.exp(((m - 0.5) / top - 0.5) / alpha) for m in range(1, top + 1)])


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
        *_numbers(layout, layout.rule.add if layout.rule.grid in _WITH_ADD else 0.5),
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
        rule.gain,
        rule.hi,
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
    if layout.rule.grid in ("tanh", "tanh_floor"):
        return -slopes / layout.step.view(-1)
    if layout.rule.grid in ("unit", "centred"):  # of |alpha|; 1 at 0, where the level must be able to grow
        return torch.where(layout.step.view(-1) < 0, -slopes, slopes)
    return slopes


def _extra_gradient(second: Tensor, layout: Layout) -> Tensor:
    return second * layout.step.view(-1).clamp_min(EPS) if layout.rule.grid == "nested" else second
