"""Gradients by channel, from `bitstrata inspect`: how they are distributed, their ranges, and the groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import look
from ..chart import chart, color, logarithmic
from ..markup import Markup, details, el, join, table
from ..registry import Panel
from ..runs import Run, is_number, side_file

HEAD = ("layer", "channels", "near zero", "range / own, one range", "range / own, groups", "channels a group")
SHOWN = 4
MARKED = 8  # markers a line
FLOOR = 2.0**-12  # where the axis of ranges ends

Layers = dict[str, dict[str, Any]]


def needs(run: Run) -> str | None:
    """Gradients in inspect.json."""
    if side_file(run, "inspect.json") is None:
        return "not inspected yet: `bitstrata inspect` measures it"
    return None if _layers(run) else "inspect.json holds no gradients"


def render(runs: Sequence[Run]) -> Markup:
    """Two charts and a table a run."""
    return join(_of_run(run, _layers(run)) for run in runs)


def _layers(run: Run) -> Layers:
    found = (side_file(run, "inspect.json") or {}).get("gradients")
    whole = found.items() if isinstance(found, dict) else ()
    return {name: layer for name, layer in whole if isinstance(layer, dict) and _is_whole(layer)}


def _is_whole(layer: dict[str, Any]) -> bool:
    lists = [layer.get(field) for field in ("counts", "ranges", "groups")]
    if not all(isinstance(values, list) and values and all(map(is_number, values)) for values in lists):
        return False
    same = len(layer["ranges"]) == len(layer["groups"])
    return same and sum(layer["counts"]) > 0 and all(is_number(layer.get(f)) for f in ("diversity", "grouped"))


def _of_run(run: Run, layers: Layers) -> Markup:
    ranked = sorted(layers, key=lambda name: layers[name]["diversity"])
    last = len(ranked) - 1
    drawn = [ranked[round(i * last / max(SHOWN - 1, 1))] for i in range(SHOWN)]
    styles = {name: look.of_number(i) for i, name in enumerate(dict.fromkeys(drawn))}
    figures = [
        el("figure", chart(f"Share of elements a bin. {_described(layers, styles)}", _histograms(layers, styles))),
        el("figure", chart(f"Channels' ranges. {_described(layers, styles)}", _ranges(layers, styles))),
    ]
    rows = [_row(name, layer) for name, layer in layers.items()]
    numbers = details("All layers", table(f"{run.name}: gradients by channel", HEAD, rows, hidden_caption=True))
    return join((el("h3", run.name), look.key(styles), el("div", *figures, class_="figures"), numbers))


def _histograms(layers: Layers, styles: dict[str, look.Look]):  # type: ignore[no-untyped-def]
    def draw(axes: Any, narrow: bool) -> None:
        shares = {name: [n / sum(layers[name]["counts"]) for n in layers[name]["counts"]] for name in styles}
        for name, style in styles.items():
            bins = len(shares[name])
            x = [(2 * i + 1) / bins - 1 for i in range(bins)]
            axes.plot(x, [share or float("nan") for share in shares[name]], **_dress(style, bins))
        known = [share for values in shares.values() for share in values if share]
        logarithmic(axes, min(known), max(known))
        axes.set_xlabel("gradient / its largest magnitude")
        axes.set_title("share of elements")

    return draw


def _ranges(layers: Layers, styles: dict[str, look.Look]):  # type: ignore[no-untyped-def]
    def draw(axes: Any, narrow: bool) -> None:
        for name, style in styles.items():
            ranges = layers[name]["ranges"]
            x = [100 * (i + 0.5) / len(ranges) for i in range(len(ranges))]
            axes.plot(x, [max(r, FLOOR) for r in ranges], **_dress(style, len(ranges)))
        logarithmic(axes, min(max(r, FLOOR) for name in styles for r in layers[name]["ranges"]), 1.0, base=2)
        axes.set_xlabel("% of the channels, the widest first")
        axes.set_title("range / largest" if narrow else "range of a channel / the largest")

    return draw


def _dress(style: look.Look, points: int) -> dict[str, Any]:
    every = max(1, points // MARKED)
    return {"color": color(style.color), "linewidth": 1.6, "marker": style.marker, "markevery": every}


def _row(name: str, layer: dict[str, Any]) -> tuple[str, ...]:
    counts, groups = layer["counts"], layer["groups"]
    near = counts[len(counts) // 2] / sum(counts)
    sizes = " + ".join(str(groups.count(e)) for e in range(max(groups) + 1))
    return name, str(len(groups)), f"{near:.1%}", f"{layer['diversity']:.2f}", f"{layer['grouped']:.2f}", sizes


def _described(layers: Layers, styles: dict[str, look.Look]) -> str:
    parts = [
        f"{name}: {layers[name]['diversity']:.2f} times a channel's own range with one range, "
        f"{layers[name]['grouped']:.2f} with groups"
        for name in styles
    ]
    return "; ".join(parts) + "."


PANEL = Panel(
    "Gradients by channel",
    "Gradients as they arrive at layers: most elements are small, and the widest channel sets the range of all. Groups "
    "of channels with halved ranges bring the range that a channel is quantized with closer to its own.",
    56,
    needs,
    render,
)
