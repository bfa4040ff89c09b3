"""Choosing a width for each layer within a budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bitstrata as bs
from bitstrata.functional import allocate_widths

COUNTS, WIDTHS, ERRORS = [100, 50, 10], [2, 3, 4], [[9, 3, 0], [8, 2, 0], [5, 1, 0]]


@pytest.mark.parametrize(
    ("budget", "widths", "error", "bits"),
    [
        (400, (2, 3, 4), 11, 390),
        (480, (3, 3, 3), 6, 480),
        (540, (3, 4, 4), 3, 540),
        (600, (4, 3, 4), 2, 590),
        (640, (4, 4, 4), 0, 640),
    ],
)
def test_worked_example(budget, widths, error, bits):
    best = allocate_widths(COUNTS, WIDTHS, ERRORS, budget)
    assert (best.widths, best.error, best.bits) == (widths, error, bits)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_choice_is_better(data):
    layers = data.draw(st.integers(1, 5))
    counts = data.draw(st.lists(st.integers(1, 40), min_size=layers, max_size=layers))
    widths = sorted(data.draw(st.sets(st.integers(1, 8), min_size=1, max_size=4)))
    row = st.lists(st.integers(0, 30), min_size=len(widths), max_size=len(widths))
    errors = data.draw(st.lists(row, min_size=layers, max_size=layers))
    budget = data.draw(st.integers(sum(counts) * widths[0], sum(counts) * widths[-1] + 5))
    best = allocate_widths(counts, widths, errors, budget)
    assert best.bits == sum(c * w for c, w in zip(counts, best.widths, strict=True)) <= budget
    assert best.error == sum(errors[i][widths.index(w)] for i, w in enumerate(best.widths))
    for choice in itertools.product(range(len(widths)), repeat=layers):
        bits = sum(c * widths[i] for c, i in zip(counts, choice, strict=True))
        error = sum(row[i] for row, i in zip(errors, choice, strict=True))
        assert bits > budget or (error, bits) >= (best.error, best.bits)


def test_many_layers():
    counts = [9 * 16 * (1 + i % 7) for i in range(60)]
    errors = [[100.0 + i, 10.0 + i % 5, 1.0 + i % 3, 0.0] for i in range(60)]
    budget = int(sum(counts) * 2.5)
    best = allocate_widths(counts, [1, 2, 3, 4], errors, budget)
    assert best.bits <= budget
    assert set(best.widths) > {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((COUNTS, WIDTHS, ERRORS, 319), r"budget 319 is below the 320 bits of all layers at 2 bits"),
        (([], WIDTHS, [], 10), r"counts must be positive and widths positive and ascending, got \[\]"),
        ((COUNTS, [3, 2], ERRORS, 500), r"got \[100, 50, 10\] and \[3, 2\]"),
        (([1, 0], [2], [[0], [0]], 5), r"counts must be positive"),
        ((COUNTS, WIDTHS, ERRORS[:2], 500), r"errors must be 3 rows of 3 numbers"),
        (([1], [2], [[float("nan")]], 5), r"errors must be finite"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate_widths(*arguments)


def test_a_model_gets_the_map_of_least_error():
    torch.manual_seed(0)
    model = bs.zoo.create("digits_cnn", width=4)
    x = torch.rand(4, 1, 8, 8)
    bs.quantize_(model, bs.recipes.vertical(), x)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, bs.nn.QuantizedLayer)}
    inner = [n for n, m in layers.items() if not m.edge]
    total = sum(layers[n].weight.numel() for n in inner)
    assert bs.mixed_precision_map(model, 4 * total) == dict.fromkeys(layers, 4)
    assert bs.mixed_precision_map(model, 2 * total) == {n: 2 if n in inner else 4 for n in layers}
    chosen = bs.mixed_precision_map(model, 3 * total)
    assert sum(layers[n].weight.numel() * chosen[n] for n in inner) <= 3 * total
    with pytest.raises(ValueError, match=r"budget .* is below"):
        bs.mixed_precision_map(model, total)
    one = bs.quantize_(bs.zoo.create("digits_cnn", width=4), bs.recipes.lsq(4), x)
    with pytest.raises(ValueError, match=r"must be quantized for several precisions, it has \(4,\)"):
        bs.mixed_precision_map(one, 10**6)
