"""HTML from Python values: text is escaped unless it is markup already."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Any value as HTML: markup as it is, everything else escaped."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(parts: Iterable[object], between: str = "") -> Markup:
    """Parts one after the other."""
    return Markup(between.join(text(part) for part in parts))


def el(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Attributes: `class_` for class, `aria_label` for aria-label; True stands alone, None and False go."""
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in ("br", "input", "meta", "link"):
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def table(
    caption: str,
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    hidden_caption: bool = False,
    words: bool = False,
) -> Markup:
    """A table that scrolls inside itself where it is too wide; the first cell of a row is the row's header.

    A row of one cell is a heading over the rows after it. words: cells hold words, not numbers, and are set from the
    left.
    """
    columns = el("tr", *(el("th", cell, scope="col") for cell in head))
    body = [el("tr", *_cells(row, len(head))) for row in rows]
    title = el("caption", caption, class_="unseen" if hidden_caption else None)
    inside = el("table", title, el("thead", columns), el("tbody", *body), class_="words" if words else None)
    return el("div", inside, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cells(row: Sequence[object], columns: int) -> list[Markup]:
    if len(row) == 1 < columns:
        return [el("th", row[0], colspan=columns, scope="rowgroup")]
    return [el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:])]


def details(summary: str, *children: object) -> Markup:
    """Something that opens when asked for."""
    return el("details", el("summary", summary), *children)


def note(value: object) -> Markup:
    """A short remark."""
    return el("p", value, class_="note")


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
