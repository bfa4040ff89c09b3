"""Colours, markers and line styles that mean the same thing everywhere on the page.

Colours are names of CSS variables, which differ in light and dark; beside the colour, the marker tells series apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from .markup import Markup, el

MARKERS = "os^DvPX*"
SHAPES = {
    "o": "M17 4a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
    "s": "M13.5 4.5h7v7h-7z",
    "^": "M17 3.5l4.5 8h-9z",
    "D": "M17 3l5 5l-5 5l-5-5z",
    "v": "M17 12.5l4.5-8h-9z",
    "P": "M15.5 3.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "X": "M13 6l2-2l2 2l2-2l2 2l-2 2l2 2l-2 2l-2-2l-2 2l-2-2l2-2z",
    "p": "M17 3l4.8 3.5l-1.8 5.6h-6l-1.8-5.6z",
    "*": "M17 3l1.3 3.6l3.9.1l-3.1 2.3l1.1 3.7l-3.2-2.2l-3.2 2.2l1.1-3.7l-3.1-2.3l3.9-.1z",
}


@dataclass(frozen=True)
class Look:
    """How a series is drawn: `color` is a CSS variable's name, `marker` one of matplotlib's."""

    color: str
    marker: str


def of_level(level: str) -> Look:
    """A precision ("1" to "8"), or a float network."""
    if level.isdigit() and 1 <= int(level) <= 8:
        return Look(f"c{level}", MARKERS[int(level) - 1])
    return Look("float", "p")


def of_number(index: int) -> Look:
    """The series of number `index`, where series are runs or parts; repeats after 8."""
    order = (4, 1, 3, 2, 7, 6, 5, 8)
    bits = order[index % 8]
    return Look(f"c{bits}", MARKERS[bits - 1])


def named(level: str) -> str:
    """ "4 bits", "1 bit", or the level's own name."""
    return f"{level} bit{'s' if level != '1' else ''}" if level.isdigit() else level


def ordered(levels: set[str]) -> list[str]:
    """Float first, then the widest precision."""
    return sorted(levels, key=lambda level: (level.isdigit(), -int(level) if level.isdigit() else 0, level))


def key(looks: dict[str, Look], *, dashed: dict[str, str] | None = None, boxes: bool = False) -> Markup:
    """A legend: label -> look, with lines and markers, or with boxes; `dashed` maps a label to "solid" or "dashed"."""
    items = [el("li", _box(look) if boxes else _line(look), label) for label, look in looks.items()]
    for label, style in (dashed or {}).items():
        items.append(el("li", _plain(style), label))
    return el("ul", *items, class_="key")


def _svg(*children: Markup) -> Markup:
    return el("svg", *children, viewBox="0 0 34 16", width="34", height="16", aria_hidden="true")


def _line(look: Look) -> Markup:
    color = f"var(--{look.color})"
    line = el("path", d="M1 8H33", style=f"stroke:{color};stroke-width:2;fill:none")
    return _svg(line, el("path", d=SHAPES[look.marker], style=f"fill:{color}"))


def _plain(style: str) -> Markup:
    dash = ";stroke-dasharray:4 3" if style == "dashed" else ""
    return _svg(el("path", d="M1 8H33", style=f"stroke:var(--ink);stroke-width:2;fill:none{dash}"))


def _box(look: Look) -> Markup:
    return el("span", class_="box", style=f"background:var(--{look.color})")
