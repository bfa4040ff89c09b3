"""What was measured while a run trained: its `diagnosis` events, by layer and over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import look
from .multiples import Line, Value
from .runs import Point, Run, Stage

Tracks = dict[str, dict[str, list[Point]]]

#: Values of layers, in the order in which they are shown.
VALUES = {
    "weight_sqnr": Value("signal to noise of the weight, dB", lambda v: f"{v:.1f}"),
    "input_sqnr": Value("signal to noise of the input, dB", lambda v: f"{v:.1f}"),
    "weight_step": Value("step of the weight", lambda v: f"{v:.3g}"),
    "input_step": Value("step of the input", lambda v: f"{v:.3g}"),
    "weight_deviation": Value("standard deviation of the weight", lambda v: f"{v:.3g}"),
    "input_deviation": Value("standard deviation of the input", lambda v: f"{v:.3g}"),
    "weight_clipped": Value("weights clipped", lambda v: f"{100 * v:.1f} %"),
    "input_clipped": Value("inputs clipped", lambda v: f"{100 * v:.1f} %"),
    "weight_nonzero": Value("weights not zero, R_w", lambda v: f"{100 * v:.1f} %"),
    "input_nonzero": Value("inputs not zero, R_a", lambda v: f"{100 * v:.1f} %"),
    "variance_ratio": Value("variance ratio, quantized to original weight", lambda v: f"{v:.3g}"),
    "gradient_variance": Value("variance of the weight's gradient", lambda v: f"{v:.2g}", log=True),
    "kappa1": Value("κ₁, shaded where rule II holds", lambda v: f"{v:.2g}", log=True, band=(0.1, 10.0)),
    "flips": Value("codes that changed, by stratum", lambda v: f"{100 * v:.2g} %"),
}


def stages(run: Run) -> list[Stage]:
    """Stages in which something was measured."""
    return [stage for stage in run.stages if any(event["layers"] or event["whole"] for event in stage.of("diagnosis"))]


def needs(run: Run) -> str | None:
    """A diagnosis event."""
    if stages(run):
        return None
    return "nothing was measured while it trained: `--diagnose all`, or the callback `diagnostics.Live`"


def of_layers(stage: Stage) -> dict[str, Tracks]:
    """Layer -> value -> precision (of flips: stratum) -> points over the epochs of the run."""
    found: dict[str, Tracks] = {}
    for event in stage.of("diagnosis"):
        x = stage.position(event)
        for name, by_key in event["layers"].items():
            for key, numbers in by_key.items():
                for layer, number in numbers.items():
                    found.setdefault(layer, {}).setdefault(name, {}).setdefault(key, []).append((x, number))
    return found


def last(stage: Stage) -> Mapping[str, Any]:
    """The last measurement of layers: value -> precision -> layer -> number."""
    events = [event["layers"] for event in stage.of("diagnosis") if event["layers"]]
    return events[-1] if events else {}


def lines(tracks: Mapping[str, list[Point]], name: str) -> list[Line]:
    """Lines of a value's precisions, widest first, or of its strata."""
    if name == "flips":
        return [Line(f"stratum {key}", look.of_level(key), tracks[key]) for key in sorted(tracks)]
    return [Line(look.named(level), look.of_level(level), tracks[level]) for level in look.ordered(set(tracks))]


def cost(run: Run) -> str:
    """What the measurements took, in words."""
    parts = []
    for stage in stages(run):
        times = [sum(event.get("ms", {}).values()) for event in stage.of("diagnosis")]
        walls = [event for event in stage.of("time") if "wall" in event]
        spent, wall = sum(times) / 1000, sum(event["wall"] for event in walls)
        share = f", {100 * spent / wall:.0f} % of the time" if wall > 0 else ""
        parts.append(f"stage {stage.name}: {len(times)} measurements of {sum(times) / len(times):.0f} ms{share}")
    return f"{run.name}, {'; '.join(parts)}."
