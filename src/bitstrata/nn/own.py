"""A first or last layer that has weights of its own at every precision."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from .layers import QuantizedLayer
from .norm import HasPrecision, PrecisionBatchNorm, spread_to_levels


class OwnLayer(nn.Module):
    """One layer a precision in the place of a single first or last layer (vertical layering, section 6.3, Table 8).

    The layer of the followed layer's current precision runs; the others have no part in it. A float state_dict of the
    plain layer loads into every level.

    Args:
        levels: precision -> layer. Quantized layers, each quantized for all precisions, so that `set_precision` works
            on every one of them; or float layers.
        followed: the quantized layer whose precision decides; it may be one of the levels.

    Raises:
        ValueError: no levels, or `followed` serves a precision without a level.
    """

    def __init__(self, levels: dict[int, nn.Module], followed: QuantizedLayer) -> None:
        super().__init__()
        if not levels:
            raise ValueError("OwnLayer: levels must name at least one precision")
        missing = [p for p in followed.precisions if p not in levels]
        if missing:
            raise ValueError(
                f"OwnLayer: no level for precision {missing[0]} of the followed layer, which serves "
                f"{followed.precisions}; levels: {tuple(sorted(levels))}"
            )
        self.levels = nn.ModuleDict({str(p): levels[p] for p in sorted(levels)})
        self._followed = (followed,)  # in a tuple, so that it does not count as a submodule
        self.training = levels[max(levels)].training

    @property
    def precision(self) -> int:
        """The precision of the layer that is followed."""
        return self._followed[0].precision

    @property
    def precisions(self) -> tuple[int, ...]:
        """Precisions that have a level, ascending."""
        return tuple(int(p) for p in self.levels)

    @property
    def followed(self) -> QuantizedLayer:
        """The layer whose precision decides which level runs."""
        return self._followed[0]

    @property
    def level(self) -> nn.Module:
        """The layer of the current precision."""
        return self.levels[str(self.precision)]

    def precision_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Precision -> all parameters of its level, those of the level's quantizers included."""
        return {int(p): list(level.parameters()) for p, level in self.levels.items()}

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.level(x))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        spread_to_levels(state_dict, prefix, self.levels)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"precision={self.precision}"


def collapse_own_(model: nn.Module, precision: int) -> nn.Module:
    """Replace every `OwnLayer` by its layer of one precision, under the name it had, in place.

    What followed an own layer, or one of its levels, then follows the layer that stays, or, where that is in float, the
    one that the own layer followed. Do this on a copy: the levels of the other precisions are gone.

    Args:
        model: any module that is not an OwnLayer itself.
        precision: which level stays.

    Returns:
        The same model.

    Raises:
        ValueError: a layer without this level, or a model that is itself an OwnLayer; the model is unchanged.
    """
    if isinstance(model, OwnLayer):
        raise ValueError("collapse_own_: the model is a bare OwnLayer; wrap it in nn.Sequential")
    own = {name: module for name, module in model.named_modules() if isinstance(module, OwnLayer)}
    for name, module in own.items():
        if precision not in module.precisions:
            raise ValueError(
                f"collapse_own_: {precision!r} is not among the precisions {module.precisions} of own layer {name!r}"
            )
    kept = {id(module): module.levels[str(precision)] for module in own.values()}
    heirs = _heirs(list(own.values()), precision)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children would hide a second name of the same module
            if id(child) in kept:
                parent._modules[name] = kept[id(child)]
    for norm in model.modules():
        if isinstance(norm, PrecisionBatchNorm) and id(norm.followed) in heirs:
            norm.follow_(heirs[id(norm.followed)])
    return model


def _heirs(own: list[OwnLayer], precision: int) -> dict[int, HasPrecision]:
    """id of a layer that goes -> the layer to follow in its place."""
    heirs: dict[int, HasPrecision] = {}
    for module in own:
        kept = module.levels[str(precision)]
        heir = kept if isinstance(kept, QuantizedLayer) else module.followed
        heirs.update({id(gone): heir for gone in (module, *module.levels.values())})
    # an own layer in float may follow a level of another one
    return {gone: heirs.get(id(heir), heir) for gone, heir in heirs.items()}
