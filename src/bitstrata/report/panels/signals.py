"""What quantization does to each layer, from `bitstrata inspect`: noise, clipping, zeros, and SAT's training rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..markup import Markup, details, el, join, table
from ..registry import Panel
from ..runs import Run, is_number, side_file

HEAD = (
    "layer", "weight dB", "clipped", "not zero", "codes used", "step", "variance ratio", "gradient variance", "κ₁",
    "input dB", "input clipped", "input not zero", "input step", "input deviation",
)  # fmt: skip


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
            (name, *_weight(parts["weight"], layers.get(name)), *_input(parts["input"]))
            for name, parts in one.get("signals", {}).items()
        ]
        zeros = ", ".join(f"{name} {_number(share, '.1%')}" for name, share in one.get("nonzero", {}).items())
        rules = el(
            "p",
            *([f"Not zero of all layers together: {zeros}.", el("br")] if zeros else []),
            *join_lines(str(one.get("rules", {}).get("text", ""))),
        )
        parts.append(details(f"{bits} bits", rules, table(f"{run.name}, {bits} bits", HEAD, rows, hidden_caption=True)))
    return join([*parts, _geometry(found.get("objectives"))])


def join_lines(value: str) -> list[Markup]:
    """Lines, broken where the text breaks them."""
    return [join((line, el("br"))) for line in value.splitlines()]


def _shares(signal: dict[str, Any]) -> list[str]:
    return [_number(signal["sqnr"], ".1f"), _number(signal["clipped"], ".1%"), _number(signal["nonzero"], ".1%")]


def _weight(signal: dict[str, Any], rule: dict[str, Any] | None) -> list[str]:
    used = sum(1 for count in signal["counts"] if count)
    numbers = (_number((rule or {}).get(name), form) for name, form in (("ratio", ".3g"), ("gradient", ".2g")))
    kappa = _number((rule or {}).get("kappa1"), ".2g")
    return [*_shares(signal), f"{used} of {len(signal['counts'])}", _number(signal["step"], ".3g"), *numbers, kappa]


def _input(signal: dict[str, Any] | None) -> list[str]:
    if signal is None:
        return ["–"] * 5
    return [*_shares(signal), _number(signal["step"], ".3g"), _number(signal["deviation"], ".3g")]


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
