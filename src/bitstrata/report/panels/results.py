"""What was reached: accuracies and bytes of every precision, with the spread over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import look
from ..markup import Markup, el, note, table
from ..registry import Panel
from ..runs import Group, Run, groups, is_number

COLUMNS = {
    "engine_accuracy": "integer engine",
    "fake_accuracy": "fake-quantized",
    "float_accuracy": "float",
    "top1_agreement": "same class",
}


def needs(run: Run) -> str | None:
    """Rows of results."""
    return None if run.rows else "no results yet; they are written when a run is complete"


def render(runs: Sequence[Run]) -> Markup:
    """One table, a row for each precision, under a heading for each group."""
    found = groups(runs)
    rows: list[list[object]] = []
    for group in found:
        rows += [[group.label]] if len(found) > 1 else []
        rows += _rows(group)
    several = any(len(group.runs) > 1 for group in found)
    refused = [
        note(f"{run.name}: no artifact: {run.results['no_artifact']}") for run in runs if "no_artifact" in run.results
    ]
    remark = note("Mean over a group's runs, with the least and the largest below.") if several else Markup()
    head = ["bits", *COLUMNS.values(), "bytes read"]
    return el("div", table("Accuracy on the test set", head, rows, hidden_caption=True), remark, *refused)


def _rows(group: Group) -> list[list[object]]:
    found: list[list[object]] = []
    for bits in sorted({row["bits"] for run in group.runs for row in run.rows}, reverse=True):
        mine = [row for run in group.runs for row in run.rows if row["bits"] == bits]
        shares = [spread(mine, name) for name in COLUMNS]
        found.append([swatch(str(bits)), *shares, sizes(mine)])
    return found


def swatch(level: str) -> Markup:
    """The number of bits beside its colour."""
    color = look.of_level(level).color
    return el(
        "span", el("span", class_="box", style=f"background:var(--{color})", aria_hidden="true"), level, class_="level"
    )


def spread(rows: Sequence[dict[str, Any]], name: str) -> Markup | str:
    """Mean of a share in percent, with its range over seeds; a dash where there is none."""
    values = [100 * row[name] for row in rows if is_number(row.get(name))]
    if not values:
        return "–"
    mean = f"{sum(values) / len(values):.2f}"
    if len(values) == 1:
        return f"{mean} %"
    if f"{min(values):.2f}" == f"{max(values):.2f}":
        return f"{mean} %"
    return el("span", f"{mean} %", el("small", f"{min(values):.2f} to {max(values):.2f}"), class_="spread")


def sizes(rows: Sequence[dict[str, Any]]) -> str:
    """Bytes read, or their range."""
    values = sorted({int(value) for row in rows if is_number(value := bytes_of(row))})
    return "–" if not values else " to ".join(f"{value:,}" for value in dict.fromkeys((values[0], values[-1])))


def bytes_of(row: dict[str, Any]) -> Any:
    """Bytes that a device reads to run at the row's precision; None where it is not known."""
    return row.get("bytes", row.get("bytes_fetched"))


PANEL = Panel(
    "Results",
    "Top-1 accuracy on the test set at every precision. The integer engine runs the packed artifact; “same class” is "
    "how often it agrees with the fake-quantized network evaluated in float64; bytes are those that a device reads.",
    10,
    needs,
    render,
)
