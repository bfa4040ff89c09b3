"""Layer by layer: the weights' histogram, the grid's levels in it, and how the step moved."""

from __future__ import annotations

from collections.abc import Sequence

from .. import look
from ..markup import Markup, el, join, note
from ..registry import Panel
from ..runs import Run
from ..weights import UNITS, View, views

WIDTH, HEIGHT = 1000, 400  # of a drawing, stretched to the page's width
MANY = 40  # levels above which only their shares are drawn
BUDGET = 1200  # drawings on a page: keeps it below 3 MB


def needs(run: Run) -> str | None:
    """A snapshot of the layers or an artifact."""
    if views(run):
        return None
    if run.config and not any(stage.name == "joint" for stage in run.stages):
        return "the quantized stage has not begun"
    return "neither a stage's layers.json nor a readable artifact"


def render(runs: Sequence[Run]) -> Markup:
    """A selector and a drawing for every run, layer and precision, of which one is shown."""
    shown, left_out = _within_budget([(run, views(run)) for run in runs])
    first = shown[0][1]
    precisions = sorted({view.precision for _, found in shown for view in found}, key=int, reverse=True)
    start = next((view for view in first if "place" not in view.facts and view.precision == precisions[0]), first[0])
    panes = [_pane(i, view, view is start) for i, (_, found) in enumerate(shown) for view in found]
    remark = (
        note(f"Left out for the size of the page: {', '.join(run.name for run in left_out)}.") if left_out else Markup()
    )
    return el("div", _selector(shown, precisions, start), el("div", *panes, id="panes", aria_live="polite"), remark)


def _within_budget(found: list[tuple[Run, list[View]]]) -> tuple[list[tuple[Run, list[View]]], list[Run]]:
    """The first run, and further ones as long as they fit."""
    shown: list[tuple[Run, list[View]]] = []
    left_out: list[Run] = []
    count = 0
    for run, run_views in found:
        if shown and count + len(run_views) > BUDGET:
            left_out.append(run)
            continue
        shown.append((run, run_views[:BUDGET]))
        count += len(run_views)
    return shown, left_out


def _selector(shown: Sequence[tuple[Run, list[View]]], precisions: Sequence[str], start: View) -> Markup:
    runs = [el("option", run.name, value=i) for i, (run, _) in enumerate(shown)]
    names = dict.fromkeys(view.layer for _, found in shown for view in found)
    layers = [el("option", name, value=name, selected=name == start.layer) for name in names]
    widths = [
        el("label", el("input", type="radio", name="precision", value=p, checked=p == start.precision), look.named(p))
        for p in precisions
    ]
    choose_run = el("label", "Run", el("select", *runs, id="pick-run", data_key="run")) if len(runs) > 1 else Markup()
    choose_layer = el("label", "Layer", el("select", *layers, id="pick-layer", data_key="layer"))
    choose_width = el("fieldset", el("legend", "Precision"), *widths, id="pick-precision", data_key="precision")
    missing = el("p", "This run has no such layer at this precision.", id="no-pane", class_="note", hidden=True)
    form = el(
        "form", choose_run, choose_layer, choose_width,
        class_="picker", autocomplete="off", data_panes="panes", data_none="no-pane",
    )  # fmt: skip
    return join([form, missing])


def _pane(index: int, view: View, chosen: bool) -> Markup:
    """One drawing with its facts."""
    facts = [part for label, text in view.facts.items() for part in (el("dt", label), el("dd", text))]
    if len(view.steps) > 1:
        first, last = view.steps[0], view.steps[-1]
        change = f"{first:.4g} after the first epoch, {last:.4g} after the last "
        facts += [el("dt", "step over epochs"), el("dd", change, _sparkline(view.steps))]
    title = el("h3", view.layer, " ", el("small", look.named(view.precision)))
    return el(
        "div", title, _drawing(view), _axis(view), _legend(view), el("dl", *facts),
        class_="pane on" if chosen else "pane", data_run=index, data_layer=view.layer, data_precision=view.precision,
    )  # fmt: skip


def _inside(view: View) -> list[tuple[float, float]]:
    """Levels with their shares, without those that lie so far from all weights that they would squeeze the drawing."""
    room = 0.6 * (view.high - view.low) if view.counts else 0.0
    low, high = min(view.low, 0.0) - room, max(view.high, 0.0) + room
    return [pair for pair in zip(view.levels, view.used, strict=True) if not view.counts or low <= pair[0] <= high]


