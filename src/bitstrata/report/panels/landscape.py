"""The loss around the trained weights, from `bitstrata inspect --landscape N`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..chart import chart, color
from ..markup import Markup, el, join
from ..registry import Panel
from ..runs import Run, is_number, side_file

LEVELS = 12
MAP = "viridis"  # readable in light and dark, and without colours

Surface = tuple[list[float], list[list[float | None]]]


def needs(run: Run) -> str | None:
    """A whole surface in inspect.json."""
    found = side_file(run, "inspect.json")
    if found is None or not found.get("landscape"):
        return "no loss surface: `bitstrata inspect --landscape 11` measures it"
    return None if _surface(run) else "inspect.json holds no whole loss surface"


def render(runs: Sequence[Run]) -> Markup:
    """A figure a run, with levels common to all."""
    surfaces = [(run, found) for run in runs if (found := _surface(run))]
    known = [value for _, (_, loss) in surfaces for row in loss for value in row if value is not None]
    low, high = min(known), max(known)
    figures = []
    for run, (axis, loss) in surfaces:
        picture = chart(_described(run, axis, loss), _drawing(axis, loss, low, max(high, low + 1e-9)), alone=False)
        figures.append(el("figure", el("h3", run.name), picture))
    return join((el("div", *figures, class_="figures"),))


def _surface(run: Run) -> Surface | None:
    found = (side_file(run, "inspect.json") or {}).get("landscape")
    if not isinstance(found, dict):
        return None
    axis, loss = found.get("axis"), found.get("loss")
    if not isinstance(axis, list) or not isinstance(loss, list) or len(axis) < 3 or len(loss) != len(axis):
        return None
    square = all(isinstance(row, list) and len(row) == len(axis) for row in loss)
    if not square or not all(map(is_number, axis)):
        return None
    values = [value for row in loss for value in row]
    numbers = all(value is None or is_number(value) for value in values)
    return (axis, loss) if numbers and any(value is not None for value in values) else None


def _drawing(axis: list[float], loss: list[list[float | None]], low: float, high: float):  # type: ignore[no-untyped-def]
    # levels that all runs share let surfaces be compared
    levels = [low + (high - low) * i / LEVELS for i in range(LEVELS + 1)]
    values = [[float("nan") if value is None else value for value in row] for row in loss]

    def draw(axes: Any, narrow: bool) -> None:
        axes.grid(False)
        axes.contourf(axis, axis, values, levels=levels, cmap=MAP)
        lines = axes.contour(axis, axis, values, levels=levels, colors="white", linewidths=0.7)
        axes.clabel(lines, lines.levels[1 : 7 if narrow else 10 : 2], fmt="%.2f", fontsize=10, colors=color("ink"))
        axes.plot(0, 0, marker="+", color=color("c1"), markersize=9)
        axes.set_xlabel(
            "two directions, in filter lengths" if narrow else "along two random directions, in filter lengths"
        )
        axes.set_title("loss")

    return draw


def _described(run: Run, axis: list[float], loss: list[list[float | None]]) -> str:
    middle = len(axis) // 2
    known = [value for row in loss for value in row if value is not None]
    center = loss[middle][middle]
    at = "unknown" if center is None else f"{center:.3g}"
    return f"{run.name}: loss {at} at the weights, {min(known):.3g} to {max(known):.3g} around them."


PANEL = Panel(
    "Loss around the weights",
    "The training loss on one batch where every filter is moved along two random directions, as far as its own length. "
    "The cross marks the trained weights.",
    58,
    needs,
    render,
)
