"""Every layer over time: signal to noise, steps, deviations, clipping, zeros, code flips, kappa (UniQ, figure 4)."""

from __future__ import annotations

from collections.abc import Sequence

from .. import look
from ..diagnosis import VALUES, Tracks, cost, lines, needs, of_layers, stages
from ..markup import Markup, details, el, join, note, table
from ..multiples import small
from ..registry import Panel
from ..runs import Run, Stage

MOST = 400  # layers on a page: keeps it small


def render(runs: Sequence[Run]) -> Markup:
    """A selector, and for every run and layer its drawings, of which those of one layer are shown."""
    found = [(run, stage, of_layers(stage)) for run in runs for stage in stages(run)[-1:]]
    shown: list[tuple[Run, Stage, dict[str, Tracks]]] = []
    for row in found:
        if not shown or sum(len(layers) for _, _, layers in [*shown, row]) <= MOST:
            shown.append(row)
    left = [run.name for run, _, _ in found if all(run is not other for other, _, _ in shown)]
    first = shown[0][2]
    start = next((layer for layer, tracks in first.items() if _differs(tracks)), next(iter(first)))
    panes = [
        _pane(i, stage, layer, tracks, i == 0 and layer == start)
        for i, (_, stage, layers) in enumerate(shown)
        for layer, tracks in layers.items()
    ]
    levels = {key for _, _, layers in shown for tracks in layers.values() for key in _levels(tracks)}
    legend = look.key({look.named(level): look.of_level(level) for level in look.ordered(levels)})
    remarks = [note(cost(run)) for run, _, _ in shown]
    if left:
        remarks.append(note(f"Left out for the size of the page: {', '.join(left)}."))
    parts = (_selector(shown, start), legend, el("div", *panes, id="time-panes", aria_live="polite"), *remarks)
    return el("div", *parts)


def _differs(tracks: Tracks) -> bool:
    """Whether the layer is one of those that differ from precision to precision, which edge layers do not."""
    steps = tracks.get("weight_step") or tracks.get("weight_sqnr") or tracks.get("variance_ratio") or {}
    return len({points[0][1] for points in steps.values()}) > 1


def _levels(tracks: Tracks) -> set[str]:
    return {key for name, by_key in tracks.items() if name != "flips" for key in by_key}


def _selector(shown: Sequence[tuple[Run, Stage, dict[str, Tracks]]], start: str) -> Markup:
    runs = [el("option", run.name, value=i) for i, (run, _, _) in enumerate(shown)]
    names = dict.fromkeys(layer for _, _, layers in shown for layer in layers)
    layers = [el("option", name, value=name, selected=name == start) for name in names]
    choose_run = el("label", "Run", el("select", *runs, data_key="run")) if len(runs) > 1 else Markup()
    choose_layer = el("label", "Layer", el("select", *layers, data_key="layer"))
    missing = el("p", "This run has no such layer.", id="no-time-pane", class_="note", hidden=True)
    form = el(
        "form", choose_run, choose_layer,
        class_="picker", autocomplete="off", data_panes="time-panes", data_none="no-time-pane",
    )  # fmt: skip
    return join([form, missing])


def _pane(index: int, stage: Stage, layer: str, tracks: Tracks, chosen: bool) -> Markup:
    """The drawings of one layer, and their numbers."""
    places = sorted({x for by_key in tracks.values() for points in by_key.values() for x, _ in points})
    over = f"epochs {places[0]:.3g} to {places[-1]:.3g}"
    known = [name for name in VALUES if name in tracks]
    drawings, rows = [], []
    for name in known:
        found = lines(tracks[name], name)
        drawing = small(VALUES[name], found, (places[0], places[-1]), over)
        if name == "flips":
            legend = look.key({line.label: line.look for line in found})
            drawing = el("div", drawing, legend)
        drawings.append(drawing)
        form = VALUES[name].form
        rows += [
            (f"{VALUES[name].title}, {line.label}", form(line.points[0][1]), form(line.points[-1][1])) for line in found
        ]
    numbers = table(f"{layer}, first and last measurement", ("value", "first", "last"), rows)
    times = f"stage {stage.name}, {over}, {len(places)} measurement{'s' if len(places) > 1 else ''}"
    return el(
        "div", el("h3", layer, " ", el("small", times)), el("div", *drawings, class_="multiples"),
        details("Numbers", numbers),
        class_="pane on" if chosen else "pane", data_run=index, data_layer=layer,
    )  # fmt: skip


PANEL = Panel(
    "Layers over time",
    "What was measured of each layer while it trained, from left to right, one line a precision; the range is written "
    "over each drawing. A stratum is a bit-plane of the weight's codes, the first the most significant. Choose a layer "
    "with the arrow keys or by touch. Where fewer lines are seen, precisions agree.",
    52,
    needs,
    render,
)
