"""What quantization makes of each layer now: grids, codes in use, histograms of weights. Changes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitstrata.nn.layers import QuantizedLayer
from bitstrata.prepare import precision, precisions
from bitstrata.quantizers.base import ActivationQuantizer, Grid

BINS = 80


def steps(model: nn.Module) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Step sizes of every quantized layer: layer -> precision -> {"weight": [...], "input": [...]}.

    Each list is [step] for one step a tensor, [least, median, largest] for one an output channel, [] where it is not
    finite. An input whose grid is not known before data has come has no entry. Empty for a float network.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    with torch.no_grad():
        for level in precisions(model):
            with precision(model, level):
                for name, layer in _layers(model):
                    row = {"weight": spread(layer.weight_grid().scale)}
                    grid = _input_grid(layer)
                    if grid is not None:
                        row["input"] = spread(grid.scale)
                    found.setdefault(name, {})[str(level)] = row
    return found


def spread(scale: Tensor) -> list[float]:
    """[step], or [least, median, largest] of several; [] if one is not finite."""
    values = scale.detach().float().reshape(-1)
    if not bool(torch.isfinite(values).all()):
        return []
    chosen = values[:1] if len(values) == 1 else torch.stack((values.min(), values.median(), values.max()))
    return [_rounded(value) for value in chosen.tolist()]


def layers(model: nn.Module, bins: int = BINS) -> list[dict[str, Any]]:
    """Every quantized layer at every precision, as JSON values, in the network's order.

    A layer: {"name", "kind", "shape", "edge", "quantizer", "precisions": {precision: view}}. A view: "bits", "unit"
    ("value", or "step" where each output channel has a step of its own: weights are then given in steps of their
    channel), "range" [least, largest weight], "counts" of `bins` equal parts of it, "levels" (the grid, in that unit),
    "used" (share of the weights on each level), "step" as in `steps`, and "input" {"quantizer", "step", "codes":
    [lo, hi]} or None. A layer whose weights or steps are not finite has no view. ValueError: bins below 1.
    """
    if bins < 1:
        raise ValueError(f"layers: bins must be at least 1, got {bins}")
    found: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for level in precisions(model):
            with precision(model, level):
                for name, layer in _layers(model):
                    entry = found.setdefault(name, _facts(name, layer))
                    view = _view(layer, bins)
                    if view is not None:
                        entry["precisions"][str(level)] = view
    return list(found.values())


def write(path: Path, model: nn.Module, **facts: Any) -> None:
    """Write {**facts, "layers": layers(model)} as JSON, whole or not at all; nothing for a float network."""
    found = layers(model)
    if not found:
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({**facts, "layers": found}, allow_nan=False), encoding="utf-8")
    os.replace(temporary, path)


def _layers(model: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    return [(name or type(m).__name__, m) for name, m in model.named_modules() if isinstance(m, QuantizedLayer)]


def _facts(name: str, layer: QuantizedLayer) -> dict[str, Any]:
    return {
        "name": name,
        "kind": type(layer).__name__.removeprefix("Quant"),
        "shape": list(layer.weight.shape),
        "edge": layer.edge,
        "quantizer": type(layer.weight_quant).__name__,
        "precisions": {},
    }


def _view(layer: QuantizedLayer, bins: int) -> dict[str, Any] | None:
    weight, grid, codes = layer.effective_weight().float(), layer.weight_grid(), layer.weight_codes()
    if not (bool(torch.isfinite(weight).all()) and bool(torch.isfinite(grid.scale).all())):
        return None
    channelwise = grid.scale.numel() > 1
    scale = grid.scale.float().view(-1, *[1] * (weight.dim() - 1)) if channelwise else grid.scale.float().reshape(())
    shown = weight / scale if channelwise else weight
    step = 1.0 if channelwise else float(scale)
    low, high = float(shown.min()), float(shown.max())
    offset = float(torch.as_tensor(grid.offset).float().mean())  # where channels differ, levels are drawn at the mean
    valid = list(grid.valid) if grid.valid is not None else list(range(grid.lo, grid.hi + 1))
    shares = torch.bincount(codes.reshape(-1).long() - grid.lo, minlength=grid.hi - grid.lo + 1) / codes.numel()
    return {
        "bits": layer.weight_quant.width,
        "unit": "step" if channelwise else "value",
        "range": [_rounded(low), _rounded(high)],
        "counts": torch.histc(shown.reshape(-1).cpu(), bins, low, high).long().tolist(),
        "levels": [_rounded(step * (code + offset)) for code in valid],
        "used": [_rounded(float(shares[code - grid.lo]), 4) for code in valid],
        "step": spread(grid.scale),
        "input": _input(layer),
    }


def _input(layer: QuantizedLayer) -> dict[str, Any] | None:
    grid = _input_grid(layer)
    if grid is None:
        return None
    return {"quantizer": type(layer.act_quant).__name__, "step": spread(grid.scale), "codes": [grid.lo, grid.hi]}


def _input_grid(layer: QuantizedLayer) -> Grid | None:
    """The grid of the layer's input; None for a float input and where no data has set the steps yet."""
    quantizer = layer.act_quant
    if quantizer is None or (isinstance(quantizer, ActivationQuantizer) and not quantizer.is_initialized()):
        return None
    try:
        return quantizer.grid()
    except (TypeError, ValueError, AttributeError):  # a grid that follows the tensor at hand has no value without it
        return None


def _rounded(value: float, digits: int = 6) -> float:
    return float(f"{value:.{digits}g}")
