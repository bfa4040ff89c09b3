"""Which parameters belong to one precision, and how each kind is regularised."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..quantizers.base import Quantizer

DECAYS = ("all", "weights", "weights_no_depthwise")


def precision_parameters(model: nn.Module) -> dict[int, list[nn.Parameter]]:
    """Precision -> parameters that only this precision uses: its normalizations, activation steps, scale ratios.

    They are what modules list in a method `precision_parameters` of their own, without arguments. Every other
    parameter is shared by all precisions (vertical layering, section 4).
    """
    result: dict[int, dict[int, nn.Parameter]] = {}
    for module in model.modules():
        listed = getattr(module, "precision_parameters", None)
        if callable(listed):
            for p, parameters in listed().items():
                result.setdefault(p, {}).update((id(q), q) for q in parameters)  # a wrapped quantizer lists them again
    return {p: list(group.values()) for p, group in result.items()}


def parameter_groups(model: nn.Module, weight_decay: float, decay: str = "all") -> list[dict[str, Any]]:
    """Two optimizer groups: what decays, and what does not. Parameters of quantizers (steps, ratios) never decay.

    Args:
        weight_decay: of the first group; the second has 0.
        decay: "all" (weights, biases and normalizations), "weights" (parameters of two or more dimensions, MaQD) or
            "weights_no_depthwise" (of these, not the weights of convolutions with one input channel a group, SAT).

    Returns:
        Groups for a torch optimizer, without empty ones; parameters that are not trained are left out.

    Raises:
        ValueError: an unknown decay, or a negative weight_decay.
    """
    if decay not in DECAYS:
        raise ValueError(f"parameter_groups: decay must be one of {DECAYS}, got {decay!r}")
    if not weight_decay >= 0:
        raise ValueError(f"parameter_groups: weight_decay must not be negative, got {weight_decay!r}")
    exempt = {id(p) for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    if decay != "all":
        exempt |= {id(p) for p in model.parameters() if p.dim() < 2}
    if decay == "weights_no_depthwise":
        exempt |= {id(module.weight) for module in model.modules() if _depthwise(module)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and 1 < module.groups == module.in_channels
