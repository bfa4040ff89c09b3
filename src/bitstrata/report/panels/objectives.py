"""The whole network over time: how precisions pull at what they share (vertical layering, figure 7), kappa, zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..chart import logarithmic
from ..curves import Source
from ..curves import render as render_curves
from ..diagnosis import stages
from ..markup import Markup, details, el, join, table
from ..registry import Panel
from ..runs import Run


@dataclass(frozen=True)
class Shown:
    """A value: its heading, a number as text, whether its axis is logarithmic, and what the axis has to hold."""

    title: str
    form: Callable[[float], str]
    log: bool = False
    holds: tuple[float, ...] = ()


SHOWN = {
    "moo_factor": Shown("Factors of multiple-gradient descent", lambda v: f"{v:.3g}", holds=(0.0, 1.0)),
    "moo_norm": Shown("Norm of the gradient to the shared weights", lambda v: f"{v:.3g}", log=True),
    "kappa0": Shown("κ₀ of the last layer; rule I asks for less than 0.1", lambda v: f"{v:.3g}", log=True),
    "R_w": Shown("Weights that are not zero, R_w", lambda v: f"{100 * v:.3g} %", holds=(0.0, 1.0)),
    "R_a": Shown("Hidden values that are not zero, R_a", lambda v: f"{100 * v:.3g} %", holds=(0.0, 1.0)),
}


def _has(run: Run, name: str) -> bool:
    return any(name in event["whole"] for stage in stages(run) for event in stage.of("diagnosis"))


def needs(run: Run) -> str | None:
    """A value of the whole network."""
    if any(_has(run, name) for name in SHOWN):
        return None
    return "factors, norms, κ₀ and zeros were not measured while it trained: `--diagnose moo,kappa,nonzero` does"


def render(runs: Sequence[Run]) -> Markup:
    """A chart a value and group of runs."""
    parts, charts = [], []
    for name, shown in SHOWN.items():
        having = [run for run in runs if _has(run, name)]
        if having:
            chart = render_curves(having, (_source(name),), shown.title, shown.form, _dress(shown), beside=True)
            charts.append(el("div", el("h3", shown.title), chart))
    parts.append(el("div", *charts, class_="figures"))
    cosines = [row for run in runs for row in _cosines(run)]
    if cosines:
        head = ("precisions", "first", "last")
        parts.append(details("Cosines between gradients", table("Cosines between gradients", head, cosines)))
    return join(parts)


def _source(name: str) -> Source:
    return Source("measurement", "diagnosis", f"whole.{name}")


def _dress(shown: Shown) -> Callable[[Any, float, float], None]:
    def dress(axes: Any, low: float, high: float) -> None:
        axes.yaxis.set_major_formatter(lambda value, _: shown.form(value))
        if shown.log and low > 0 and high > 20 * low:
            logarithmic(axes, low, high)
            return
        low, high = min((low, *shown.holds)), max((high, *shown.holds))
        room = 0.05 * (high - low) or 0.05 * abs(high) or 0.01
        axes.set_ylim(low - room, high + room)

    return dress


def _cosines(run: Run) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for stage in stages(run):
        series = stage.series("diagnosis", "whole.moo_cosine")
        if series:
            rows.append((f"{run.name}, stage {stage.name}",))
        for pair, points in series.items():
            words = " and ".join(pair.split("-")) + " bits"
            rows.append((words, f"{points[0][1]:+.2f}", f"{points[-1][1]:+.2f}"))
    return rows


PANEL = Panel(
    "Precisions over time",
    "How the precisions pull at the weights that they share: the factors that multiple-gradient descent takes, or "
    "would take, and the norms of their gradients, distillation included. κ₀ of SAT's first rule, and the share of "
    "weights and hidden values that are not zero, of all layers together. Where fewer lines are seen, precisions "
    "agree.",
    45,
    needs,
    render,
)
