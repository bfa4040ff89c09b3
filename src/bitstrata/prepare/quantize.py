"""quantize_: swap a model's layers for their quantized forms, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..nn.integer_layers import layer_noise
from ..nn.layers import FORMS, QuantizedLayer, convert
from ..quantizers.base import LayerFacts, Quantizer, WeightQuantizer
from ..quantizers.gradient import GradientQuantizer
from ..quantizers.registry import build, build_gradient, build_rescale, build_transform
from ..quantizers.rescale import ConstantRescale
from ..recipes.base import Part, Recipe
from .compiled import uncompiled
from .finite import not_finite, watched
from .float_form import float_type, strip_float_form_, warn_of_gain
from .integer_training import integer_
from .observe import LayerTrace, Trace, observe, tensors_in
from .placement import absorb_activations_
from .precision import quantized_layers
from .swap import SKIPPED, convert_norms, give_own_edges, replace_norms
from .wrapped import refuse_wrapped

Filter = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Pixels:
    """The model's input is an image normalised as (pixel/255 - mean)/std, one mean and std a channel (or one for all).

    Args:
        mean, std: numbers, or one number for all channels.

    With it the first layer's input code is the uint8 pixel itself.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            given: Any = getattr(self, name)
            values = (given,) if isinstance(given, int | float) else given
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"Pixels: mean and std must have one entry a channel, got {self.mean} and {self.std}")
        if not all(0 <= m <= 1 for m in self.mean) or not all(s > 0 for s in self.std):
            hint = "; they are of pixel / 255" if max(map(abs, (*self.mean, *self.std))) > 1 else ""
            raise ValueError(f"Pixels: mean must lie in 0..1 and std be positive, got {self.mean} and {self.std}{hint}")

    def for_channels(self, channels: int, layer: str) -> Mapping[str, tuple[float, ...]]:
        """Options of the pixel grid for a layer that reads `channels` channels or flattened features."""
        if len(self.mean) in (1, channels):
            return {"mean": self.mean, "std": self.std}
        if channels % len(self.mean):
            raise ValueError(
                f"quantize_: input=Pixels has {len(self.mean)} channels, but the first layer {layer!r} reads {channels}"
            )
        repeat = channels // len(self.mean)  # a linear layer behind a flatten: C, H, W order
        return {
            "mean": tuple(m for m in self.mean for _ in range(repeat)),
            "std": tuple(s for s in self.std for _ in range(repeat)),
        }

    def check(self, example: Any) -> None:
        """Warn where the example cannot be images normalised by these numbers."""
        x = next(tensors_in(example), None)
        if x is None or x.dim() < 2 or not x.is_floating_point() or len(self.mean) not in (1, x.shape[1]):
            return
        shape = (-1, *[1] * (x.dim() - 2))
        mean, std = (x.new_tensor(values).view(shape) for values in (self.mean, self.std))
        pixels = (x.detach() * std + mean) * 255
        low, high = float(pixels.min()), float(pixels.max())
        if low < -255 or high > 510:
            warnings.warn(
                f"quantize_: with input=Pixels(mean={self.mean}, std={self.std}) the example stands for pixels from "
                f"{low:.0f} to {high:.0f}, not 0 to 255: the model has to read (pixel / 255 - mean) / std",
                stacklevel=3,
            )


