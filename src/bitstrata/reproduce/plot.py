"""The picture of a table: our numbers as points, the paper's as diamonds."""

from __future__ import annotations

from dataclasses import dataclass

from .config import Table
from .table import DIVERGED

Lines = dict[tuple[str, str], dict[str, str]]  # (row, metric) -> a line of results.csv


@dataclass(frozen=True)
class _Point:
    """One line of results.csv in a panel: its place, its precision ("" if it has none) and the paper's number."""

    y: float
    level: str
    mean: float
    spread: float
    paper: float | None


def draw(table: Table, ours: Lines, theirs: dict[tuple[str, str], float]) -> bool:
    """Write <paper>/tables/<table>.png; False if there is nothing to draw. Needs matplotlib.

    A panel a kind of metric, a point a row and precision, a diamond for the paper's number. A row's precisions lie one
    below the other in order of width; their colour says which they are.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    metrics = [metric for metric in dict.fromkeys(metric for _, metric in ours) if metric != DIVERGED]
    kinds = list(dict.fromkeys(metric.partition("@")[0] for metric in metrics))
    names = [row.name for row in table.rows if any((row.name, m) in ours for m in metrics)]
    if not names:
        return False
    levels = {(n, k): _levels(ours, n, k) for n in names for k in kinds}
    slots = [max(len(levels[n, k]) for k in kinds) for n in names]
    starts = [sum(slots[:i]) + 0.6 * i for i in range(len(names))]
    shown = sorted({level for found in levels.values() for level in found if level}, key=_width)
    colours = {level: plt.get_cmap("viridis")(0.1 + 0.75 * i / max(len(shown) - 1, 1)) for i, level in enumerate(shown)}
    height = 1.4 + 0.2 * (sum(slots) + 0.6 * len(names))
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.6 + 3.2 * len(kinds), height), squeeze=False, sharey=True)
    for axis, kind in zip(axes[0], kinds, strict=True):
        points = []
        for name, start in zip(names, starts, strict=True):
            for i, level in enumerate(levels[name, kind]):
                key = (name, f"{kind}@{level}" if level else kind)
                mean, spread = float(ours[key]["mean"]), float(ours[key]["spread"] or 0)
                points.append(_Point(start + i, level, mean, spread, theirs.get(key)))
        for point in points:
            colour = colours.get(point.level, "#4477aa")
            axis.errorbar(point.mean, point.y, xerr=point.spread or None, fmt="o", color=colour, markersize=6)
            if point.paper is not None:
                axis.plot(point.paper, point.y, "D", color="#cc6677", markersize=4)
        ends = [point.mean for point in points] + [point.paper for point in points if point.paper is not None]
        low, high = min(ends), max(ends)
        axis.set_xlim(max(low - 0.4 * (high - low) - 1, 0), high + 0.1 * (high - low) + 0.5)
        axis.set_title(kind.replace("_", " "), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0][0].set_yticks([at + (n - 1) / 2 for at, n in zip(starts, slots, strict=True)], names, fontsize=8)
    axes[0][0].invert_yaxis()
    handles = [Line2D([], [], color=colours[level], marker="o", linestyle="", label=_bits(level)) for level in shown]
    if theirs:
        handles.append(Line2D([], [], color="#cc6677", marker="D", linestyle="", label="paper"))
    if handles:
        figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.35 / height, 1, 1))
    (table.folder.parent / "tables").mkdir(exist_ok=True)
    figure.savefig(table.folder.parent / "tables" / f"{table.name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True


def _levels(ours: Lines, row: str, kind: str) -> list[str]:
    """Precisions at which a row has the metric, the narrowest first."""
    found = (metric.partition("@") for name, metric in ours if name == row)
    return sorted({level for base, _, level in found if base == kind}, key=_width)


def _width(level: str) -> tuple[int, str]:
    return (int(level), level) if level.isdigit() else (0, level)


def _bits(level: str) -> str:
    return f"{level} bit{'' if level == '1' else 's'}" if level.isdigit() else level
