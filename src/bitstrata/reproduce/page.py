"""A page a paper: their number, ours, the gap, our verdict, a plot a table."""

from __future__ import annotations

import os
from pathlib import Path

from .config import Table, load_table, tables
from .plot import draw
from .table import read_paper, read_results


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
    if ours and draw(table, ours, theirs):
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
