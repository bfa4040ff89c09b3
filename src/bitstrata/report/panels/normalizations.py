"""What normalizations divide by, from `bitstrata inspect`: L1 and L2 norms, and what eight bits make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import look
from ..chart import chart, color, logarithmic
from ..markup import Markup, details, el, join, table
from ..registry import Panel
from ..runs import Run, is_number, side_file

HEAD = ("normalization", "channels", "L1 norm", "L2 norm", "gap of 1/L1", "gap of 1/L2", "relative, L1", "relative, L2")
NORMS = {"L1": look.of_number(0), "L2": look.of_number(1)}
READINGS = ("norm", "gap", "relative")

Layers = dict[str, dict[str, Any]]


def needs(run: Run) -> str | None:
    """Norms in inspect.json."""
    if side_file(run, "inspect.json") is None:
        return "not inspected yet: `bitstrata inspect` measures it"
    return None if _layers(run) else "inspect.json holds no batch normalizations"


def render(runs: Sequence[Run]) -> Markup:
    """Two charts and a table a run."""
    return join((look.key(NORMS), *(_of_run(run, _layers(run)) for run in runs)))


def _layers(run: Run) -> Layers:
    found = (side_file(run, "inspect.json") or {}).get("normalizations")
    whole = found.items() if isinstance(found, dict) else ()
    return {name: one for name, one in whole if isinstance(one, dict) and _is_whole(one)}


def _is_whole(one: dict[str, Any]) -> bool:
    parts = [one.get(norm) for norm in ("l1", "l2")]
    return is_number(one.get("channels")) and all(
        isinstance(part, dict) and all(is_number(part.get(reading)) for reading in READINGS) for part in parts
    )


def _of_run(run: Run, layers: Layers) -> Markup:
    figures = [
        el("figure", chart(_described("Norms", "norm", layers), _drawing(layers, "norm", "norm of x - mean"))),
        el(
            "figure",
            chart(_described("Gaps", "relative", layers), _drawing(layers, "relative", "gap of 1/norm, relative, %")),
        ),
    ]
    rows = [_row(name, one) for name, one in layers.items()]
    numbers = details("All normalizations", table(f"{run.name}: norms", HEAD, rows, hidden_caption=True))
    return join((el("h3", run.name), el("div", *figures, class_="figures"), numbers))


def _drawing(layers: Layers, reading: str, title: str) -> Callable[[Any, bool], None]:
    def draw(axes: Any, narrow: bool) -> None:
        known = [one[norm.lower()][reading] for one in layers.values() for norm in NORMS]
        for norm, style in NORMS.items():
            factor = 100 if reading == "relative" else 1
            values = [factor * one[norm.lower()][reading] for one in layers.values()]
            x = range(1, len(values) + 1)
            axes.plot(x, values, color=color(style.color), marker=style.marker, markersize=4 if narrow else 6)
        if reading == "norm":
            logarithmic(axes, min(known), max(known))
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("normalizations in the order they run")
        axes.set_title(title)

    return draw


def _row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    cells = [f"{one[norm][reading]:.3g}" for reading in ("norm", "gap") for norm in ("l1", "l2")]
    return name, str(one["channels"]), *cells, *(f"{one[norm]['relative']:.2%}" for norm in ("l1", "l2"))


def _described(title: str, reading: str, layers: Layers) -> str:
    parts = [f"{name}: L1 {one['l1'][reading]:.3g}, L2 {one['l2'][reading]:.3g}" for name, one in layers.items()]
    return f"{title}. {'; '.join(parts)}."


PANEL = Panel(
    "Norms of normalizations",
    "L1 and L2 norm of the centred input of each batch normalization, mean over channels, and how far the reciprocal "
    "of the norm in eight bits, one step a layer, is from its own.",
    57,
    needs,
    render,
)
