"""Batch normalization at every precision: statistics and affine of its own, statistics alone, or all in common."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn

NORM_LEVELS = ("individual", "statistics", "shared")
AFFINE = ("weight", "bias")
NEEDED = (*AFFINE, "running_mean", "running_var", "momentum", "num_batches_tracked", "reset_running_stats")


class HasPrecision(Protocol):
    """What a normalization follows: a quantized layer, or a layer with weights of its own at every precision."""

    @property
    def precision(self) -> int:
        """The precision it runs at now."""
        ...


class Normalization(nn.Module):
    """What `PrecisionBatchNorm` needs of a normalization, as a type: the attributes of torch's BatchNorm1d/2d."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    reset_running_stats: Callable[[], None]


def spread_to_levels(state_dict: dict[str, Any], prefix: str, levels: nn.ModuleDict) -> None:
    """Make the state of a plain module, in place, that of a module which holds one of it a precision in `levels`."""
    own = f"{prefix}levels."
    if any(key.startswith(own) for key in state_dict):
        return
    for key in [k for k in state_dict if k.startswith(prefix)]:
        value = state_dict.pop(key)
        for p in levels:
            state_dict[f"{own}{p}.{key[len(prefix) :]}"] = value


class PrecisionBatchNorm(nn.Module):
    """Batch normalization of a layer that runs at several precisions (vertical layering, section 6.3.1, Table 4).

    Activations quantized to few bits have other means and variances than the same activations at more bits, so each
    precision normalizes by its own. It follows the precision of one quantized layer: the layer it normalizes, or, after
    an addition, the first layer it feeds.

    A float state_dict (weight, bias, running_mean, running_var) loads into every precision. Its own state_dict names
    every precision's tensors whichever of them are one, so a state loads into the other settings too, if its tensors
    agree where those share them.

    Args:
        norm: the float normalization: BatchNorm1d/2d, or a module with the same attributes; copied.
        precisions: ascending.
        owner: qualified name of the layer to follow, as it was when the model was quantized.
        layer: that layer.
        levels: what each precision has of its own: "individual", statistics and affine; "statistics", statistics, with
            one affine for all; "shared", nothing: one normalization for all.

    Raises:
        TypeError: `norm` lacks an attribute of a batch normalization.
        ValueError: unknown `levels`, or no precisions.
    """

    def __init__(
        self,
        norm: nn.Module,
        precisions: tuple[int, ...],
        owner: str,
        layer: HasPrecision,
        levels: str = "individual",
    ) -> None:
        super().__init__()
        missing = [name for name in NEEDED if not hasattr(norm, name)]
        if missing:
            raise TypeError(
                f"PrecisionBatchNorm: norm must be a batch normalization, got {type(norm).__name__} without "
                f"{', '.join(missing)}"
            )
        if levels not in NORM_LEVELS:
            raise ValueError(f"PrecisionBatchNorm: levels must be one of {', '.join(NORM_LEVELS)}, got {levels!r}")
        if not precisions:
            raise ValueError("PrecisionBatchNorm: precisions must name at least one precision")
        one = copy.deepcopy(norm)
        self.sharing = levels
        self.levels = nn.ModuleDict({str(p): one if levels == "shared" else copy.deepcopy(norm) for p in precisions})
        self.owner = owner
        self._followed = (layer,)  # in a tuple, so that it does not count as a submodule
        self._share_affine()
        self.train(norm.training)

    @property
    def precision(self) -> int:
        """The precision of the layer that is followed."""
        return self._followed[0].precision

    @property
    def followed(self) -> HasPrecision:
        """The layer whose precision it follows."""
        return self._followed[0]

    def follow_(self, layer: HasPrecision) -> None:
        """Follow another layer, which took the place of the present one; `owner` stays."""
        self._followed = (layer,)

    @property
    def level(self) -> Normalization:
        """The normalization of the current precision."""
        return cast("Normalization", self.levels[str(self.precision)])

    def precision_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Precision -> its own parameters; {} where the affine is shared."""
        if self.sharing != "individual":
            return {}
        return {int(p): list(level.parameters()) for p, level in self.levels.items()}

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.level(x))

    def _share_affine(self) -> None:
        """Make weight and bias of all levels the very same Parameters."""
        if self.sharing == "statistics":
            first, *others = self.levels.values()
            for level in others:
                for name in AFFINE:
                    setattr(level, name, getattr(first, name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._share_affine()  # a move between some kinds of device makes new Parameters
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        spread_to_levels(state_dict, prefix, self.levels)
        errors: list[str] = args[-1]
        errors.extend(self._disagreements(state_dict, f"{prefix}levels."))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _disagreements(self, state_dict: dict[str, Any], own: str) -> list[str]:
        """Errors for tensors that are one here and differ between the levels of the state."""
        if self.sharing == "individual":
            return []
        first, *others = self.levels
        names = self.levels[first].state_dict() if self.sharing == "shared" else AFFINE
        errors = []
        for name in names:
            values = {p: state_dict.get(f"{own}{p}.{name}") for p in (first, *others)}
            for p in others:
                one, other = values[first], values[p]
                if one is not None and other is not None and not torch.equal(one, other):
                    errors.append(
                        f"{own}{p}.{name} differs from {own}{first}.{name}, but this normalization shares them between "
                        f"precisions (levels={self.sharing!r})"
                    )
        return errors

    def extra_repr(self) -> str:
        own = "" if self.sharing == "individual" else f", levels={self.sharing!r}"
        return f"owner={self.owner!r}, precision={self.precision}{own}"
