"""summary: every layer with its grid and bits, and what was left in float and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..nn.integer_layers import FreezableLayer, IntegerLayer
from ..nn.layers import FORMS, QuantizedLayer
from ..nn.norm import PrecisionBatchNorm
from .observe import BATCH_NORMS
from .swap import SKIPPED
from .wrapped import unwrapped


@dataclass(frozen=True)
class SummaryRow:
    """One module. weight and input name grid and bits ("nested 1,2,3,4"), "-" where there is none."""

    name: str
    kind: str
    weight: str
    input: str
    parameters: int
    note: str


@dataclass(frozen=True)
class Summary:
    """Table of a model's modules; `str()` lays it out."""

    rows: tuple[SummaryRow, ...]

    def __str__(self) -> str:
        head = ("layer", "type", "weight", "input", "params", "note")
        table = [head] + [(r.name, r.kind, r.weight, r.input, f"{r.parameters:,}", r.note) for r in self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        quantized = sum(r.parameters for r in self.rows if r.weight != "-")
        total = sum(r.parameters for r in self.rows)
        lines.append(f"{quantized:,} of {total:,} parameters are in quantized layers")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Describe every layer of a model: grid, bits, what was skipped and why. Works on float models too."""
    rows = []
    inside: tuple[str, ...] = ()
    for name, module in unwrapped(model).named_modules():
        if inside and name.startswith(inside):
            continue
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if isinstance(module, QuantizedLayer):
            rows.append(_quantized_row(name, module, own))
            inside += (f"{name}.",)
        elif isinstance(module, PrecisionBatchNorm):
            note = f"one a precision, follows {module.owner}"
            size = sum(p.numel() for p in module.parameters())
            rows.append(SummaryRow(name, type(module.level).__name__, "-", "-", size, note))
            inside += (f"{name}.",)
        elif isinstance(module, IntegerLayer) and module.multiplies:
            rows.append(_integer_row(name, module))
            inside += (f"{name}.",)
        elif own:
            rows.append(SummaryRow(name, type(module).__name__, "-", "-", own, _why_float(module)))
    return Summary(tuple(rows))


def _quantized_row(name: str, layer: QuantizedLayer, own: int) -> SummaryRow:
    weight, act = layer.weight_quant, layer.act_quant
    notes = ["first or last layer"] if layer.edge else []
    if weight.channels is not None:
        notes.append("a step an output channel")
    if layer.weight_transform is not None:
        notes.append(f"weights through {type(layer.weight_transform).__name__}")
    if layer.input_pool is not None:
        notes.append("pools its quantized input")
    if layer.grad_quant is not None:
        notes.append("gradients from integer codes")
    kind = type(layer).__name__.removeprefix("Quant")
    inputs = "float" if act is None else f"{type(act).__name__} {_widths(act.bits)}{' signed' if act.signed else ''}"
    return SummaryRow(name, kind, f"{type(weight).__name__} {_widths(weight.bits)}", inputs, own, "; ".join(notes))


def _integer_row(name: str, layer: IntegerLayer) -> SummaryRow:
    rule = layer.rule
    grid = f"ShiftQuant {{}}, {rule.groups} groups" if rule.method == "shift" else "a step a tensor {}"
    note = f"trains in integers, gradients {rule.g}"
    if isinstance(layer, FreezableLayer) and layer.frozen is not None:
        note += "; input range frozen"
    weight = f"{'ShiftQuant' if rule.method == 'shift' else 'a step a tensor'} {rule.w}"
    size = sum(p.numel() for p in layer.parameters())
    return SummaryRow(name, type(layer).__name__, weight, grid.format(rule.a), size, note)


def _widths(bits: dict[int, int]) -> str:
    return ",".join(str(b) for b in sorted(set(bits.values())))


def _why_float(module: nn.Module) -> str:
    reason = module.__dict__.get(SKIPPED)
    if reason is not None:
        return f"float: {reason}"
    if type(module) in FORMS or isinstance(module, BATCH_NORMS):
        return "float"
    nearest = next((base.__name__ for base in FORMS if isinstance(module, base)), None)
    if nearest:
        return f"float: a subclass of {nearest} with behaviour of its own"
    return f"float: no quantized form of {type(module).__name__}"
