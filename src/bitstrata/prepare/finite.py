"""Numbers that are not finite, found before they reach a grid or a statistic."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

WATCHED = ("weight", "bias", "running_mean", "running_var")


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The first tensor with NaN or infinite elements in words, with their number; "" if all are finite.

    Args:
        tensors: name, as it is to be read in an error -> tensor of any shape and dtype.
    """
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            return f"{bad} of {tensor.numel()} values of {name} are not finite (NaN or infinite)"
    return ""


def watched(module: nn.Module) -> dict[str, Tensor]:
    """Weight, bias and running statistics of a float layer or normalization, as far as it has them."""
    found = {name: getattr(module, name, None) for name in WATCHED}
    return {name: value.detach() for name, value in found.items() if isinstance(value, Tensor)}
