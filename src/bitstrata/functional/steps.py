"""MSE-optimal step sizes for Gaussian weights and rectified-Gaussian activations, computed in closed form.

UniQ section 4.2 fixes the initial step to the minimiser of E(x - Q(x))^2; the integrals over a cell have closed forms
in the normal density and distribution, and at the optimum step = sum k_i m_i / sum k_i^2 p_i (p_i, m_i: a cell's
probability and first moment), because moving the cell borders, which lie midway between levels, costs nothing to first
order.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _density(x: Array) -> Array:
    return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _distribution(x: Array) -> Array:
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])


def _cell_moments(borders: Array) -> tuple[Array, Array]:
    """Probability and first moment of N(0,1) in each cell between consecutive borders."""
    return np.diff(_distribution(borders)), -np.diff(_density(borders))


def _slope(step: float, levels: Array, lower: float) -> float:
    """Minus half the derivative of the mean squared error by the step; positive below the optimum."""
    inner = (levels[:-1] + levels[1:]) / 2 * step
    probability, moment = _cell_moments(np.concatenate(([lower], np.maximum(inner, lower), [np.inf])))
    return float((levels * (moment - levels * step * probability)).sum())


@lru_cache(maxsize=256)
def optimal_step(levels: tuple[float, ...], *, rectified: bool = False) -> float:
    """Step that minimises E(x - step * nearest level)^2.

    Args:
        levels: ascending multiples of the step that the grid holds, e.g. (-1.5, -.5, .5, 1.5) or (0, 1, 2, 3).
        rectified: x is the positive half of N(0,1) (an activation after ReLU) instead of all of N(0,1).

    Raises:
        ValueError: fewer than two levels, or not ascending.
    """
    k = np.array(levels, dtype=np.float64)
    if k.size < 2 or not (np.diff(k) > 0).all():
        raise ValueError(f"optimal_step: levels must be at least two ascending numbers, got {levels}")
    lower = 0.0 if rectified else -np.inf
    low, high = 1e-4, 4.0
    for _ in range(200):  # bisection to the last bit; the slope changes sign once
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if _slope(middle, k, lower) > 0 else (low, middle)
    return 0.5 * (low + high)


def symmetric_step(bits: int) -> float:
    """UniQ's weight constant c_w(b): optimal step of the symmetric grid without zero on N(0,1) (Table 1)."""
    half = 2 ** (bits - 1)
    return optimal_step(tuple(c + 0.5 for c in range(-half, half)))


def rectified_step(bits: int) -> float:
    """UniQ's activation constant c_a(b): optimal step of {0..2^b - 1} on the positive half of N(0,1) (Table 1)."""
    return optimal_step(tuple(float(c) for c in range(2**bits)), rectified=True)


def _gaussian_error(step: float, levels: Array, lower: float) -> float:
    """E(x - step * nearest level)^2 for x ~ N(0,1) above `lower`, -inf or 0; below it x counts nothing."""
    inner = (levels[:-1] + levels[1:]) / 2 * step
    probability, moment = _cell_moments(np.concatenate(([lower], inner, [np.inf])))
    power = 1.0 if lower < 0 else 0.5
    return float(power + (levels * step * (levels * step * probability - 2 * moment)).sum())


def _checked_bits(operation: str, bits: int) -> int:
    if not 1 <= bits <= 8:
        raise ValueError(f"{operation}: bits must be 1..8, got {bits}")
    return bits


def symmetric_sqnr_db(bits: int) -> float:
    """Signal-to-noise ratio of UniQ's weight grid at its optimal step on N(0,1): 10 log10(1/MSE), dB (UniQ Table 1).

    Raises:
        ValueError: bits outside 1..8.
    """
    half = 2 ** (_checked_bits("symmetric_sqnr_db", bits) - 1)
    levels = np.arange(-half, half) + 0.5
    return -10 * math.log10(_gaussian_error(symmetric_step(bits), levels, -np.inf))


def rectified_sqnr_db(bits: int) -> float:
    """Signal-to-noise ratio of UniQ's activation grid at its optimal step: 10 log10(Var(relu(z))/MSE), dB (Table 1).

    z ~ N(0,1). The signal is the variance of relu(z), 1/2 - 1/(2 pi), not its power 1/2: that is what the table's
    numbers are.

    Raises:
        ValueError: bits outside 1..8.
    """
    levels = np.arange(2 ** _checked_bits("rectified_sqnr_db", bits), dtype=np.float64)
    variance = 0.5 - 0.5 / math.pi
    return 10 * math.log10(variance / _gaussian_error(rectified_step(bits), levels, 0.0))


def _nested_errors(step: float, bits: tuple[int, ...], free: bool) -> Array:
    """Mean squared error on N(0,1) of the nested grid at each width, for one source step."""
    source = max(bits)
    half = 2 ** (source - 1)
    codes = np.arange(-half, half)
    borders = np.concatenate(([-np.inf], codes[1:] * step, [np.inf]))
    probability, moment = _cell_moments(borders)
    errors = []
    for b in bits:
        level = np.floor_divide(codes, 2 ** (source - b)) + 0.5
        cross, power = float((level * moment).sum()), float((level * level * probability).sum())
        scale = cross / power if free else step * 2.0 ** (source - b)
        errors.append(1.0 - 2.0 * scale * cross + scale * scale * power)
    return np.array(errors)


@lru_cache(maxsize=64)
def nested_step(bits: tuple[int, ...], *, free: bool = True, target_db: float | None = None) -> float:
    """Source step k(B), in standard deviations, of the nested grid that serves all of `bits`.

    Minimises the sum over widths of log(MSE_b / MSE of UniQ's own grid at b bits). A single width has UniQ's own step:
    its scale is the source step, and never free.

    Args:
        bits: served widths, ascending, within 1..8.
        free: each width has its own best scale (else the scales are tied, 2^(n-b) times the source step).
        target_db: signal-to-noise ratio beyond which a width gains nothing; None asks every width for its best.
    """
    if len(bits) == 1:
        return symmetric_step(bits[0])
    floor = 0.0 if target_db is None else 10 ** (-target_db / 10)
    dedicated = np.array([_nested_errors(symmetric_step(b), (b,), False)[0] for b in bits])
    target = np.maximum(dedicated, floor)

    def cost(log_step: float) -> float:
        errors = _nested_errors(math.exp(log_step), bits, free)
        return float(np.log(np.maximum(errors, target) / target).sum())

    grid = np.linspace(math.log(0.003), math.log(2.5), 240)
    best = min(grid, key=cost)
    low, high = best - 0.05, best + 0.05
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):  # golden section
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if cost(a) < cost(b) else (a, high)
    return math.exp(0.5 * (low + high))
