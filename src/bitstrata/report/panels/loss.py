"""Loss of every precision while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..chart import logarithmic
from ..curves import Source
from ..curves import render as render_curves
from ..markup import Markup
from ..registry import Panel
from ..runs import Run

EPOCHS = Source("mean over the epoch", "epoch", "loss")
STEPS = Source("single steps", "step", "loss", dashed=True)


def needs(run: Run) -> str | None:
    """A loss."""
    if any(stage.series("epoch", "loss") or stage.series("step", "loss") for stage in run.stages):
        return None
    return "metrics.jsonl has no loss" if run.events else "there is no metrics.jsonl with events"


def render(runs: Sequence[Run]) -> Markup:
    """A chart a group; single steps where no stage has two epochs to make a line of."""
    lines = max(len(stage.of("epoch")) for run in runs for stage in run.stages) > 1
    return render_curves(runs, (EPOCHS,) if lines else (EPOCHS, STEPS), "loss", lambda value: f"{value:.4f}", _dress)


def _dress(axes: Any, low: float, high: float) -> None:
    if low > 0 and high > 20 * low:
        logarithmic(axes, low, high)
    else:
        room = 0.05 * (high - low) or 0.01
        axes.set_ylim(min(0.0, low), high + room)


PANEL = Panel(
    "Loss over time",
    "Mean loss of each epoch on the training batches, distillation included. The axis is logarithmic where values span "
    "more than a factor of 20.",
    40,
    needs,
    render,
)
