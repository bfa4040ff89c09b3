"""What quantization does to each layer, from `bitstrata inspect`: noise, clipping, zeros, and SAT's training rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..markup import Markup, details, el, join, table
from ..registry import Panel
from ..runs import Run, is_number, side_file

HEAD = ("layer", "weight dB", "clipped", "not zero", "codes used", "input dB", "clipped", "not zero", "κ₁")


def needs(run: Run) -> str | None:
    """A whole inspect.json."""
    found = side_file(run, "inspect.json")
    if found is None:
        return "not inspected yet: `bitstrata inspect` measures it"
    whole = isinstance(found.get("precisions"), dict) and found["precisions"]
    return None if whole else "inspect.json holds no precisions"


def render(runs: Sequence[Run]) -> Markup:
    """A section a run and precision, the widest open."""
    return join(_of_run(run, side_file(run, "inspect.json") or {}) for run in runs)


def _of_run(run: Run, found: dict[str, Any]) -> Markup:
    parts = [el("h3", run.name)]
    for bits, one in sorted(found["precisions"].items(), key=lambda item: -int(item[0])):
        layers = one.get("rules", {}).get("layers", {})
        rows = [
            (name, *_cells(parts["weight"], codes=True), *_cells(parts["input"], codes=False), _kappa(layers.get(name)))
            for name, parts in one.get("signals", {}).items()
        ]
        rules = el("p", *join_lines(str(one.get("rules", {}).get("text", ""))))
        parts.append(details(f"{bits} bits", rules, table(f"{run.name}, {bits} bits", HEAD, rows, hidden_caption=True)))
    return join([*parts, _geometry(found.get("objectives"))])


def join_lines(value: str) -> list[Markup]:
    """Lines, broken where the text breaks them."""
    return [join((line, el("br"))) for line in value.splitlines()]


def _cells(signal: dict[str, Any] | None, *, codes: bool) -> list[str]:
    if signal is None:
        return ["–"] * (4 if codes else 3)
    used = sum(1 for count in signal["counts"] if count)
    shown = [_number(signal["sqnr"], ".1f"), _number(signal["clipped"], ".1%"), _number(signal["nonzero"], ".1%")]
    return [*shown, f"{used} of {len(signal['counts'])}"] if codes else shown


def _kappa(layer: dict[str, Any] | None) -> str:
    return _number(None if layer is None else layer.get("kappa1"), ".2g")


def _number(value: object, form: str) -> str:
    return format(value, form) if is_number(value) else "–"


def _geometry(found: dict[str, Any] | None) -> Markup:
    if not found:
        return Markup()
    rows = [
        (f"{bits} bits", *(f"{found[name][i]:.3g}" for name in ("losses", "norms", "factors")))
        for i, bits in enumerate(found["precisions"])
    ]
    caption = "Objectives of the precisions: gradients to the weights that they share"
    return table(caption, ("precision", "loss", "gradient norm", "factor of multiple-gradient descent"), rows)


PANEL = Panel(
    "Signals and training rules",
    "Signal-to-noise ratio of each layer's quantized weight and input, the share that the grid cuts off, the share "
    "that is not zero; whether SAT's two rules of efficient training hold; how the precisions pull at what they share.",
    55,
    needs,
    render,
)
