"""Uniform grids with a learned offset (LSQ+), and the search for their best step and offset.

Source: Bhalgat et al., "LSQ+: improving low-bit quantization through learnable offsets and better initialization",
eqs. 5 to 8 and section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .fake_quantize import fake_quantize
from .formula import Formula, Gradients, Needs, Rule, positive, register_formula
from .reduce import sum_to

SAMPLE = 65_536  # elements that the search looks at
SHRINK = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08)  # of the way from the mean to the smallest and largest element
ROUNDS = 60  # the error falls each round, and has long settled by then


def affine_codes(x: Tensor, step: Tensor, beta: Tensor, hi: int) -> Tensor:
    """round_half_even(clip((x - beta)/s, 0, hi)), in the floating dtype of x or of the step, the wider.

    Args:
        x: any shape, floating.
        step, beta: one element each; steps below 1e-8 count as 1e-8.
        hi: largest code, the smallest is 0.
    """
    return _position(x, step, beta).clamp_(0, hi).round_()


def _single(beta: Tensor) -> Tensor:
    """beta as 0-d, so that the result has x's shape whatever it is."""
    return beta.reshape(()) if beta.numel() == 1 else beta


def _position(x: Tensor, step: Tensor, beta: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, step.dtype))
    return wide.sub(_single(beta)).div_(positive(step))


@register_formula
@dataclass(frozen=True)
class Affine(Formula):
    """value = s * (code + beta/s), code = round(clip((x - beta)/s, 0, hi)). G = dL/dvalue, bounds count as inside.

    Inside: dx = G, ds = g G (code - (x - beta)/s), dbeta = 0. Outside: dx = 0, ds = g G code, dbeta = g G.
    """

    hi: int

    name = "affine"
    takes_extra = True

    def value(self, x: Tensor, step: Tensor, extra: Tensor | None) -> Tensor:
        assert extra is not None
        s = positive(step)
        return affine_codes(x, step, extra, self.hi).add_(_single(extra) / s).mul_(s).to(x.dtype)

    def gradients(
        self, grad: Tensor, x: Tensor, step: Tensor, extra: Tensor | None, *, needs: Needs, factor: float
    ) -> Gradients:
        assert extra is not None
        u = _position(x, step, extra)
        outside = (u < 0) | (u > self.hi)
        grad_x = grad.masked_fill(outside, 0.0) if needs[0] else None
        grad_step = grad_extra = None
        if needs[1]:
            terms = u.clamp(0, self.hi).round_().sub_(u.masked_fill(outside, 0.0)).mul_(grad)
            grad_step = sum_to(terms, step.shape).mul_(factor).to(step.dtype)
        if needs[2]:
            grad_extra = sum_to(grad.masked_fill(~outside, 0.0), extra.shape).mul_(factor).to(extra.dtype)
        return grad_x, grad_step, grad_extra

    def rule(self) -> Rule:
        return Rule("affine", 0, self.hi)


def affine_fake_quantize(x: Tensor, step: Tensor, beta: Tensor, hi: int, *, grad_scale: float = 1.0) -> Tensor:
    """Fake-quantize onto beta + step * {0..hi} with the straight-through estimator (LSQ+ eqs. 5-8).

    The value is computed as step * (code + beta/step).

    Args:
        x: any shape, floating; the result has its shape and dtype.
        step, beta: one element each; get gradients multiplied by `grad_scale`.
        hi: largest code.
        grad_scale: factor on the gradients of step and beta only.
    """
    return fake_quantize(x, step, beta, Affine(hi), grad_scale=grad_scale)


def sampled(x: Tensor, limit: int = SAMPLE) -> Tensor:
    """At most `limit` elements of x, evenly spread, flat; the stride shares no factor with the number of elements."""
    flat = x.reshape(-1)
    stride = -(-flat.numel() // limit)
    while stride > 1 and math.gcd(stride, flat.numel()) > 1:  # else it would see the same columns of every row
        stride += 1
    return flat[::stride] if stride > 1 else flat


def best_affine(x: Tensor, hi: int) -> tuple[float, float]:
    """Step s > 0 and offset beta that minimise sum (x - s * code - beta)^2, codes in 0..hi (LSQ+ section 3.2, eq. 10).

    Lloyd's alternation from 64 ranges, each end at 8 distances between the mean and the extreme: codes by (s, beta),
    then s and beta by linear least squares for these codes; the best end point wins. Deterministic; the elements are
    sorted once, so that a round costs only the borders of the cells.

    Args:
        x: any shape, floating, finite and not empty; beyond 65 536 elements, evenly spread ones stand for all.
        hi: largest code, at least 1.

    Returns:
        (s, beta); for elements that are all alike, the grid from 0 to their value, and (0, 0) if that is 0.
    """
    ordered = sampled(x.detach()).double().sort().values
    low, high = float(ordered[0]), float(ordered[-1])
    if low == high:
        return abs(low) / hi, min(low, 0.0)
    unit = high - low  # in units of the range, centred, the least squares stay well conditioned at any magnitude
    centre = float(ordered.mean())
    y = (ordered - centre) / unit
    shrink = y.new_tensor(SHRINK)
    bottom, top = (y[0] * shrink).repeat_interleave(len(SHRINK)), (y[-1] * shrink).repeat(len(SHRINK))
    step, beta = _alternate(y, (top - bottom) / hi, bottom, hi)
    return step * unit, beta * unit + centre


def _alternate(y: Tensor, step: Tensor, beta: Tensor, hi: int) -> tuple[float, float]:
    """The best (step, beta) that the alternation reaches from the given starts, (starts,) each; y is sorted."""
    count = y.numel()
    prefix = torch.cat([y.new_zeros(1), y.cumsum(0)])
    codes = torch.arange(hi + 1, dtype=y.dtype, device=y.device)
    total, power = float(prefix[-1]), float(y.square().sum())
    error = y.new_full(step.shape, math.inf)
    for _ in range(ROUNDS):
        borders = beta.unsqueeze(1) + step.unsqueeze(1) * (codes[1:] - 0.5)
        cut = torch.searchsorted(y, borders)
        ends = torch.nn.functional.pad(torch.nn.functional.pad(cut, (1, 0), value=0), (0, 1), value=count)
        sizes, sums = ends.diff(dim=1).to(y.dtype), prefix[ends].diff(dim=1)
        c, cc, yc = (sizes * codes).sum(1), (sizes * codes * codes).sum(1), (sums * codes).sum(1)
        spread = count * cc - c * c
        slope = (count * yc - c * total) / spread.clamp_min(1.0)
        moved = (spread > 0) & (slope > 0)  # all elements in one cell say nothing of the step
        step, beta = slope.where(moved, step), ((total - slope * c) / count).where(moved, beta)
        now = power - 2 * step * yc - 2 * beta * total + step**2 * cc + 2 * step * beta * c + count * beta**2
        if bool((now >= error * (1 - 1e-9)).all()):
            break
        error = now
    winner = int(error.argmin())
    return float(step[winner]), float(beta[winner])
