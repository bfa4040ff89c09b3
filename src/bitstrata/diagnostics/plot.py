"""Loss surfaces side by side, on one scale."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .landscape import Landscape

FORMS = ("contour", "surface")
LEVELS = 16


def plot_landscape(
    results: Mapping[str, Landscape],
    file: str | PathLike[str],
    *,
    form: str = "contour",
    highest: float | None = None,
    dpi: int = 100,
) -> None:
    """Draw surfaces as panels side by side, or lines in one panel, with a scale common to all.

    Args:
        results: title -> Landscape, all of two dimensions or all of one.
        file: where to; its suffix is the format ("png", "svg", "pdf").
        form: of surfaces: "contour", lines of equal loss over colours, or "surface", in perspective.
        highest: the loss where the scale ends, in lines too; larger ones are drawn as this. None for the largest
            finite one.
        dpi: of pixel formats.

    Points of NaN or infinity are left blank.

    Raises:
        ModuleNotFoundError: without matplotlib. ValueError: nothing to draw, dimensions that differ, no finite loss,
            another form, or a `highest` that is not above the lowest loss.
    """
    if form not in FORMS:
        raise ValueError(f"plot_landscape: form must be one of {', '.join(FORMS)}, got {form!r}")
    low, high = _range(results, highest)
    flat = next(iter(results.values())).y is None
    figure = new_figure((5.2, 3.6) if flat else (3.1 * len(results) + 0.9, 3.3), "plot_landscape")
    if flat:
        _lines(figure, results, low, high)
    else:
        _panels(figure, results, form, low, high)
    figure.savefig(file, dpi=dpi)


def new_figure(size: tuple[float, float], where: str) -> Any:
    """A figure of matplotlib's of that size in inches, drawn in memory. `where` names the caller in the
    ModuleNotFoundError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{where}: needs matplotlib; pip install "bitstrata[train]"') from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _range(results: Mapping[str, Landscape], highest: float | None) -> tuple[float, float]:
    if not results:
        raise ValueError("plot_landscape: results is empty")
    if len({result.loss.ndim for result in results.values()}) != 1:
        shapes = {name: result.loss.shape for name, result in results.items()}
        raise ValueError(f"plot_landscape: surfaces and lines do not go together, got {shapes}")
    everything = np.concatenate([result.loss.reshape(-1) for result in results.values()])
    finite = everything[np.isfinite(everything)]
    if finite.size == 0:
        raise ValueError("plot_landscape: no loss is finite")
    low, high = float(finite.min()), float(finite.max() if highest is None else highest)
    if highest is not None and not low < highest < float("inf"):
        raise ValueError(f"plot_landscape: highest must be finite and above the lowest loss {low:g}, got {highest!r}")
    return low, max(high, low + 1e-9 * max(1.0, abs(low)))


def _drawn(result: Landscape, high: float) -> NDArray[np.float64]:
    return np.where(np.isfinite(result.loss), np.minimum(result.loss, high), np.nan)


def _lines(figure: Any, results: Mapping[str, Landscape], low: float, high: float) -> None:
    axes = figure.subplots()
    for name, result in results.items():
        axes.plot(result.x, _drawn(result, high), label=name, linewidth=1.6)
    axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    axes.set_xlabel("along the direction")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def _panels(figure: Any, results: Mapping[str, Landscape], form: str, low: float, high: float) -> None:
    kind = {"projection": "3d"} if form == "surface" else {}
    panels = figure.subplots(1, len(results), squeeze=False, subplot_kw=kind)[0]
    levels = np.linspace(low, high, LEVELS)
    drawn = None
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        values = np.ma.masked_invalid(_drawn(result, high))
        if form == "surface":
            x, y = np.meshgrid(result.x, np.asarray(result.y))
            drawn = axes.plot_surface(
                x, y, values.filled(np.nan), cmap="viridis", vmin=low, vmax=high, rcount=60, ccount=60, linewidth=0
            )
            axes.set_zlim(low, high)
        else:
            drawn = axes.contourf(result.x, result.y, values, levels=levels, cmap="viridis")
            axes.contour(result.x, result.y, values, levels=levels, colors="white", linewidths=0.5, alpha=0.7)
            axes.plot(0, 0, marker="+", color="red", markersize=7)
            axes.set_aspect("equal")
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=7)
        axes.locator_params(nbins=5)
    figure.colorbar(
        drawn, ax=list(panels), label="loss", shrink=0.75, format="%.2f", pad=0.06 if form == "surface" else 0.02
    )