def quantize_(
    model: nn.Module, recipe: Recipe, example_inputs: Any, *, filter: Filter | None = None, input: Pixels | None = None
) -> nn.Module:
    """Swap Linear, Conv1d and Conv2d for their quantized forms and BatchNorm1d/2d for one a precision, in place.

    The example is run once to see which layers run, in which order and on inputs of which sign; parameters, hooks and
    float state_dict keys keep working. Activation steps are set by `calibrate_` or by the first training batch. With a
    recipe that trains in integers this is `integer_`, whose layers have nothing to calibrate.

    Args:
        model: any module; layers that never run, or of other types, stay as they are (`summary` says why).
        recipe: what to put in, e.g. ``recipes.strata()``.
        example_inputs: a tensor, or a tuple of positional arguments, as the model's forward takes them.
        filter: called with (qualified name, layer); False leaves the layer in float.
        input: `Pixels` if the model reads normalised images; else the first layer's input gets a learned 8-bit grid.

    Returns:
        The same model. One that torch.compile made is taken apart for this and compiles anew when it runs.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the model is wrapped for distributed training, or quantized already; no layer is left to quantize;
            parameters or statistics are not finite; a layer's input on the example is empty or not finite. The model is
            unchanged.

    Warns:
        UserWarning: an example that cannot be normalised pixels; layers that stay in front of the quantizer that should
            take their place; weights so small that SAT's rescaling makes their learning rate 100 times larger.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(recipe, Recipe):
        raise TypeError(f"quantize_: recipe must be a Recipe such as recipes.strata(), got {type(recipe).__name__}")
    refuse_wrapped("quantize_", model)
    given, model = model, uncompiled(model)
    if recipe.integers:
        _in_integers(model, recipe, example_inputs, filter, input)
        return given
    if quantized_layers(model):
        raise ValueError("quantize_: the model is quantized already; start from a float model")
    if type(model) in FORMS:
        raise ValueError(f"quantize_: the model is a bare {type(model).__name__}; wrap it in nn.Sequential")
    candidates = {name: module for name, module in model.named_modules() if float_type(module) in FORMS}
    trace = observe(model, example_inputs, candidates)
    if input is not None:
        input.check(example_inputs)
    ran = sorted((t.order, name) for name, t in trace.layers.items() if t.calls)
    first, last = (ran[0][1], ran[-1][1]) if ran else ("", "")
    skipped = _skips(candidates, trace, filter)
    skipped = {**_kept_in_float(recipe, candidates, {first, last}), **skipped}
    chosen = {name: module for name, module in candidates.items() if name not in skipped}
    if not chosen:
        raise ValueError(f"quantize_: no layer to quantize among {len(candidates)} candidates: {skipped or 'none ran'}")
    _refuse_not_finite(model, chosen, trace)
    if input is not None and (first in skipped or recipe.activation is None):
        why = skipped.get(first, f"recipe {recipe.name!r} keeps activations in float")
        raise ValueError(f"quantize_: input=Pixels is for a quantized first layer, but {first!r} reads floats: {why}")
    roles = {name: Role(name == first, name == last) for name in candidates}
    facts = {
        name: LayerFacts(
            "linear" if isinstance(module, nn.Linear) else "conv", name in trace.normalized, roles[name].edge
        )
        for name, module in chosen.items()
    }
    forms = {
        name: _form(name, module, recipe, trace.layers[name], facts[name], roles[name], input)
        for name, module in chosen.items()
    }
    if recipe.placement == "activation":
        standing = {n: chosen[n] for n, form in forms.items() if getattr(form.act_quant, "stands_for_relu", False)}
        kept = [placed for placed in absorb_activations_(model, example_inputs, standing) if placed.action == "kept"]
        if kept:
            warnings.warn(
                f"quantize_: {', '.join(repr(placed.name) for placed in kept)} stay in front of the quantizer that "
                f"should take their place ({kept[0].reason}): gradients below 0 are cut there, and an average that is "
                "kept comes before the quantizer",
                stacklevel=2,
            )
    for name, form in forms.items():
        rescaled = isinstance(form.weight_quant, ConstantRescale) and form.weight_quant.applies(chosen[name].weight)
        if rescaled and not facts[name].normalized and type(chosen[name]) in FORMS:
            warn_of_gain("quantize_", name, chosen[name].weight)
    strip_float_form_(model)
    for name, reason in skipped.items():
        candidates[name].__dict__[SKIPPED] = reason
    for name, form in forms.items():
        convert(
            candidates[name],
            form.weight_quant,
            form.act_quant,
            edge=roles[name].edge,
            weight_transform=form.weight_transform,
            grad_quant=form.grad_quant,
        )
    replace_norms(model, recipe.norm)
    convert_norms(model, recipe, trace)
    if recipe.own_edges:
        give_own_edges(model, recipe.precisions, first, last)
    _start_gradients(model)
    _disable_fused_paths(model)
    return given


def _in_integers(
    model: nn.Module, recipe: Recipe, example_inputs: Any, keep: Filter | None, input: Pixels | None
) -> nn.Module:
    """`integer_` by the parts of a recipe, which has made sure that they fit."""
    if input is not None:
        raise ValueError(
            f"quantize_: recipe {recipe.name!r} trains in integers, whose first layer quantizes the normalized image; "
            "leave input=Pixels out"
        )
    (w,) = recipe.precisions
    activation, gradient = recipe.activation, recipe.gradient
    assert activation is not None
    assert gradient is not None
    standard = {"rounding": "stochastic", "grid": "uniform", "on_nonfinite": "error", "seed": 0, "g": 4}
    backward = {**standard, **gradient.options}
    return integer_(
        model,
        example_inputs,
        w=w,
        a=recipe.activation_bits[w],
        g=backward["g"],
        edge_bits=recipe.edge_bits,
        norm=recipe.norm,
        grad_rounding=backward["rounding"],
        grad_grid=backward["grid"],
        on_nonfinite=backward["on_nonfinite"],
        seed=backward["seed"],
        filter=keep,
        **activation.options,
    )


def _start_gradients(model: nn.Module) -> None:
    """Every gradient quantizer gets its layer's name and random streams of its own."""
    for index, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, QuantizedLayer) and module.grad_quant is not None:
            quantizer = module.grad_quant
            quantizer.start_(f"{type(module).__name__} {name!r}", layer_noise(quantizer.seed, index))


