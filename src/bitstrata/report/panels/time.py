"""Where the time went: whole runs by stage, training by part, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import look
from ..chart import chart, color
from ..markup import Markup, details, el, join
from ..registry import Panel
from ..runs import Run, Stage, is_number

PARTS = ("data", "forward", "backward", "optimizer", "evaluation", "checkpoint", "logging", "diagnosis", "other")
LOOKS = {part: look.of_number(i) for i, part in enumerate(PARTS[:-1])} | {"other": look.of_level("other")}


def needs(run: Run) -> str | None:
    """Times of epochs, or of the whole run's stages."""
    if any(_epochs(stage) for stage in run.stages) or _whole(run):
        return None
    return "no epoch has a record of its time"


def render(runs: Sequence[Run]) -> Markup:
    """A figure a run."""
    alone = len(runs) == 1
    figures = [el("figure", Markup() if alone else el("h3", run.name), _run(run, alone)) for run in runs]
    return el("div", *figures, class_="figures")


def _run(run: Run, alone: bool) -> Markup:
    whole = _whole(run)
    looks = {stage: look.of_number(i) for i, stage in enumerate(whole)}
    parts = [bar("Whole run", whole, looks)] if whole else []
    stages = [stage for stage in run.stages if _epochs(stage)]
    parts += [bar(f"Training, stage {stage.name}", _sum(stage), LOOKS) for stage in stages]
    if sum(len(_epochs(stage)) for stage in stages) > 1:
        picture = _by_epoch(run, stages, alone)
        parts.append(picture if alone else details("Epoch by epoch", picture))
    return join(parts)


def bar(title: str, seconds: dict[str, float], looks: dict[str, look.Look]) -> Markup:
    """One stacked bar, with its parts and their shares as a list under it."""
    total = max(sum(seconds.values()), 1e-9)
    shares = {part: 100 * value / total for part, value in seconds.items() if value > 0}
    pieces = [el("span", style=f"flex:{shares[part]:.3f};background:var(--{looks[part].color})") for part in shares]
    words = {f"{part} {f'{share:.0f}' if share >= 0.5 else 'under 1'} %": looks[part] for part, share in shares.items()}
    strip = el("div", *pieces, class_="strip", aria_hidden="true")
    return el("div", el("p", el("b", title), f", {duration(total)}"), strip, look.key(words, boxes=True), class_="bar")


def _by_epoch(run: Run, stages: Sequence[Stage], alone: bool) -> Markup:
    epochs = [(stage.before + e["epoch"] + 1, _seconds(e)) for stage in stages for e in _epochs(stage)]

    def draw(axes: Any, narrow: bool) -> None:
        x = [position for position, _ in epochs]
        bottom = [0.0] * len(epochs)
        for part in PARTS:
            heights = [seconds[part] for _, seconds in epochs]
            axes.bar(x, heights, 0.82, bottom=bottom, color=color(LOOKS[part].color), linewidth=0)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        axes.set_title("seconds of each epoch")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5 if narrow else 8)

    longest = max(sum(seconds.values()) for _, seconds in epochs)
    words = f"Seconds by part of each of {len(epochs)} epochs, {run.name}; the longest took {duration(longest)}."
    return chart(words, draw, alone=alone)


def _epochs(stage: Stage) -> list[Any]:
    return [e for e in stage.of("time") if is_number(e.get("wall")) and e["wall"] > 0]


def _seconds(event: Any) -> dict[str, float]:
    """Seconds of every part of an epoch; "other" is what no part accounts for."""
    known = {part: max(float(event.get("seconds", {}).get(part, 0.0)), 0.0) for part in PARTS[:-1]}
    return {**known, "other": max(event["wall"] - sum(known.values()), 0.0)}


def _sum(stage: Stage) -> dict[str, float]:
    epochs = [_seconds(event) for event in _epochs(stage)]
    return {part: sum(seconds[part] for seconds in epochs) for part in PARTS}


def _whole(run: Run) -> dict[str, float]:
    seconds = run.results.get("seconds")
    return {k: v for k, v in seconds.items() if is_number(v) and v >= 0} if isinstance(seconds, dict) else {}


def duration(seconds: float) -> str:
    """'4.2 s', '3 min 5 s', '2 h 14 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


PANEL = Panel(
    "Where the time goes",
    "Wall time of training by part. “Backward” holds the loss and all gradients; waiting for a graphics card counts "
    "where the host waits, in “logging”, which reads the losses; “other” is what no part accounts for.",
    60,
    needs,
    render,
)
