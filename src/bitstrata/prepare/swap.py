"""Modules put in the place of others: normalizations, and edge layers with weights of their own a precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import cast

from torch import nn

from ..nn.l1_norm import l1_batch_norm_from
from ..nn.layer_batch_norm import layer_batch_norm_from
from ..nn.layers import QuantizedLayer
from ..nn.norm import PrecisionBatchNorm
from ..nn.own import OwnLayer
from ..recipes.base import Recipe
from .observe import BATCH_NORMS, Trace
from .precision import quantized_layers

SKIPPED = "_bitstrata_skipped"  # module attribute: why quantize_ left it in float


def to_layer_batch_norm(model: nn.Module) -> None:
    """Every batch normalization becomes a layer-batch normalization with its affine, under the same names."""
    _replace_batch_norms(model, layer_batch_norm_from)


def to_l1_batch_norm(model: nn.Module) -> None:
    """Every batch normalization becomes an L1 batch normalization that evaluates to the same, under the same names.

    Its deviation is scaled by sqrt(pi/2), so that a trained network goes on from where it is.
    """
    _replace_batch_norms(model, l1_batch_norm_from)


def replace_norms(model: nn.Module, norm: str) -> None:
    """Put the normalization that a recipe's field `norm` names in the place of batch normalization, in place."""
    if norm == "layer_batch":
        to_layer_batch_norm(model)
    elif norm == "l1":
        to_l1_batch_norm(model)


def _replace_batch_norms(model: nn.Module, form: Callable[[nn.Module], nn.Module]) -> None:
    made: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                parent._modules[name] = made.setdefault(id(child), form(child))


def convert_norms(model: nn.Module, recipe: Recipe, trace: Trace) -> None:
    """Every normalization becomes one with levels for the recipe's precisions, following the layer that owns it.

    One that is owned by a layer in float still sees other statistics at every precision: it follows the next quantized
    layer, or the last.
    """
    layers = quantized_layers(model)
    order = sorted((seen.order, name) for name, seen in trace.layers.items() if seen.calls)
    replaced: dict[int, PrecisionBatchNorm] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BATCH_NORMS):
            continue
        owner = trace.norm_owner.get(name)
        if owner is None:
            module.__dict__[SKIPPED] = "did not run on the example"
        elif owner not in layers and len(recipe.precisions) == 1:
            module.__dict__[SKIPPED] = f"follows {owner!r}, which is in float"
        else:
            followed = owner if owner in layers else _nearest(order, owner, layers)
            replaced[id(module)] = PrecisionBatchNorm(
                module, recipe.precisions, owner, layers[followed], levels=recipe.norm_levels
            )
    _replace(model, replaced)


def _nearest(order: list[tuple[int, str]], owner: str, layers: Mapping[str, QuantizedLayer]) -> str:
    """The first quantized layer that runs after `owner`, or the last before it."""
    at = next(i for i, (_, name) in enumerate(order) if name == owner)
    later = [name for _, name in order[at:] if name in layers]
    return later[0] if later else [name for _, name in order[:at] if name in layers][-1]


def give_own_edges(model: nn.Module, precisions: tuple[int, ...], first: str, last: str) -> None:
    """First and last layer in as many copies as there are precisions; float ones follow the nearest quantized layer."""
    layers = quantized_layers(model)
    names = list(layers)
    for name, nearest in ((first, names[0]), (last, names[-1])):
        layer = model.get_submodule(name)
        levels = {p: copy.deepcopy(layer) for p in precisions}
        followed = levels[precisions[0]] if isinstance(layer, QuantizedLayer) else layers[nearest]
        assert isinstance(followed, QuantizedLayer)
        own = OwnLayer(levels, followed)
        for module in model.modules():
            if isinstance(module, PrecisionBatchNorm) and cast(object, module.followed) is layer:
                module.follow_(own)
        _replace(model, {id(layer): own})


def _replace(model: nn.Module, replaced: Mapping[int, nn.Module]) -> None:
    """Put modules in the place of others, keyed by identity, under every name these have."""
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():  # named_children would hide a second name of the same module
            if id(child) in replaced:
                parent._modules[child_name] = replaced[id(child)]
