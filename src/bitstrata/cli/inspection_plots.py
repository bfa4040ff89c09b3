"""What `bitstrata inspect` draws: weights on their grids, layer by layer, precisions against each other, over time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitstrata import report
from bitstrata.report.diagnosis import VALUES, of_layers, stages
from bitstrata.report.look import named
from bitstrata.report.panels.by_layer import inspected
from bitstrata.report.runs import Stage

TONES = ("#c4500a", "#a8447f", "#0a7d5c", "#0b6bb5", "#3f7fa6", "#857000", "#6a4fb0", "#6b5a4b")
COLORS = {str(bits): tone for bits, tone in enumerate(TONES, 1)}
MARKERS = {str(bits): marker for bits, marker in enumerate("os^DvPX*", 1)}
COLUMNS = 3
WHOLE = {"moo_factor": "factors (MGD)", "moo_norm": "gradient norms", "kappa0": "kappa_0", "R_w": "R_w", "R_a": "R_a"}


def draw(directory: Path, found: Mapping[str, Any], views: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Draw everything there is; returns the files written.

    found: of `inspection.inspect`. views: of `train.snapshot.layers`.
    """
    levels = sorted(found["precisions"], key=int, reverse=True)
    written = [
        _weights(directory / "inspect.png", views, levels),
        _by_layer(directory / "inspect-layers.png", found["precisions"], levels),
    ]
    if found["objectives"] is not None:
        written.append(_objectives(directory / "inspect-objectives.png", found["objectives"]))
    measured = stages(report.read(directory))
    for stage in measured[-1:]:
        written += _over_time(directory, stage, levels)
    return written


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any, Callable[[Path], Path]]:
    """A figure, its axes (all of them switched off) and what saves it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across, down = width * columns, height * rows + 0.7
    figure = Figure(figsize=(across, down))
    FigureCanvasAgg(figure)
    # Room in inches: a layout that matplotlib computes takes a hundred times as long where there are many axes.
    place = {"left": 0.45 / across, "right": 1 - 0.1 / across, "bottom": 0.4 / down, "top": 1 - 0.6 / down}
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={**place, "hspace": 0.5, "wspace": 0.22})
    for axis in axes.ravel():
        axis.axis("off")
        axis.tick_params(labelsize=7)

    def save(path: Path) -> Path:
        figure.savefig(path, dpi=110)
        return path

    return figure, axes, save


def _headed(figure: Any, text: str) -> None:
    figure.text(0.5, 1 - 0.15 / figure.get_figheight(), text, ha="center", va="center", fontsize=9)


def _keyed(figure: Any, axis: Any) -> None:
    """What the lines of all axes are, above them."""
    figure.legend(*axis.get_legend_handles_labels(), loc="upper center", ncols=8, fontsize=8, frameon=False)


def _opened(axis: Any, title: str) -> Any:
    axis.axis("on")
    axis.set_title(title, fontsize=8)
    return axis


def _weights(path: Path, views: Sequence[Mapping[str, Any]], levels: Sequence[str]) -> Path:
    """Histogram of the weights before quantization, levels as lines, the share on each as a stem (UniQ, figure 3)."""
    figure, axes, save = _figure(max(len(views), 1), len(levels), 3.4, 1.5)
    for row, layer in zip(axes, views, strict=False):
        for axis, bits in zip(row, levels, strict=True):
            view = layer["precisions"].get(bits)
            if view is None:
                continue
            _opened(axis, f"{layer['name']}, {named(bits)}")
            low, high = view["range"]
            edges = [low + (high - low) * i / len(view["counts"]) for i in range(len(view["counts"]) + 1)]
            tallest = max(*view["counts"], 1)
            axis.stairs([count / tallest for count in view["counts"]], edges, fill=True, color="#c9d1db")
            room = 0.6 * (high - low) or 1.0
            inside = [
                (at, share)
                for at, share in zip(view["levels"], view["used"], strict=True)
                if low - room <= at <= high + room
            ]
            most = max([share for _, share in inside], default=0.0) or 1.0
            if len(inside) <= 40:
                axis.vlines([at for at, _ in inside], 0, 1.05, color="#888888", linewidth=0.6, linestyle=":")
            axis.vlines(
                [at for at, _ in inside], 0, [share / most for _, share in inside], color=COLORS["1"], linewidth=1.6
            )
            axis.set_ylim(0, 1.08)
            axis.set_yticks([])
    _headed(figure, "weights before quantization (grey), levels of the grid (dotted), share on each level")
    return save(path)


def _by_layer(path: Path, precisions: Mapping[str, Any], levels: Sequence[str]) -> Path:
    """Values of every layer, from the first to the last (MaQD, figures 4 and 5)."""
    found = inspected(precisions)
    order = list(dict.fromkeys(layer for by_level in found.values() for part in by_level.values() for layer in part))
    figure, axes, save = _figure(-(-len(found) // COLUMNS), COLUMNS, 3.7, 2.1)
    for axis, (name, by_level) in zip(axes.ravel(), found.items(), strict=False):
        _opened(axis, VALUES[name].title)
        for bits in levels:
            points = by_level.get(bits, {})
            x = [i for i, layer in enumerate(order, 1) if layer in points]
            y = [points[layer] for layer in order if layer in points]
            axis.plot(x, y, color=COLORS[bits], marker=MARKERS[bits], markersize=3, linewidth=1.2, label=named(bits))
        band = VALUES[name].band
        if band is not None:
            axis.axhspan(*band, color="#c9d1db", alpha=0.5, linewidth=0)
        if VALUES[name].log and all(value > 0 for part in by_level.values() for value in part.values()):
            axis.set_yscale("log")
        axis.set_xlim(0.5, len(order) + 0.5)
    _keyed(figure, axes.ravel()[0])
    figure.text(
        0.5,
        0.08 / figure.get_figheight(),
        f"layer, 1 ({order[0]}) to {len(order)} ({order[-1]})",
        ha="center",
        fontsize=8,
    )
    return save(path)


def _objectives(path: Path, geometry: Mapping[str, Any]) -> Path:
    """Losses, gradient norms, factors and cosines of the precisions."""
    levels = [str(bits) for bits in geometry["precisions"]]
    _, axes, save = _figure(1, 4, 2.6, 2.2)
    titles = {"losses": "loss", "norms": "gradient norm", "factors": "factor (MGD)"}
    for axis, (name, title) in zip(axes[0], titles.items(), strict=False):
        values = [0.0 if value is None else value for value in geometry[name]]
        _opened(axis, title).bar(levels, values, color=[COLORS[bits] for bits in levels], width=0.7)
        axis.set_xlabel("bits", fontsize=8)
    axis = _opened(axes[0][3], "cosine of the gradients")
    table = [[0.0 if value is None else value for value in row] for row in geometry["cosines"]]
    axis.imshow(table, cmap="RdBu", vmin=-1, vmax=1)
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value > 0.6 else "k")
    axis.set_xticks(range(len(levels)), levels)
    axis.set_yticks(range(len(levels)), levels)
    return save(path)


def _over_time(directory: Path, stage: Stage, levels: Sequence[str]) -> list[Path]:
    """What was measured during training: layers, one line each, and the whole network."""
    layers, written = of_layers(stage), []
    names = [name for name in VALUES if any(name in tracks for tracks in layers.values())]
    if names:
        written.append(_layers_over_time(directory / "inspect-time.png", layers, names, levels))
    series = {name: found for name in WHOLE if (found := stage.series("diagnosis", f"whole.{name}"))}
    if series:
        figure, axes, save = _figure(1, len(series), 3.0, 2.2)
        for axis, (name, by_level) in zip(axes[0], series.items(), strict=True):
            _opened(axis, WHOLE[name]).set_xlabel("epoch", fontsize=8)
            for bits, points in by_level.items():
                axis.plot(
                    *zip(*points, strict=True), color=COLORS.get(bits, "#5d6875"), label=named(bits), linewidth=1.2
                )
        _keyed(figure, axes[0][0])
        written.append(save(directory / "inspect-precisions.png"))
    return written


def _layers_over_time(path: Path, layers: Mapping[str, Any], names: Sequence[str], levels: Sequence[str]) -> Path:
    """A row a value, a column a precision (of flips: a stratum, in as many rows), a line a layer (UniQ, figure 4)."""
    import matplotlib as mpl

    strata = sorted({key for tracks in layers.values() for key in tracks.get("flips", {})})
    wide = max(len(levels), 3)
    rows: list[tuple[str, Sequence[str]]] = [(name, levels) for name in names if name != "flips"]
    rows += [("flips", strata[i : i + wide]) for i in range(0, len(strata), wide)]
    figure, axes, save = _figure(len(rows), wide, 2.7, 1.7)
    tones = mpl.colormaps["viridis"]
    for row, (name, keys) in zip(axes, rows, strict=True):
        for axis, key in zip(row, keys, strict=False):
            _opened(axis, f"{VALUES[name].title}\n{f'stratum {key}' if name == 'flips' else named(key)}")
            axis.title.set_fontsize(7)
            for i, tracks in enumerate(layers.values()):
                points = tracks.get(name, {}).get(key, [])
                if points:
                    tone = tones(0.9 * i / max(len(layers) - 1, 1))
                    axis.plot(*zip(*points, strict=True), color=tone, linewidth=0.9)
            if VALUES[name].log:
                axis.set_yscale("log")
    _headed(figure, "over epochs; a line a layer, the first one dark, the last one light")
    return save(path)
