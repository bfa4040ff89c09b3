"""Step-size constants against an independent numerical integration of the normal density."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitstrata.functional import nested_step, optimal_step, rectified_step, symmetric_step

X = (np.arange(200_000) + 0.5) / 200_000 * 16 - 8
P = np.exp(-0.5 * X * X)
P /= P.sum()

WEIGHTS = [
    1.595769121605729,
    0.9956866859435065,
    0.5860194414434872,
    0.33520061219993685,
    0.18813879,
    0.104063009,
    0.056867672,
    0.030762388,
]
ACTIVATIONS = [1.22400636, 0.65076971, 0.35341132, 0.19324852, 0.10548759, 0.05726128, 0.03087009, 0.01652815]


def db(signal: float, error: float) -> float:
    return 10 * math.log10(signal / error)


def symmetric_error(step: float, bits: int) -> float:
    half = 2 ** (bits - 1)
    return float((P * (X - step * (np.clip(np.floor(X / step), -half, half - 1) + 0.5)) ** 2).sum())


def nested_error(step: float, widths: tuple[int, ...], bits: int, free: bool) -> float:
    half = 2 ** (max(widths) - 1)
    source = np.clip(np.floor(X / step), -half, half - 1).astype(np.int64)
    level = (source >> (max(widths) - bits)) + 0.5
    scale = (P * X * level).sum() / (P * level * level).sum() if free else step * 2 ** (max(widths) - bits)
    return float((P * (X - scale * level) ** 2).sum())


@pytest.mark.parametrize("bits", range(1, 9))
def test_uniq_constants(bits):
    assert symmetric_step(bits) == pytest.approx(WEIGHTS[bits - 1], rel=1e-6)
    assert rectified_step(bits) == pytest.approx(ACTIVATIONS[bits - 1], rel=1e-5)


def test_one_bit_step_is_twice_the_mean_absolute_value():
    """+-D/2 is the sign times E|x| = sqrt(2/pi)."""
    assert symmetric_step(1) == pytest.approx(2 * math.sqrt(2 / math.pi), rel=1e-14)


@pytest.mark.parametrize(("bits", "expected"), [(1, 4.396), (2, 9.250), (3, 14.267), (4, 19.377)])
def test_weight_signal_to_noise(bits, expected):
    assert db(1.0, symmetric_error(symmetric_step(bits), bits)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("bits", "expected"), [(1, 5.544), (2, 11.628), (3, 17.234), (4, 22.662)])
def test_activation_signal_to_noise(bits, expected):
    """Signal: the variance of a rectified Gaussian, 1/2 - 1/(2 pi)."""
    step, relu = rectified_step(bits), np.maximum(X, 0)
    error = float((P * (relu - step * np.clip(np.round(relu / step), 0, 2**bits - 1)) ** 2).sum())
    assert db(0.5 - 0.5 / math.pi, error) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_constants_are_minima(bits):
    step = symmetric_step(bits)
    assert symmetric_error(step, bits) < min(symmetric_error(step * f, bits) for f in (0.99, 1.01))


@pytest.mark.parametrize(
    ("widths", "free", "k", "expected"),
    [
        ((1, 2, 3, 4), True, 0.30734, (4.40, 8.87, 14.23, 19.15)),
        ((1, 2, 3, 4), False, 0.28741, (3.12, 8.95, 14.26, 18.57)),
        ((2, 3, 4), True, 0.30734, (8.87, 14.23, 19.15)),
        ((1, 2, 4, 8), True, 0.02864, (4.40, 6.61, 17.62, 40.11)),
        ((1, 2, 3, 4, 5, 6, 7, 8), True, 0.02724, (4.40, 6.93, 12.22, 18.03, 23.94, 29.74, 35.04, 39.06)),
    ],
)
def test_nested_table(widths, free, k, expected):
    step = nested_step(widths, free=free)
    assert step == pytest.approx(k, rel=1e-3)
    at_table = [db(1.0, nested_error(k, widths, b, free)) for b in widths]
    found = [db(1.0, nested_error(step, widths, b, free)) for b in widths]
    assert at_table == pytest.approx(expected, abs=0.0105)
    assert found == pytest.approx(at_table, abs=0.025)  # the minimum is flat: 0.1 % of the step moves 8 bits by 0.02 dB
    assert sum(found) > sum(at_table) - 1e-3


def test_one_width_alone_is_uniq():
    for bits in (1, 3, 8):
        for free in (
            False,
            True,
        ):  # the widest width has no scale of its own
            assert nested_step((bits,), free=free, target_db=25.0) == pytest.approx(symmetric_step(bits), rel=1e-4)


def test_target_restores_the_low_widths():
    """No width asks for more than 25 dB, so 8 served bits no longer shrink the range of the narrow ones."""
    widths = (1, 2, 4, 8)
    capped, best = nested_step(widths, target_db=25.0), nested_step(widths)
    two = [db(1.0, nested_error(step, widths, 2, True)) for step in (capped, best)]
    assert two[0] > two[1] + 1.5
    assert db(1.0, nested_error(capped, widths, 8, True)) >= 25.0


@pytest.mark.parametrize("levels", [(1.0,), (0.0, 0.0), (1.0, -1.0)])
def test_levels_must_ascend(levels):
    with pytest.raises(ValueError, match=r"optimal_step: levels must be at least two ascending numbers, got \("):
        optimal_step(levels)
