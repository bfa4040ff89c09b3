"""A page a paper: their number, ours, the gap, our verdict, a plot a table."""

from __future__ import annotations

import os
from pathlib import Path

from .config import Table, load_table, tables
from .table import DIVERGED, read_paper, read_results


def write_page(root: Path, paper: str) -> Path:
    """Write <root>/<paper>/tables.md and a tables/<table>.png for each table that has results; returns the page.

    Reads results.csv, paper.csv and verdict.md of every table of the paper.
    """
    parts = [
        f"# {paper}: tables run again\n\nWritten by `bitstrata reproduce {paper} --page` from the files of each table."
    ]
    for name in [table for of, table in tables(root) if of == paper]:
        parts.append(_section(load_table(root, paper, name, "cpu")))
    page = root / paper / "tables.md"
    temporary = page.with_name(page.name + ".tmp")
    temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    os.replace(temporary, page)
    return page


def _section(table: Table) -> str:
    ours = read_results(table.folder / "results.csv")
    theirs = read_paper(table.folder / "paper.csv")
    lines = [f"## {table.name}: {table.title}", table.source]
    lines.append(f"    bitstrata reproduce {table.paper} {table.name} --scale cpu --root DIR")
    keys = [key for row in table.rows for key in dict.fromkeys([*ours, *theirs]) if key[0] == row.name]
    if not ours:
        lines.append("Not run yet.")
    if keys:
        lines.append(_rows(keys, ours, theirs))
    if ours and _plot(table, ours, theirs):
        lines.append(f"![{table.title}](tables/{table.name}.png)")
    verdict = table.folder / "verdict.md"
    if verdict.is_file():
        lines.append(verdict.read_text(encoding="utf-8").strip())
    return "\n\n".join(lines)


def _rows(
    keys: list[tuple[str, str]], ours: dict[tuple[str, str], dict[str, str]], theirs: dict[tuple[str, str], float]
) -> str:
    out = ["| row | metric | paper | ours | gap | seeds | epochs |", "|---|---|---|---|---|---|---|"]
    for row, metric in keys:
        line, paper = ours.get((row, metric)), theirs.get((row, metric))
        mine = "" if line is None else f"{float(line['mean']):.2f}"
        if line is not None and line["spread"]:
            mine += f" ± {float(line['spread']):.2f}"
        gap = "" if line is None or paper is None else f"{float(line['mean']) - paper:+.2f}"
        seeds, epochs = ("", "") if line is None else (line["seeds"], line["epochs"])
        out.append(
            f"| {row} | {metric} | {'' if paper is None else f'{paper:g}'} | {mine} | {gap} | {seeds} | {epochs} |"
        )
    return "\n".join(out)


def _plot(table: Table, ours: dict[tuple[str, str], dict[str, str]], theirs: dict[tuple[str, str], float]) -> bool:
    """A bar a row and a mark for the paper's number, one panel a metric; False if there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    metrics = [metric for metric in dict.fromkeys(metric for _, metric in ours) if metric != DIVERGED]
    names = [row.name for row in table.rows if any((row.name, m) in ours for m in metrics)]
    if not names:
        return False
    height = 1.2 + 0.28 * len(names)
    figure, axes = plt.subplots(1, len(metrics), figsize=(3.2 + 2.6 * len(metrics), height), squeeze=False, sharey=True)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for y, name in enumerate(names):
            line = ours.get((name, metric))
            if line is not None:
                axis.barh(y, float(line["mean"]), xerr=float(line["spread"] or 0), color="#4477aa", height=0.7)
            if (name, metric) in theirs:
                axis.plot(theirs[name, metric], y, "D", color="#cc6677", markersize=5)
        shown = [float(ours[n, metric]["mean"]) for n in names if (n, metric) in ours]
        shown += [theirs[n, metric] for n in names if (n, metric) in theirs]
        low, high = min(shown), max(shown)
        axis.set_xlim(max(low - 0.4 * (high - low) - 1, 0), high + 0.1 * (high - low) + 0.5)
        axis.set_title(metric, fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0][0].invert_yaxis()
    if theirs:
        figure.legend(
            handles=[
                Line2D([], [], color="#4477aa", linewidth=6, label="ours"),
                Line2D([], [], color="#cc6677", marker="D", linestyle="", label="paper"),
            ],
            loc="lower right", ncols=2, fontsize=8, frameon=False,
        )  # fmt: skip
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    (table.folder.parent / "tables").mkdir(exist_ok=True)
    figure.savefig(table.folder.parent / "tables" / f"{table.name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True
