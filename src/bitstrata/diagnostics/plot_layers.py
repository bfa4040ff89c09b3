"""Pictures of what `gradient_ranges` and `norm_statistics` find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from .norms import NormStatistics
from .plot import new_figure
from .ranges import BINS, LayerRanges

SHOWN = 4
FLOOR = 2.0**-14  # where the axis of ranges ends; narrower channels, zeros too, are drawn on it
FAR = 50  # diversities beyond this are drawn on a logarithmic axis
LONGEST = 12  # labels of points beyond this are thinned


def chosen(found: Mapping[str, LayerRanges], count: int = SHOWN) -> list[str]:
    """At most `count` layers, in their order, evenly spread over it by diversity: the least and the most diverse, and
    between them."""
    ranked = sorted(found, key=lambda name: found[name].diversity)
    at = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    kept = {ranked[i] for i in at}
    return [name for name in found if name in kept]


def plot_ranges(found: Mapping[str, LayerRanges], file: str | PathLike[str], *, dpi: int = 100) -> None:
    """Three panels: distributions of gradients, ranges of their channels, and the diversity of all layers.

    Left: the share of elements in each bin of g / tau_0, on a logarithmic axis; middle: r_i / tau_0 of the channels,
    the widest first, with lines between four groups; both for at most four layers that span the diversities. Right: the
    diversity of every layer with one range a tensor and with groups.

    Args:
        found: of `gradient_ranges`. file: its suffix is the format. dpi: of pixel formats.

    Raises:
        ModuleNotFoundError: without matplotlib. ValueError: no layers.
    """
    if not found:
        raise ValueError("plot_ranges: no layers to draw")
    figure = new_figure((11, 3.4), "plot_ranges")
    left, middle, right = figure.subplots(1, 3)
    middles = (np.arange(BINS) - BINS // 2) * 2 / BINS
    for name in chosen(found):
        layer = found[name]
        counts = np.array(layer.counts, dtype=float)
        left.plot(middles, np.where(counts > 0, counts / counts.sum(), np.nan), label=name, linewidth=1.4)
        share = (np.arange(layer.channels) + 0.5) / layer.channels
        middle.plot(share, np.maximum(layer.ranges, FLOOR), linewidth=1.4, marker=".", markersize=3)
    left.set(yscale="log", xlabel="gradient / its largest magnitude", title="share of elements a bin")
    left.legend(frameon=False, fontsize=7)
    middle.set_yscale("log", base=2)
    for bound in (0.5, 0.25, 0.125):
        middle.axhline(bound, color="gray", linestyle=":", linewidth=0.9)
    middle.set(xlabel="channels, the widest first", title="range / largest range")
    places = np.arange(len(found))
    for offset, field, label in ((-0.2, "diversity", "one range"), (0.2, "grouped", "groups")):
        right.bar(places + offset, [getattr(layer, field) for layer in found.values()], 0.4, label=label)
    _ticks(right, list(found))
    if max(layer.diversity for layer in found.values()) > FAR:
        right.set_yscale("log")
    right.set(title="range that quantizes a channel / its own")
    right.legend(frameon=False, fontsize=7)
    _finish(figure, (left, middle, right), file, dpi)


def plot_norms(
    series: Mapping[str, NormStatistics], file: str | PathLike[str], *, along: str = "", dpi: int = 100
) -> None:
    """Three panels over the series: both norms, the gap of their reciprocals, and its relative size.

    Args:
        series: label -> norms, in the order of the horizontal axis: layers of one moment, or moments of one layer.
        file: its suffix is the format. along: what the labels are. dpi: of pixel formats.

    Raises:
        ModuleNotFoundError: without matplotlib. ValueError: nothing to draw.
    """
    if not series:
        raise ValueError("plot_norms: no norms to draw")
    figure = new_figure((11, 3.2), "plot_norms")
    panels = figure.subplots(1, 3)
    titles = ("norm of x - mean, a channel", "|1/quantized - 1/norm|", "the same, relative")
    for axes, title, field in zip(panels, titles, ("norm", "gap", "relative"), strict=True):
        for name, marker in (("l1", "o"), ("l2", "s")):
            values = [getattr(getattr(one, name), field) for one in series.values()]
            shown = [value if value > 0 else np.nan for value in values]  # zeros have no place on the axis
            axes.plot(shown, marker=marker, markersize=3.5, linewidth=1.4, label=name.upper())
        _ticks(axes, list(series))
        axes.set(title=title, xlabel=along)
        if field != "relative":
            axes.set_yscale("log")
        elif any(one.l1.relative or one.l2.relative for one in series.values()):
            axes.set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize=8)
    _finish(figure, panels, file, dpi)


def _ticks(axes: Any, labels: Sequence[str]) -> None:
    every = -(-len(labels) // LONGEST)
    axes.set_xticks(range(0, len(labels), every), labels[::every], rotation=60, ha="right")


def _finish(figure: Any, panels: Sequence[Any], file: str | PathLike[str], dpi: int) -> None:
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.tick_params(which="both", labelsize=7)
        axes.title.set_fontsize(9)
        axes.xaxis.label.set_fontsize(8)
    figure.savefig(file, dpi=dpi)
