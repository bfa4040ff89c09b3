"""The shortest vector of a convex hull: worked examples, exact pairs, and optimality against other points."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitstrata.objectives import min_norm_point


def vectors(*rows: tuple[float, ...]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def square(rows: list[Tensor], alpha: Tensor) -> float:
    return float((alpha @ torch.stack(rows).double()).square().sum())


@pytest.mark.parametrize(
    ("rows", "alpha", "norm"),
    [
        (((1, 0, 0), (0, 1, 0), (0, 0, 1)), (1 / 3, 1 / 3, 1 / 3), 1 / 3),
        (((2, 0), (0, 1), (1, 1)), (0.2, 0.8, 0), 0.8),
        (((3, 1), (-1, 2), (1, -1)), (0, 5 / 13, 8 / 13), 1 / 13),
        (((1, 0), (2, 0), (3, 0)), (1, 0, 0), 1),
    ],
)
def test_worked_examples(rows, alpha, norm):
    g = vectors(*rows)
    found = min_norm_point(g)
    assert found.tolist() == pytest.approx(alpha, abs=1e-9)
    assert square(g, found) == pytest.approx(norm, abs=1e-9)
    stacked = torch.stack(g)
    assert torch.equal(min_norm_point(gram=stacked @ stacked.T), found)


def test_ends_of_a_segment_are_exact():
    assert min_norm_point(vectors((1, 0), (2, 0), (3, 0))).tolist() == [1.0, 0.0, 0.0]
    assert min_norm_point(vectors((5, 5), (1, 0))).tolist() == [0.0, 1.0]


def test_one_vector_equal_vectors_and_zeros():
    assert min_norm_point(vectors((3, 4))).tolist() == [1.0]
    assert min_norm_point(vectors((0, 0), (3, 4))).tolist() == [1.0, 0.0]
    for rows in (((2, 1), (2, 1), (2, 1)), ((0, 0), (0, 0))):
        found = min_norm_point(vectors(*rows))
        assert float(found.sum()) == pytest.approx(1)
        assert bool((found >= 0).all())


def test_opposite_vectors_meet_at_zero():
    found = min_norm_point(vectors((2, 0), (-1, 0)))
    assert found.tolist() == pytest.approx([1 / 3, 2 / 3])


def test_tensors_of_any_shape_and_dtype():
    rows = [torch.ones(2, 2), -torch.ones(2, 2)]
    assert min_norm_point([r.bfloat16() for r in rows]).tolist() == pytest.approx([0.5, 0.5])


def exact(gram: Tensor) -> float:
    """Smallest square norm by solving for every possible set of vectors with positive factors."""
    count, best = len(gram), float("inf")
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            part = gram[list(chosen)][:, list(chosen)]
            system = torch.zeros(size + 1, size + 1, dtype=torch.float64)
            system[:size, :size], system[:size, size], system[size, :size] = 2 * part, 1, 1
            right = torch.zeros(size + 1, dtype=torch.float64)
            right[size] = 1
            alpha = torch.linalg.lstsq(system, right.unsqueeze(1), driver="gelsd").solution[:size, 0]
            if bool((alpha >= -1e-12).all()) and abs(float(alpha.sum()) - 1) < 1e-8:
                best = min(best, float(alpha @ part @ alpha))
    return best


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 10_000), st.floats(0, 3))
def test_no_other_point_is_shorter(count, size, seed, shift):
    generator = torch.Generator().manual_seed(seed)
    rows = list(torch.randn(count, size, generator=generator, dtype=torch.float64) + shift)
    alpha = min_norm_point(rows)
    assert bool((alpha >= 0).all())
    assert float(alpha.sum()) == pytest.approx(1, abs=1e-12)
    found = square(rows, alpha)
    slack = 5e-3 * max(float(r.square().sum()) for r in rows)  # Frank-Wolfe comes near like 1/iterations
    stacked = torch.stack(rows)
    assert found <= exact(stacked @ stacked.T) + slack
    assert found <= min(float(r.square().sum()) for r in rows) + 1e-12
    points = torch.rand(200, count, generator=generator, dtype=torch.float64).pow(3)
    for point in points / points.sum(1, keepdim=True):
        assert found <= square(rows, point) + slack


def test_more_iterations_come_nearer():
    generator = torch.Generator().manual_seed(5)
    rows = list(torch.randn(5, 8, generator=generator, dtype=torch.float64))
    norms = [square(rows, min_norm_point(rows, iterations=n, tolerance=0)) for n in (0, 5, 50, 2000)]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > norms[-1]
    stacked = torch.stack(rows)
    assert norms[-1] == pytest.approx(exact(stacked @ stacked.T), abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"^min_norm_point: give either vectors or gram$"),
        ({"vectors": [torch.ones(1)], "gram": torch.ones(1, 1)}, r"^min_norm_point: give either vectors or gram$"),
        ({"vectors": []}, r"vectors must be one or more of one shape, got shapes \[\]$"),
        ({"vectors": [torch.ones(2), torch.ones(3)]}, r"of one shape, got shapes \[\(2,\), \(3,\)\]$"),
        ({"gram": torch.ones(2, 3)}, r"gram must be \(n, n\) with n >= 1, got \(2, 3\)$"),
        ({"gram": torch.full((2, 2), float("nan"))}, r"inner products are not finite$"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        min_norm_point(**arguments)