def _extent(view: View) -> tuple[float, float]:
    """What the drawing spans: all weights and the levels inside, with a margin."""
    levels = [level for level, _ in _inside(view)]
    low, high = min(view.low, *levels, 0.0), max(view.high, *levels, 0.0)
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


def _drawing(view: View) -> Markup:
    """Histogram as an area, levels as lines, the share on each level as a stem."""
    low, high = _extent(view)

    def at(value: float) -> int:
        return round((value - low) / (high - low) * WIDTH)

    parts = []
    if view.counts and view.high > view.low:
        edges = [at(view.low + (view.high - view.low) * i / len(view.counts)) for i in range(len(view.counts) + 1)]
        tallest = max(*view.counts, 1)
        tops = [HEIGHT - round(count / tallest * HEIGHT * 0.94) for count in view.counts]
        path = f"M{edges[0]} {HEIGHT}" + "".join(f"V{top}H{edge}" for top, edge in zip(tops, edges[1:], strict=True))
        parts.append(el("path", class_="area", d=f"{path}V{HEIGHT}Z"))
    inside = _inside(view)
    places = [at(level) for level, _ in inside]
    if len(places) <= MANY:
        parts.append(el("path", class_="level", d="".join(f"M{x} 0V{HEIGHT}" for x in places)))
    most = max([1e-12, *view.used])
    tops = [HEIGHT - round(share / most * HEIGHT * 0.94) for _, share in inside]
    stems = "".join(f"M{x} {HEIGHT}V{top}" for x, top in zip(places, tops, strict=True) if top < HEIGHT)
    parts.append(el("path", class_="stem" if len(places) <= MANY else "stem many", d=stems))
    return el(
        "svg", *parts, class_="histogram", viewBox=f"0 0 {WIDTH} {HEIGHT}", preserveAspectRatio="none", role="img",
        aria_label=_described(view),
    )  # fmt: skip


def _described(view: View) -> str:
    shares = list(zip(view.levels, view.used, strict=True))
    if len(shares) <= 16:
        grid = ", ".join(f"{level:.3g} ({100 * share:.0f} %)" for level, share in shares)
    else:
        grid = f"{len(shares)} levels from {view.levels[0]:.3g} to {view.levels[-1]:.3g}"
    spread = f"Weights from {view.low:.3g} to {view.high:.3g}. " if view.counts else ""
    return f"{view.layer} at {look.named(view.precision)}. {spread}Levels, with the share of weights on each: {grid}."


def _axis(view: View) -> Markup:
    """Labels under the drawing: zero, the outermost levels, or the outermost weights where those lie further out."""
    low, high = _extent(view)
    levels = [view.low, view.high, *(level for level, _ in _inside(view))]
    ends = [min(levels), max(levels)]
    values = ends if min(abs(end) for end in ends) < 0.12 * (high - low) else [ends[0], 0.0, ends[1]]
    marks = [el("span", f"{value:.3g}", style=f"left:{100 * (value - low) / (high - low):.1f}%") for value in values]
    return el(
        "div",
        el("div", *marks, class_="marks"),
        el("div", UNITS.get(view.unit, view.unit), class_="unit"),
        aria_hidden="true",
    )


def _legend(view: View) -> Markup:
    items = [el("li", el("span", class_="box area"), "weights before quantization")] if view.counts else []
    items.append(el("li", el("span", class_="box stem"), "share of weights on a level"))
    shown = len(_inside(view))
    if shown <= MANY:
        items.append(el("li", el("span", class_="box level"), "levels of the grid"))
    if shown < len(view.levels):
        items.append(el("li", f"{len(view.levels) - shown} of {len(view.levels)} levels lie outside"))
    return el("ul", *items, class_="key")


def _sparkline(values: Sequence[float]) -> Markup:
    """A small line over the epochs."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    points = [
        f"{round(100 * i / (len(values) - 1))} {round(28 - 24 * (value - low) / span)}"
        for i, value in enumerate(values)
    ]
    line = el("path", d="M" + "L".join(points))
    label = f"step over {len(values)} epochs, between {low:.4g} and {high:.4g}"
    return el(
        "svg", line, class_="spark", viewBox="0 0 100 32", preserveAspectRatio="none", role="img", aria_label=label
    )


PANEL = Panel(
    "Grids and weights",
    "The weights of a layer before quantization, the levels of its grid and how many weights come to lie on each. Both "
    "are drawn to their own height. Choose with the arrow keys or by touch.",
    50,
    needs,
    render,
)
