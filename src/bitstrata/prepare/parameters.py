"""Which parameters belong to one precision, and how each kind is regularised."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn.norm import PrecisionBatchNorm
from ..quantizers.base import Quantizer


def precision_parameters(model: nn.Module) -> dict[int, list[nn.Parameter]]:
    """Precision -> parameters that only this precision uses: its normalizations, activation steps, scale ratios.

    Every other parameter is shared by all precisions (vertical layering, section 4).
    """
    result: dict[int, list[nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, Quantizer | PrecisionBatchNorm):
            for p, parameters in module.precision_parameters().items():
                result.setdefault(p, []).extend(parameters)
    return result


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: weights, biases and normalizations decay; step sizes and scale ratios do not."""
    grids = {id(p) for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in grids], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in grids], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
