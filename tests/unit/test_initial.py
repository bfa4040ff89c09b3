"""Rules for initial steps: each against its formula, each changing the result, and what they refuse."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from bitstrata.functional.steps import optimal_step, rectified_step, symmetric_step
from bitstrata.quantizers import build
from bitstrata.quantizers.initial import (
    ACTIVATION_RULES,
    SMALLEST,
    WEIGHT_RULES,
    activation_statistic,
    activation_step,
    check_rule,
    deviation,
    weight_step,
)

ROWS = [[0.3, -0.1, 0.5, -0.7, 0.2, 0.0], [-3.0, 1.0, 2.0, 4.0, -8.0, 0.5]]
TENSOR = torch.tensor(ROWS, dtype=torch.float64)


def mean_magnitude(row: list[float]) -> float:
    return sum(map(abs, row)) / len(row)


def three_sigma(row: list[float]) -> float:
    mean, spread = statistics.mean(row), 3 * statistics.stdev(row)
    return max(abs(mean - spread), abs(mean + spread))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("mse", lambda row: optimal_step(tuple(float(c) for c in range(-4, 4))) * statistics.stdev(row)),
        ("lsq", lambda row: 2 * mean_magnitude(row) / math.sqrt(3)),
        ("minmax", lambda row: max(map(abs, row)) / 3),
        ("vertical", lambda row: 2 * mean_magnitude(row) / math.sqrt(7)),
        ("three_sigma", lambda row: three_sigma(row) / 4),
        (0.37, lambda row: 0.37),
        (2, lambda row: 2.0),
    ],
)
def test_weight_rules(rule, expected):
    found = weight_step(rule, TENSOR, -4, 3)
    assert found.shape == (2,)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([expected(row) for row in ROWS], rel=1e-12)


def test_weight_rules_follow_the_levels():
    """A grid at half steps has other levels: the optimal step and the largest level change with it."""
    assert weight_step("mse", TENSOR, -4, 3, 0.5)[0].item() == pytest.approx(
        symmetric_step(3) * statistics.stdev(ROWS[0]), rel=1e-12
    )
    assert weight_step("minmax", TENSOR, -4, 3, 0.5).tolist() == pytest.approx([0.7 / 3.5, 8 / 3.5])
    assert weight_step("minmax", TENSOR, -1, 0, 0.5).tolist() == pytest.approx([1.4, 16.0])  # levels -1/2, 1/2
    assert weight_step("three_sigma", TENSOR, -1, 0, 0.5).tolist() == pytest.approx([three_sigma(r) for r in ROWS])


def test_weight_rules_worked_examples():
    """LSQ+ section 3.2 at 4 bits; LSQ section 2.1 at 2 bits."""
    assert weight_step("three_sigma", TENSOR[:1], -8, 7).item() == pytest.approx(0.16089095, abs=1e-8)
    v = torch.tensor([[-3, -0.9, -0.4, 0.1, 0.3, 0.8, 1.4]], dtype=torch.float64)
    assert weight_step("lsq", v, -2, 1).item() == pytest.approx(1.97142857, abs=1e-8)


@pytest.mark.parametrize("name", ["lsq", "uniq", "lsq_plus"])
def test_each_rule_changes_a_quantizers_step(name):
    steps = []
    for rule in (*WEIGHT_RULES, 0.123):
        quantizer = build(name, "weight", {"init": rule}, bits={3: 3}).double()
        quantizer.init_(TENSOR)
        steps.append(round(quantizer.step.item(), 9))
    assert len(set(steps)) == len(WEIGHT_RULES) + 1


@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_degenerate_weights(rule):
    zeros = weight_step(rule, torch.zeros(2, 5), -2, 1)
    assert zeros.tolist() == pytest.approx([SMALLEST] * 2)
    alike = weight_step(rule, torch.full((1, 9), 1 / 9), -2, 1)
    assert 0.01 < alike.item() < 1
    alone = weight_step(rule, torch.tensor([[0.5]]), -2, 1)
    assert 0.01 < alone.item() < 2


def test_deviation():
    assert deviation(TENSOR).tolist() == pytest.approx([statistics.stdev(row) for row in ROWS])
    assert deviation(TENSOR)[0].item() == pytest.approx(0.41793141, abs=1e-8)
    assert deviation(torch.tensor([[2.0, 2.0], [1e4, 1e4 + 1]])).tolist() == pytest.approx([2.0, 1e4], rel=1e-3)
    assert deviation(torch.tensor([[-3.0], [0.0]])).tolist() == [3.0, 0.0]


# ---- activations

X = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.5, 5.5]], dtype=torch.float64)
POWER = (1 + 4 + 9 + 0.25 + 30.25) / 8


def step_of(rule: str | float, x: Tensor, lo: int, hi: int) -> float:
    return activation_step(rule, activation_statistic(rule, x, lo < 0), lo, hi).item()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("mse", rectified_step(2) * math.sqrt(2 * POWER)),
        ("lsq", 2 * 1.5 / math.sqrt(3)),
        ("minmax", 5.5 / 3),
        ("paper_bits", 5.5 / 7),  # 2^(b+1) - 1 at two bits
        (0.37, 0.37),
    ],
)
def test_activation_rules(rule, expected):
    assert step_of(rule, X, 0, 3) == pytest.approx(expected, rel=1e-12)


def test_signed_activation_rules():
    x = X - 1
    power = float(x.square().mean())
    gaussian = optimal_step(tuple(float(c) for c in range(-4, 4)))
    assert step_of("mse", x, -4, 3) == pytest.approx(gaussian * math.sqrt(power), rel=1e-12)
    assert step_of("lsq", x, -4, 3) == pytest.approx(2 * float(x.abs().mean()) / math.sqrt(3))
    assert step_of("minmax", x, -4, 3) == pytest.approx(4.5 / 3)
    assert step_of("paper_bits", x, -4, 3) == pytest.approx(4.5 / 7)


@pytest.mark.parametrize("name", ["lsq", "uniq"])
def test_each_rule_changes_an_activation_step(name):
    steps = []
    for rule in (*ACTIVATION_RULES, 0.123):
        quantizer = build(name, "activation", {"init": rule}, bits={2: 2})
        quantizer(X.float())
        steps.append(round(quantizer.step.item(), 6))
    assert len(set(steps)) == len(ACTIVATION_RULES) + 1


def test_a_number_needs_no_data():
    quantizer = build("uniq", "activation", {"init": 0.25}, bits={1: 1, 4: 4}).eval()
    for p in (1, 4):
        quantizer.precision = p
        assert quantizer(torch.tensor([[0.3]])).item() == 0.25
        quantizer.observing = True
        quantizer(torch.tensor([[99.0]]))
        assert quantizer.step.item() == 0.25
        quantizer.observing = False


# ---- errors


@pytest.mark.parametrize("rule", ["best", "", 0, 0.0, -1.0, True, False, None, math.nan])
def test_unknown_rules(rule):
    text = r"Owner: init must be one of mse, lsq or a positive step, got "
    with pytest.raises(ValueError, match=text):
        check_rule("Owner", rule, ("mse", "lsq"))


def test_rules_of_the_other_role():
    with pytest.raises(ValueError, match=r"weight_step: init must be one of mse, .* got 'paper_bits'"):
        weight_step("paper_bits", TENSOR, -2, 1)
    with pytest.raises(ValueError, match=r"LSQActivation: init must be one of mse, .* got 'three_sigma'"):
        build("lsq", "activation", {"init": "three_sigma"}, bits={2: 2})
    with pytest.raises(ValueError, match=r"LSQWeight: init must be one of mse, .* got 'paper_bits'"):
        build("lsq", "weight", {"init": "paper_bits"}, bits={2: 2})


def test_lsq_is_undefined_at_one_bit():
    with pytest.raises(ValueError, match=r"init='lsq' divides by sqrt\(Q_P\), which is 0 at 1 bit; use 'mse'"):
        weight_step("lsq", TENSOR, -1, 0, 0.5)


def test_numbers_become_floats():
    assert check_rule("Owner", 2, ()) == 2.0
    assert isinstance(check_rule("Owner", 2, ()), float)
    assert check_rule("Owner", "mse", ("mse",)) == "mse"
