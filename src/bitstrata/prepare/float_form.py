"""The float network that a recipe's source trains first: its normalization and its weight transform, nothing quantized.

SAT's first stage trains weights clamped by tanh and rescaled (section 4.1); MaQD's reference network has standardized
weights and layer-batch normalization (section 3). Quantized training then starts where the float network ended.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..functional.sat import deviation_scale, sat_gain
from ..nn.layers import FORMS
from ..quantizers.registry import build_transform
from ..recipes.base import Recipe
from .observe import observe
from .swap import replace_norms
from .wrapped import refuse_wrapped

Filter = Callable[[str, nn.Module], bool]
LARGEST_GAIN = 10  # the paper's own: 3, of a thousand classes and weights with a deviation of 0.01


class _Reparametrized(nn.Module):
    """The weight that a float layer uses, as `torch.nn.utils.parametrize` wants it."""

    def __init__(self, transform: nn.Module, *, keep_deviation: bool = False) -> None:
        super().__init__()
        self.transform = transform
        self.keep_deviation = keep_deviation

    def extra_repr(self) -> str:
        return f"keep_deviation={self.keep_deviation}"

    def forward(self, w: Tensor) -> Tensor:
        value = self.transform(w)
        return value * deviation_scale(w, value).to(value.dtype) if self.keep_deviation else value


def float_form_(model: nn.Module, recipe: Recipe, example_inputs: Any, *, filter: Filter | None = None) -> nn.Module:
    """Give a float model the recipe's normalization and weight transform, in place; train it, then `quantize_` it.

    Weights are reparametrized, so the optimizer must be made after this; `quantize_` takes the reparametrization out
    again and goes on from the same parameters.

    - recipe.transform is applied to every Linear, Conv1d and Conv2d (first and last too if edges="inner");
    - "dorefa" weights of a recipe with a rescaling are clamped by tanh in every layer and rescaled where the quantized
      network will be; without a rescaling they stay as they are (clamped ones alone train badly, SAT figure 2b);
    - norm="layer_batch" replaces batch normalizations by layer-batch normalizations with their affine, norm="l1" by L1
      batch normalizations that evaluate to the same.

    Args:
        model: a float model.
        recipe: the recipe that `quantize_` will be given.
        example_inputs: a tensor, or a tuple of positional arguments, as the model's forward takes them.
        filter: called with (qualified name, layer); False leaves the layer's weight as it is.

    Returns:
        The same model.

    Raises:
        ValueError: a layer's weight is reparametrized already; the model is wrapped for distributed training.

    Warns:
        UserWarning: a layer's weights are so small that rescaling makes its learning rate more than 100 times larger.
    """
    refuse_wrapped("float_form_", model)
    layers = {name: module for name, module in model.named_modules() if type(module) in FORMS}
    done = [name for name, module in model.named_modules() if parametrize.is_parametrized(module, "weight")]
    if done:
        raise ValueError(f"float_form_: the weight of {done[0]!r} is reparametrized already")
    trace = observe(model, example_inputs, layers)
    ran = sorted((seen.order, name) for name, seen in trace.layers.items() if seen.calls)
    edges = {ran[0][1], ran[-1][1]} if ran else set()
    for name, module in layers.items():
        if filter is not None and not filter(name, module):
            continue
        transform = _transform(recipe, module, edge=name in edges, normalized=name in trace.normalized)
        if transform is not None:
            if getattr(transform.transform, "rescale", False) and name not in trace.normalized:
                warn_of_gain("float_form_", name, module.weight)
            parametrize.register_parametrization(module, "weight", transform)
    replace_norms(model, recipe.norm)
    return model


def warn_of_gain(op: str, name: str, weight: Tensor) -> None:
    """Where SAT's rescaling multiplies a weight's gradient by more than LARGEST_GAIN."""
    gain = sat_gain(weight)
    if gain > LARGEST_GAIN:
        wanted = (weight.shape[0] * weight[0, 0].numel()) ** -0.5
        warnings.warn(
            f"{op}: rescaling multiplies the gradient of the weight of {name!r} by {gain:.0f}, and so its learning "
            f"rate by {gain**2:.0f}: weights with a deviation of {wanted:.2g} in the place of "
            f"{float(weight.detach().square().mean().sqrt()):.2g} would leave both as they are",
            stacklevel=3,
        )


def float_type(module: nn.Module) -> type[nn.Module]:
    """The type of a float layer, seen through the reparametrization of `float_form_` and through no other."""
    return parametrize.type_before_parametrizations(module) if _is_ours(module) else type(module)


def strip_float_form_(model: nn.Module) -> None:
    """Take the reparametrizations of `float_form_` out, keeping the parameters behind them, in place."""
    for module in list(model.modules()):
        if _is_ours(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def _is_ours(module: nn.Module) -> bool:
    found = getattr(module, "parametrizations", None)
    if not isinstance(found, nn.ModuleDict) or set(found) != {"weight"}:
        return False
    return all(isinstance(part, _Reparametrized) for part in found["weight"].children())


def _transform(recipe: Recipe, layer: nn.Module, *, edge: bool, normalized: bool) -> _Reparametrized | None:
    inner = not edge or recipe.edges == "inner"
    if inner and recipe.transform is not None:
        return _Reparametrized(build_transform(recipe.transform.name, recipe.transform.options))
    part = recipe.weight if inner else recipe.edge_weight
    if part.name != "dorefa" or recipe.rescale is None or (edge and recipe.edges == "float"):
        return None
    convs = recipe.rescale.options.get("convs", "auto")
    applies = isinstance(layer, nn.Linear) or convs == "all" or (convs == "auto" and not normalized)
    constant = recipe.rescale.name == "constant"
    options = {
        "detach_max": part.options.get("detach_max", False),
        "rescale": applies and constant,
        "var_mode": recipe.rescale.options.get("var_mode", "meansq"),
    }
    return _Reparametrized(build_transform("tanh", options), keep_deviation=applies and not constant)
