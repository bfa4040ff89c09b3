"""From the first layer to the last: signal to noise, clipping, zeros (MaQD, figures 4 and 5), variances, kappa."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import look
from ..diagnosis import VALUES, last, lines, stages
from ..markup import Markup, details, el, join, table
from ..multiples import small
from ..registry import Panel
from ..runs import Run, is_number, side_file

#: Value -> where it stands in inspect.json, of a layer's signals or rules.
PLACES = {
    "weight_sqnr": ("weight", "sqnr"),
    "input_sqnr": ("input", "sqnr"),
    "weight_clipped": ("weight", "clipped"),
    "input_clipped": ("input", "clipped"),
    "weight_nonzero": ("weight", "nonzero"),
    "input_nonzero": ("input", "nonzero"),
    "variance_ratio": ("rules", "ratio"),
    "gradient_variance": ("rules", "gradient"),
    "kappa1": ("rules", "kappa1"),
}

ByLayer = dict[str, dict[str, dict[str, float]]]


def needs(run: Run) -> str | None:
    """A whole inspect.json, or a measurement while it trained."""
    return None if _found(run)[0] else "not inspected: `bitstrata inspect` measures it, as `--diagnose all` does"


def render(runs: Sequence[Run]) -> Markup:
    """The drawings of every run, all but the first closed where there are several."""
    return join(_of_run(run, len(runs) == 1) for run in runs)


def _found(run: Run) -> tuple[ByLayer, str]:
    """Value -> precision -> layer -> number, and when it was measured."""
    after = inspected((side_file(run, "inspect.json") or {}).get("precisions"))
    if after:
        return after, "after training, by bitstrata inspect"
    for stage in reversed(stages(run)):
        measured = {name: part for name, part in last(stage).items() if name in PLACES}
        if measured:
            return measured, f"at the last measurement of stage {stage.name}"
    return {}, ""


def inspected(precisions: Any) -> ByLayer:
    """Value -> precision -> layer -> number, from that entry of inspect.json; {} if it is none."""
    found: ByLayer = {}
    for bits, one in precisions.items() if isinstance(precisions, Mapping) else ():
        signals, rules = one.get("signals", {}), one.get("rules", {}).get("layers", {})
        for layer, parts in signals.items():
            whole = {**parts, "rules": rules.get(layer)}
            for name, (part, key) in PLACES.items():
                number = (whole.get(part) or {}).get(key)
                if isinstance(number, int | float) and is_number(number):
                    found.setdefault(name, {}).setdefault(bits, {})[layer] = number
    return found


def _of_run(run: Run, alone: bool) -> Markup:
    found, when = _found(run)
    order = list(dict.fromkeys(layer for by_level in found.values() for part in by_level.values() for layer in part))
    number = {layer: float(i) for i, layer in enumerate(order, 1)}
    levels = look.ordered({level for by_level in found.values() for level in by_level})
    drawings: list[Markup] = []
    rows: list[tuple[str, ...]] = []
    for name in (name for name in PLACES if name in found):
        tracks = {
            level: sorted((number[layer], value) for layer, value in found[name][level].items())
            for level in found[name]
        }
        drawings.append(small(VALUES[name], lines(tracks, name), (1, len(order)), f"layers 1 to {len(order)}"))
    for layer in order:
        rows.append((f"{number[layer]:g}  {layer}",))
        for name in (name for name in PLACES if name in found):
            shown = [found[name].get(level, {}).get(layer) for level in levels]
            cells = ("–" if value is None else VALUES[name].form(value) for value in shown)
            rows.append((VALUES[name].title, *cells))
    head = ("layer", *map(look.named, levels))
    legend = look.key({look.named(level): look.of_level(level) for level in levels})
    parts = [
        el("p", f"{run.name}, {when}: {len(order)} layers in the order of the network, from left to right."),
        legend,
        el("div", *drawings, class_="multiples"),
        details("Numbers", table(f"{run.name}, layer by layer", head, rows)),
    ]
    return join(parts) if alone else details(run.name, *parts)


PANEL = Panel(
    "From layer to layer",
    "Signal to noise, clipping, the share that is not zero, variances and κ₁ of every layer, one line a precision. κ₁ "
    "compares the sizes of gradients in neighbouring layers: where it stays within the shaded band, they neither grow "
    "nor vanish from layer to layer. Where fewer lines are seen, precisions agree.",
    54,
    needs,
    render,
)
