"""Accuracy of every precision while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..curves import Source
from ..curves import render as render_curves
from ..markup import Markup
from ..registry import Panel
from ..runs import Run

SOURCES = (Source("evaluation", "eval", "accuracy"), Source("training batches", "epoch", "accuracy", dashed=True))


def needs(run: Run) -> str | None:
    """An epoch that was finished."""
    if any(stage.series(source.event, source.field) for stage in run.stages for source in SOURCES):
        return None
    return "metrics.jsonl has no finished epoch" if run.events else "there is no metrics.jsonl with events"


def render(runs: Sequence[Run]) -> Markup:
    """A chart a group."""
    return render_curves(runs, SOURCES, "accuracy", lambda value: f"{100 * value:.2f} %", _dress)


def _dress(axes: Any, low: float, high: float) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    room = 0.05 * (high - low) or 0.01
    axes.set_ylim(max(0.0, low - room), min(1.0, high + room))


PANEL = Panel(
    "Accuracy over time",
    "Top-1 accuracy of every precision, after each epoch on the evaluation data and over the epoch's training batches. "
    "Stages follow each other on one axis; a band is the range over seeds.",
    30,
    needs,
    render,
)
