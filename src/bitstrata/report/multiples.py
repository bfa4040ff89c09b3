"""Small multiples: many small drawings beside each other, lines of precisions in each, with their range in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import look
from .markup import Markup, el

WIDTH, HEIGHT, EDGE = 300, 110, 8  # of a drawing
MOST = 80  # points of a line


@dataclass(frozen=True)
class Line:
    """A line of a drawing: its label and look, and its points, x ascending."""

    label: str
    look: look.Look
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Value:
    """How a value is shown.

    title: in words, with its unit. form: a number as text. log: the axis is logarithmic, where all numbers are
    positive. band: what is shaded behind, as least and largest.
    """

    title: str
    form: Callable[[float], str]
    log: bool = False
    band: tuple[float, float] | None = None


def small(value: Value, lines: Sequence[Line], span: tuple[float, float], over: str) -> Markup:
    """One drawing with its title and range.

    span: ends of the x axis. over: what the x axis is, for the text alternative, as "epochs 2 to 5".
    """
    numbers = [y for line in lines for _, y in line.points]
    log = value.log and min(numbers) > 0
    low, high = min(numbers), max(numbers)
    scale = _scale(low, high, log)
    left, right = span

    def across(x: float) -> float:
        return EDGE + (WIDTH - 2 * EDGE) * ((x - left) / (right - left) if right > left else 0.5)

    parts = [_band(value.band, scale)] if value.band is not None else []
    parts.append(el("path", class_="base", d=f"M0 {HEIGHT - 1}H{WIDTH}"))
    for line in lines:
        places = [(across(x), scale(y)) for x, y in thinned(line.points)]
        parts.append(_line(line, places))
    said = "; ".join(f"{line.label} {value.form(line.points[-1][1])}" for line in lines)
    drawing = el(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
        aria_label=f"{value.title}, over {over}. Last values: {said}.",
    )  # fmt: skip
    spread = value.form(low) if value.form(low) == value.form(high) else f"{value.form(low)} to {value.form(high)}"
    words = f"{spread}, logarithmic" if log and high > low else spread
    return el("figure", el("figcaption", value.title, el("small", words)), drawing, class_="multiple")


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST of them, evenly, the first and the last among them."""
    if len(points) <= MOST:
        return list(points)
    return [points[round(i * (len(points) - 1) / (MOST - 1))] for i in range(MOST)]


def _scale(low: float, high: float, log: bool) -> Callable[[float], float]:
    """A number -> its height in the drawing; equal numbers lie in the middle."""
    lower, upper = (math.log(low), math.log(high)) if log else (low, high)

    def at(y: float) -> float:
        inside = math.log(max(y, 5e-324)) if log else y
        share = (inside - lower) / (upper - lower) if upper > lower else 0.5
        return HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * share

    return at


def _band(band: tuple[float, float], scale: Callable[[float], float]) -> Markup:
    top, bottom = (min(max(scale(y), 0.0), float(HEIGHT)) for y in reversed(band))
    return el("path", class_="band", d=f"M0 {top:.0f}H{WIDTH}V{bottom:.0f}H0Z")


def _line(line: Line, places: Sequence[tuple[float, float]]) -> Markup:
    """The line, with its marker at some of the points, so that it is known without its colour."""
    tone = f"var(--{line.look.color})"
    path = el("path", d="M" + "L".join(f"{x:.0f} {y:.1f}" for x, y in places), style=f"stroke:{tone}", class_="run")
    at = {0, len(places) // 2, len(places) - 1}
    shape = look.SHAPES[line.look.marker]
    marks = [
        el("path", d=shape, transform=f"translate({places[i][0] - 17:.1f} {places[i][1] - 8:.1f})") for i in sorted(at)
    ]
    return el("g", path, el("g", *marks, style=f"fill:{tone}"))
