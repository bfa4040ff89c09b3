"""Which width for which layer: the multiple-choice knapsack, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Allocation:
    """The best choice. widths: of each layer. error: their sum. bits: what they take of the budget."""

    widths: tuple[int, ...]
    error: float
    bits: int


def allocate_widths(
    counts: Sequence[int], widths: Sequence[int], errors: Sequence[Sequence[float]], budget: int
) -> Allocation:
    """Choose a width for each layer: the least sum of errors with sum of counts x widths <= budget.

    Exact: after each layer all totals survive that no other total beats in both bits and error. Of choices with equal
    error the one with fewer bits is taken. Source: vertical layering (Wu et al.), eq. 12, the budget being total bits.

    Args:
        counts: weights of each layer, positive.
        widths: bits a weight to choose from, ascending.
        errors: errors[layer][i] at widths[i], finite.
        budget: bits in total.

    Raises:
        ValueError: empty or ragged arguments, values that are not finite, or a budget below the narrowest choice.
    """
    table = _checked(counts, widths, errors)
    least = int(sum(counts)) * widths[0]
    if budget < least:
        raise ValueError(
            f"allocate_widths: budget {budget} is below the {least} bits of all layers at {widths[0]} bits"
        )
    bits, cost = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # a layer: kept total -> total before, choice
    rest = least
    for count, row in zip(counts, table, strict=True):
        rest -= count * widths[0]  # what the layers to come need at least
        spent = (bits[:, None] + count * np.asarray(widths, np.int64)).reshape(-1)
        total = (cost[:, None] + row).reshape(-1)
        order = np.lexsort((total, spent))
        order = order[spent[order] + rest <= budget]
        best = np.minimum.accumulate(np.concatenate(([np.inf], total[order][:-1])))
        kept = order[total[order] < best]
        bits, cost = spent[kept], total[kept]
        steps.append((kept // len(widths), kept % len(widths)))
    at, chosen = len(bits) - 1, []  # along the front errors fall as bits rise: the last has the least error
    for before, choice in reversed(steps):
        chosen.append(widths[int(choice[at])])
        at = int(before[at])
    return Allocation(tuple(reversed(chosen)), float(cost[-1]), int(bits[-1]))


def _checked(counts: Sequence[int], widths: Sequence[int], errors: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    if not counts or not widths or list(widths) != sorted(set(widths)) or min(counts) < 1 or widths[0] < 1:
        raise ValueError(
            f"allocate_widths: counts must be positive and widths positive and ascending, got {list(counts)} and "
            f"{list(widths)}"
        )
    if len(errors) != len(counts) or any(len(row) != len(widths) for row in errors):
        raise ValueError(f"allocate_widths: errors must be {len(counts)} rows of {len(widths)} numbers")
    table = np.asarray(errors, dtype=np.float64)
    if not np.isfinite(table).all():
        raise ValueError("allocate_widths: errors must be finite")
    return table
