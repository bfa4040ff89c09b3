"""Charts: matplotlib's SVG, drawn for each width of screen, in colours that the page's CSS decides."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from .markup import Markup, el

#: Width and height in CSS pixels of the forms, of which the page's CSS shows one.
FORMS = {"full": (1040, 330), "wide": (500, 270), "narrow": (300, 240)}

#: Room around the axes for labels, in the same pixels.
LEFT, RIGHT, ABOVE, BELOW = 48, 10, 24, 42

#: Colours of the drawing that stand for CSS variables.
NAMES = ("ink", "muted", "line", "float", *(f"c{i}" for i in range(1, 9)))
TOKENS = {name: f"#0a0b{i:02x}" for i, name in enumerate(NAMES, 16)}

STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 12.5,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": TOKENS["line"],
    "axes.labelcolor": TOKENS["muted"],
    "axes.titlecolor": TOKENS["muted"],
    "axes.titlesize": 12.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": TOKENS["line"],
    "grid.linewidth": 0.8,
    "text.color": TOKENS["ink"],
    "xtick.color": TOKENS["line"],
    "ytick.color": TOKENS["line"],
    "xtick.labelcolor": TOKENS["muted"],
    "ytick.labelcolor": TOKENS["muted"],
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.linewidth": 2,
    "lines.markersize": 5,
}


def color(name: str) -> str:
    """What to draw with so that the page shows the CSS variable `name`. KeyError for a name that is none of NAMES."""
    return TOKENS[name]


def chart(description: str, draw: Callable[[Any, bool], None], *, alone: bool = False) -> Markup:
    """An image with `description` as its text alternative.

    draw: called with matplotlib axes and whether the form is the narrow one; draws with `color`. alone: nothing stands
    beside the chart, so it may be as wide as the page. Raises ModuleNotFoundError without matplotlib.
    """
    forms = [_svg(description, draw, form) for form in FORMS if alone or form != "full"]
    return el("div", *forms, class_="chart alone" if alone else "chart")


def logarithmic(axes: Any, low: float, high: float, base: float = 10) -> None:
    """A logarithmic y axis for values from low > 0 to high, with labels that fit beside it."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log", base=base)
    axes.minorticks_off()
    axes.set_ylim(low / 1.3, high * 1.3)
    axes.yaxis.set_major_locator(LogLocator(base, (1, 2, 5) if base == 10 and high < 100 * low else (1,), numticks=7))
    axes.yaxis.set_major_formatter(lambda value, _: f"1/{1 / value:.0f}" if base == 2 and value < 1 else f"{value:.3g}")


def require() -> None:
    """Raise ModuleNotFoundError that says what to install, if matplotlib is absent."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'report: needs matplotlib; install it with: pip install "bitstrata[train]"'
        ) from error


def _svg(description: str, draw: Callable[[Any, bool], None], form: str) -> Markup:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    width, height = FORMS[form]
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # A salt of its own keeps the names inside one drawing apart from those of all others, and the same every time.
    with mpl.rc_context({**STYLE, "svg.hashsalt": f"{description} {form}"}):
        figure = Figure(figsize=(width / 72, height / 72))
        FigureCanvasSVG(figure)
        # Margins that are the same everywhere let charts that stand beside each other be compared.
        place = (LEFT / width, BELOW / height, (width - LEFT - RIGHT) / width, (height - BELOW - ABOVE) / height)
        draw(figure.add_axes(place), form == "narrow")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return _inline(stream.getvalue(), description, form)


def _inline(svg: str, description: str, form: str) -> Markup:
    """The drawing as a part of a page: without a document's head, with CSS variables for colours."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    for name, token in TOKENS.items():
        body = body.replace(token, f"var(--{name})")
    body = re.sub(r"\s*\n\s*", "\n", body)
    box = " ".join(map(str, (0, 0, *FORMS[form])))
    return el("svg", Markup(body), class_=form, viewBox=box, role="img", aria_label=description)