@dataclass(frozen=True)
class Role:
    """Where a layer stands in the network."""

    first: bool
    last: bool

    @property
    def edge(self) -> bool:
        return self.first or self.last


def _refuse_not_finite(model: nn.Module, chosen: Mapping[str, nn.Module], trace: Trace) -> None:
    """ValueError naming a layer or normalization whose numbers, or whose input on the example, are of no use."""
    norms = {name: model.get_submodule(name) for name in trace.norm_owner}
    for name, module in {**chosen, **norms}.items():
        problem = not_finite(watched(module))
        if problem:
            raise ValueError(f"quantize_: {type(module).__name__} {name!r}: {problem}")
    for name in sorted(chosen, key=lambda name: trace.layers[name].order):
        if trace.layers[name].problem:
            raise ValueError(f"quantize_: the input of layer {name!r} on the example: {trace.layers[name].problem}")


def _kept_in_float(recipe: Recipe, candidates: Mapping[str, nn.Module], edges: set[str]) -> dict[str, str]:
    """Layers that the recipe leaves in float, with the reason."""
    kept = {}
    for name, module in candidates.items():
        if recipe.edges == "float" and name in edges:
            kept[name] = "edge layer, kept in float by the recipe"
        elif recipe.downsample == "float" and is_downsample(name, module):
            kept[name] = "downsampling layer, kept in float by the recipe"
    return kept


def is_downsample(name: str, module: nn.Module) -> bool:
    """Whether a layer is a shortcut's projection: a 1x1 convolution that strides, or is named so."""
    named = {"downsample", "shortcut"} & set(name.split("."))
    return isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1} and (bool(named) or max(module.stride) > 1)


def _skips(candidates: Mapping[str, nn.Module], trace: Trace, keep: Filter | None) -> dict[str, str]:
    skipped = {}
    for name, module in candidates.items():
        if not trace.layers[name].calls:
            skipped[name] = "did not run on the example"
        elif keep is not None and not keep(name, module):
            skipped[name] = "kept in float by the filter"
        elif getattr(module, "padding_mode", "zeros") != "zeros":
            skipped[name] = f"padding_mode {module.padding_mode!r} has no quantized form"
    return skipped


@dataclass(frozen=True)
class _Form:
    """What a layer is converted with."""

    weight_quant: WeightQuantizer
    act_quant: Quantizer | None
    weight_transform: nn.Module | None
    grad_quant: GradientQuantizer | None = None


def _form(  # noqa: PLR0917
    name: str,
    layer: nn.Module,
    recipe: Recipe,
    seen: LayerTrace,
    facts: LayerFacts,
    role: Role,
    pixels: Pixels | None,
) -> _Form:
    inner = not role.edge or recipe.edges == "inner"
    assert isinstance(layer.weight, Tensor)
    shape = layer.weight.shape
    edge_bits = dict.fromkeys(recipe.precisions, recipe.edge_bits)
    part = recipe.weight if inner else recipe.edge_weight
    bits = {p: p for p in recipe.precisions} if inner else edge_bits
    channels = shape[0] if (recipe.per_channel if inner else recipe.edge_per_channel) else None
    weight_quant = build(part.name, "weight", part.options, bits=bits, channels=channels)
    assert isinstance(weight_quant, WeightQuantizer)
    if recipe.rescale is not None:
        weight_quant = build_rescale(recipe.rescale.name, recipe.rescale.options, weight_quant)
    weight_quant.adapt_(facts)
    transform = None
    if inner and recipe.transform is not None:
        transform = build_transform(recipe.transform.name, recipe.transform.options)
    if recipe.activation is None:
        return _Form(weight_quant, None, transform)
    edge_input = role.first or (role.last and recipe.edges == "int8" and recipe.last_input == "edge")
    part = recipe.edge_activation if edge_input else recipe.activation
    if role.first and pixels is not None:
        features = shape[1] * int(getattr(layer, "groups", 1))
        part = Part("pixels", "input", pixels.for_channels(features, name))
    act_bits = edge_bits if edge_input else recipe.activation_bits
    act_quant = build(part.name, part.role, part.options, bits=act_bits, signed=seen.negative, shared=edge_input)
    act_quant.adapt_(facts)
    grad_quant = None
    if recipe.gradient is not None:
        made = build_gradient(recipe.gradient.name, recipe.gradient.options, edge=role.edge)
        assert isinstance(made, GradientQuantizer)
        grad_quant = made
    return _Form(weight_quant, act_quant, transform, grad_quant)


def _disable_fused_paths(model: nn.Module) -> None:
    """Torch's transformer layers have a fused path for evaluation that reads the float weights of their parts."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer) and quantized_layers(module):
            module.activation_relu_or_gelu = 0


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is one of the quantized layers."""
    return isinstance(module, QuantizedLayer)
