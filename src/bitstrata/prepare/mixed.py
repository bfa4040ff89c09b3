"""A precision for each layer, chosen to fit a budget of weight bits."""

from __future__ import annotations

import torch
from torch import nn

from ..functional.allocation import allocate_widths
from .precision import precision, precisions, quantized_layers


def mixed_precision_map(model: nn.Module, budget: int) -> dict[str, int]:
    """The precision map of least weight error within a budget, for `set_precision`, `add_plan` or a session.

    The error of a layer at a precision is the squared distance of its fake-quantized weight to that at the widest
    (vertical layering, eq. 12; the paper's norm of codes on different grids is taken on what the codes stand for, and
    its budget as the total of bits). Layers whose width is the same at every precision (8-bit edges) are left out of
    the budget and run at the widest. Normalizations fit a map only after their statistics are estimated under it:
    `add_plan` does.

    Args:
        model: quantized for several precisions; unchanged.
        budget: bits of all weights of the layers that have a choice.

    Returns:
        Layer name -> precision, complete.

    Raises:
        ValueError: a float model, one precision only, or a budget below all layers at the narrowest.
    """
    known = precisions(model)
    if len(known) < 2:
        raise ValueError(f"mixed_precision_map: the model must be quantized for several precisions, it has {known}")
    layers = quantized_layers(model)
    free = {name: layer for name, layer in layers.items() if len(set(layer.weight_quant.bits.values())) > 1}
    if not free:
        raise ValueError("mixed_precision_map: every layer has the same width at all precisions")
    values: dict[int, dict[str, torch.Tensor]] = {}
    with torch.no_grad():
        for p in known:
            with precision(model, p):
                values[p] = {name: layer.quantized_weight().double() for name, layer in free.items()}
    top = known[-1]
    errors = [[float((values[p][name] - values[top][name]).square().sum()) for p in known] for name in free]
    widths = [next(iter(free.values())).weight_quant.bits[p] for p in known]
    best = allocate_widths([layer.weight.numel() for layer in free.values()], widths, errors, budget)
    of_width = dict(zip(widths, known, strict=True))
    return {**dict.fromkeys(layers, top), **{n: of_width[w] for n, w in zip(free, best.widths, strict=True)}}
