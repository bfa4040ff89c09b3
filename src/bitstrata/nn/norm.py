"""Batch normalization with statistics and affine parameters of its own at every precision."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import QuantizedLayer


class PrecisionBatchNorm(nn.Module):
    """One batch normalization a precision (vertical layering, section 6.3.1: individual statistics and weights).

    Activations quantized to few bits have other means and variances than the same activations at more bits, so each
    precision normalizes by its own. It follows the precision of one quantized layer: the layer it normalizes, or, after
    an addition, the first layer it feeds.

    A float state_dict (weight, bias, running_mean, running_var) loads into every precision.

    Args:
        norm: the float BatchNorm1d/2d; copied to every precision.
        precisions: ascending.
        owner: qualified name of the layer to follow, as it was when the model was quantized.
        layer: that layer.
    """

    def __init__(self, norm: _BatchNorm, precisions: tuple[int, ...], owner: str, layer: QuantizedLayer) -> None:
        super().__init__()
        self.levels = nn.ModuleDict({str(p): copy.deepcopy(norm) for p in precisions})
        self.owner = owner
        self._followed = (layer,)  # in a tuple, so that it does not count as a submodule
        self.train(norm.training)

    @property
    def precision(self) -> int:
        """The precision of the layer that is followed."""
        return self._followed[0].precision

    @property
    def level(self) -> _BatchNorm:
        """The normalization of the current precision."""
        level = self.levels[str(self.precision)]
        assert isinstance(level, _BatchNorm)
        return level

    def precision_parameters(self) -> dict[int, list[nn.Parameter]]:
        return {int(p): list(level.parameters()) for p, level in self.levels.items()}

    def forward(self, x: Tensor) -> Tensor:
        return self.level(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = f"{prefix}levels."
        if not any(key.startswith(own) for key in state_dict):
            for key in [k for k in state_dict if k.startswith(prefix)]:
                value = state_dict.pop(key)
                for p in self.levels:
                    state_dict[f"{own}{p}.{key[len(prefix) :]}"] = value
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"owner={self.owner!r}, precision={self.precision}"
