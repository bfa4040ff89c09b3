"""What one more bit costs and brings: accuracy against the bytes that a device reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import look
from ..chart import chart, color
from ..markup import Markup, el
from ..registry import Panel
from ..runs import Group, Run, groups, is_number
from .results import bytes_of

#: Where a point's label stands, by number of its series, so that those of neighbouring points seldom meet.
PLACES = ((0, 9), (0, -19), (12, -4), (-12, -4))

Row = tuple[int, float, float, float, float]  # bits, KiB, mean, least and largest accuracy in percent


def needs(run: Run) -> str | None:
    """Rows with bytes and the engine's accuracy."""
    if not run.rows:
        return "no results yet; they are written when a run is complete"
    return None if any(map(_known, run.rows)) else "its results name no bytes, as there is no artifact"


def render(runs: Sequence[Run]) -> Markup:
    """All groups in one chart."""
    found = groups(runs)
    points = [(group, look.of_number(i), _points(group)) for i, group in enumerate(found)]

    def draw(axes: Any, narrow: bool) -> None:
        for i, (_, style, rows) in enumerate(points):
            tone = color(style.color)
            x, y = [row[1] for row in rows], [row[2] for row in rows]
            axes.plot(x, y, color=tone, marker=style.marker, markersize=7)
            if any(row[4] > row[3] for row in rows):
                axes.vlines(x, [row[3] for row in rows], [row[4] for row in rows], color=tone, linewidth=1.4)
            for row in rows:
                shift = {"xytext": PLACES[i % len(PLACES)], "textcoords": "offset points", "ha": "center"}
                axes.annotate(f"{row[0]}", (row[1], row[2]), fontsize=11, color=color("ink"), **shift)
        axes.margins(x=0.09, y=0.16)
        axes.set_xlabel("KiB read")
        axes.set_title(
            "accuracy of the integer engine, %; numbers are bits" if not narrow else "accuracy, %; numbers are bits"
        )
        axes.xaxis.get_major_locator().set_params(nbins=5 if narrow else 8)

    legend = look.key({group.label: style for group, style, _ in points}) if len(points) > 1 else Markup()
    picture = chart(_described(points), draw, alone=True)
    return el("div", el("figure", legend, picture), class_="figures")


def _known(row: dict[str, Any]) -> bool:
    return is_number(bytes_of(row)) and is_number(row.get("engine_accuracy"))


def _points(group: Group) -> list[Row]:
    found = []
    rows = [row for run in group.runs for row in run.rows if _known(row)]
    for bits in sorted({row["bits"] for row in rows}):
        mine = [row for row in rows if row["bits"] == bits]
        shares = [100 * row["engine_accuracy"] for row in mine]
        size = sum(bytes_of(row) for row in mine) / len(mine) / 1024
        found.append((bits, size, sum(shares) / len(shares), min(shares), max(shares)))
    return found


def _described(points: Sequence[tuple[Group, look.Look, list[Row]]]) -> str:
    parts = [
        f"{group.label}: " + ", ".join(f"{look.named(str(b))} {y:.2f} % at {x:.1f} KiB" for b, x, y, _, _ in rows)
        for group, _, rows in points
    ]
    return "Accuracy of the integer engine against bytes read. " + "; ".join(parts)


PANEL = Panel(
    "Accuracy against bytes",
    "Each point is one precision of one artifact; bars are the range over seeds. The table above has the numbers.",
    20,
    needs,
    render,
)
