"""Mixed precision, from `bitstrata plan`: accuracy against the bytes of weight codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import look
from ..chart import chart, color
from ..markup import Markup, el, join, table
from ..registry import Panel
from ..runs import Run, is_number, side_file

FIELDS = ("bits", "bytes", "accuracy")


def needs(run: Run) -> str | None:
    """Rows in plans.json."""
    if side_file(run, "plans.json") is None:
        return "no plans: `bitstrata plan` chooses a bit-width for each layer"
    return None if _rows(run) else "plans.json holds no plans"


def render(runs: Sequence[Run]) -> Markup:
    """All runs in one chart, and a table a run."""
    styles = {run.name: look.of_number(i) for i, run in enumerate(runs)}

    def draw(axes: Any, narrow: bool) -> None:
        for run in runs:
            style, rows = styles[run.name], _rows(run)
            x, y = [row["bytes"] / 1024 for row in rows], [100 * row["accuracy"] for row in rows]
            axes.plot(x, y, color=color(style.color), marker=style.marker, markersize=6)
        axes.margins(x=0.06, y=0.14)
        axes.set_xlabel("KiB of weight codes")
        axes.set_title("accuracy, %" if narrow else "accuracy of the integer engine, %")

    legend = look.key(styles) if len(runs) > 1 else Markup()
    picture = chart("Accuracy against bytes of weight codes. " + " ".join(map(_described, runs)), draw, alone=True)
    tables = [
        table(f"{run.name}: plans", ("plan", "bits a weight", "bytes", "accuracy"), [_cells(row) for row in _rows(run)])
        for run in runs
    ]
    return join((el("div", el("figure", legend, picture), class_="figures"), *tables))


def _rows(run: Run) -> list[dict[str, Any]]:
    found = (side_file(run, "plans.json") or {}).get("rows")
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    return sorted((row for row in rows if all(is_number(row.get(f)) for f in FIELDS)), key=lambda row: row["bytes"])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return str(row.get("name", "–")), f"{row['bits']:.2f}", f"{row['bytes']:,}", f"{row['accuracy']:.2%}"


def _described(run: Run) -> str:
    points = ", ".join(f"{row['accuracy']:.2%} at {row['bytes'] / 1024:.1f} KiB" for row in _rows(run))
    return f"{run.name}: {points}."


PANEL = Panel(
    "Mixed precision",
    "Each point is a bit-width a layer, chosen for the least weight error within a budget, with normalizations fitted "
    "to it.",
    25,
    needs,
    render,
)
