"""What is known of each layer's weights: from the snapshot that training writes, or else from the artifact's codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .runs import Run, is_number

UNITS = {"value": "weight", "step": "weight, in steps of its channel", "code": "integer weight"}


@dataclass(frozen=True)
class View:
    """A layer at one precision.

    levels and used: the grid, in `unit`, and the share of the weights on each level. low, high, counts: a histogram of
    the weights before quantization; no counts where only codes are known. steps: the weight's step after each epoch.
    facts: label -> text.
    """

    layer: str
    precision: str
    unit: str
    levels: tuple[float, ...]
    used: tuple[float, ...]
    low: float
    high: float
    counts: tuple[int, ...]
    steps: tuple[float, ...]
    facts: Mapping[str, str]


def views(run: Run) -> list[View]:
    """Every layer at every precision, in the network's order; [] where nothing is known. Damaged entries are left."""
    for stage in reversed(list(run.layers)):
        found = _of_snapshot(run, stage)
        if found:
            return found
    return _of_artifact(run)


def _of_snapshot(run: Run, stage: str) -> list[View]:
    entries = run.layers[stage].get("layers")
    if not isinstance(entries, list):
        _remark(run, f"{stage}.layers.json has no list of layers")
        return []
    found = []
    for entry in entries:
        try:
            for precision, view in sorted(entry["precisions"].items(), key=lambda item: int(item[0])):
                found.append(_view(entry, precision, view, _history(run, stage, entry["name"], precision)))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            _remark(run, f"{stage}.layers.json: an entry is damaged and left out")
    return found


def _remark(run: Run, problem: str) -> None:
    """Say it once, however often the run is looked at."""
    if problem not in run.problems:
        run.problems.append(problem)


def _view(entry: Mapping[str, Any], precision: str, view: Mapping[str, Any], steps: tuple[float, ...]) -> View:
    levels, used = tuple(map(float, view["levels"])), tuple(map(float, view["used"]))
    if len(levels) != len(used) or not levels:
        raise ValueError("levels and shares differ in number")
    shape = [int(size) for size in entry["shape"]]
    facts = {
        "layer": f"{entry['kind']}, {' × '.join(map(str, shape))}, {int(np.prod(shape)):,} weights",
        "weight grid": f"{entry['quantizer']}, {view['bits']} bits, {len(levels)} levels",
        "step": _step(view["step"]),
    }
    if view.get("input"):
        source = view["input"]
        facts["input grid"] = (
            f"{source['quantizer']}, codes {source['codes'][0]} to {source['codes'][1]}, step {_step(source['step'])}"
        )
    if entry.get("edge"):
        facts["place"] = "first or last layer, the same at every precision"
    if len(levels) > 2:
        facts["outermost levels"] = f"{100 * (used[0] + used[-1]):.1f} % of the weights"
    low, high = (float(value) for value in view["range"])
    counts = tuple(int(count) for count in view["counts"])
    return View(str(entry["name"]), str(precision), view["unit"], levels, used, low, high, counts, steps, facts)


def _step(values: Sequence[float]) -> str:
    """'0.0123', or the spread over output channels."""
    if len(values) == 3:
        return f"{values[1]:.4g} (channels from {values[0]:.4g} to {values[2]:.4g})"
    return f"{values[0]:.4g}" if values else "not finite"


def _history(run: Run, stage: str, layer: str, precision: str) -> tuple[float, ...]:
    """The weight's step, or the median over channels, after each epoch of the stage."""
    found = []
    for event in run.events:
        if event["event"] == "grids" and event["run"] == stage:
            try:
                values = event["layers"][layer][precision]["weight"]
                found.append(float(values[len(values) // 2]))
            except (KeyError, TypeError, IndexError, ValueError):
                continue
    return tuple(value for value in found if is_number(value))


def _of_artifact(run: Run) -> list[View]:
    """Levels and shares from the packed codes, in integer weights; scales are part of other factors there."""
    from bitstrata_runtime.artifact import Artifact
    from bitstrata_runtime.errors import ArtifactError

    if run.artifact is None:
        return []
    try:
        artifact = Artifact.open(run.artifact)
        program = artifact.load([str(p) for p in artifact.precisions], 8)
    except (ArtifactError, OSError, ValueError) as error:
        _remark(run, f"model.strata cannot be read: {error}")
        return []
    found = []
    for name, layer in program.layers.items():
        weights = program.weights[name]
        for precision in program.precisions:
            bits, (mul, add) = layer.weight_bits[precision], layer.integer_form[precision]
            codes = weights.codes >> (weights.bits - bits)
            lo, size = -(2 ** (bits - 1)), 2**bits
            counts = np.bincount((codes.reshape(-1).astype(np.int64) - lo), minlength=size)
            levels = [float(mul * (lo + i) + add) for i in range(size)]
            facts = {
                "layer": f"{layer.kind}, {' × '.join(map(str, layer.shape))}, {codes.size:,} weights",
                "weight grid": f"{layer.grid}, {bits} bits, {size} levels",
                "source": "the artifact's codes; a run that was trained anew would show the weights behind them",
            }
            share = tuple(float(value) for value in counts / max(codes.size, 1))
            found.append(View(name, str(precision), "code", tuple(levels), share, levels[0], levels[-1], (), (), facts))
    return found
