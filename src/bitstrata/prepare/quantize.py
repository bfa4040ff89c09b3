"""quantize_: swap a model's layers for their quantized forms, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..nn.layers import FORMS, QuantizedLayer, convert
from ..nn.norm import PrecisionBatchNorm
from ..quantizers.base import Quantizer, WeightQuantizer
from ..quantizers.registry import build
from ..recipes.base import Part, Recipe
from .observe import BATCH_NORMS, LayerTrace, Trace, observe
from .precision import quantized_layers

Filter = Callable[[str, nn.Module], bool]
SKIPPED = "_bitstrata_skipped"  # module attribute: why quantize_ left it in float


@dataclass(frozen=True)
class Pixels:
    """The model's input is an image normalised as (pixel/255 - mean)/std, one mean and std a channel (or one for all).

    With it the first layer's input code is the uint8 pixel itself.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(m) for m in self.mean))
        object.__setattr__(self, "std", tuple(float(s) for s in self.std))
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"Pixels: mean and std must have one entry a channel, got {self.mean} and {self.std}")
        if not all(0 <= m <= 1 for m in self.mean) or not all(s > 0 for s in self.std):
            raise ValueError(f"Pixels: mean must lie in 0..1 and std be positive, got {self.mean} and {self.std}")

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


def quantize_(
    model: nn.Module, recipe: Recipe, example_inputs: Any, *, filter: Filter | None = None, input: Pixels | None = None
) -> nn.Module:
    """Swap Linear, Conv1d and Conv2d for their quantized forms and BatchNorm1d/2d for one a precision, in place.

    The example is run once to see which layers run, in which order and on inputs of which sign; parameters, hooks and
    float state_dict keys keep working. Activation steps are set by `calibrate_` or by the first training batch.

    Args:
        model: any module; layers that never run, or of other types, stay as they are (`summary` says why).
        recipe: what to put in, e.g. ``recipes.strata()``.
        example_inputs: a tensor, or a tuple of positional arguments, as the model's forward takes them.
        filter: called with (qualified name, layer); False leaves the layer in float.
        input: `Pixels` if the model reads normalised images; else the first layer's input gets a learned 8-bit grid.

    Returns:
        The same model.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the model is quantized already, or no layer is left to quantize; the model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(recipe, Recipe):
        raise TypeError(f"quantize_: recipe must be a Recipe such as recipes.strata(), got {type(recipe).__name__}")
    if quantized_layers(model):
        raise ValueError("quantize_: the model is quantized already; start from a float model")
    if type(model) in FORMS:
        raise ValueError(f"quantize_: the model is a bare {type(model).__name__}; wrap it in nn.Sequential")
    candidates = {name: module for name, module in model.named_modules() if type(module) in FORMS}
    trace = observe(model, example_inputs, candidates)
    skipped = _skips(candidates, trace, filter)
    ran = sorted((t.order, name) for name, t in trace.layers.items() if t.calls)
    edges = {ran[0][1], ran[-1][1]} if ran else set()
    if recipe.edge_bits is None:
        skipped.update({name: "edge layer, kept in float by the recipe" for name in edges if name not in skipped})
    chosen = [name for name in candidates if name not in skipped]
    if not chosen:
        raise ValueError(f"quantize_: no layer to quantize among {len(candidates)} candidates: {skipped or 'none ran'}")
    first = ran[0][1]
    if input is not None and (first in skipped or recipe.activation is None):
        why = skipped.get(first, f"recipe {recipe.name!r} keeps activations in float")
        raise ValueError(f"quantize_: input=Pixels is for a quantized first layer, but {first!r} reads floats: {why}")
    plans = {
        name: _quantizers(
            name, module, recipe, trace.layers[name], edge=name in edges, pixels=input if name == first else None
        )
        for name, module in candidates.items()
        if name not in skipped
    }
    for name, reason in skipped.items():
        candidates[name].__dict__[SKIPPED] = reason
    for name, (weight_quant, act_quant) in plans.items():
        convert(candidates[name], weight_quant, act_quant, edge=name in edges)
    _convert_norms(model, recipe.precisions, trace)
    _disable_fused_paths(model)
    return model


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


def _quantizers(
    name: str, layer: nn.Module, recipe: Recipe, seen: LayerTrace, *, edge: bool, pixels: Pixels | None
) -> tuple[WeightQuantizer, Quantizer | None]:
    weight_part = recipe.edge_weight if edge else recipe.weight
    bits = dict.fromkeys(recipe.precisions, recipe.edge_bits or 8) if edge else {p: p for p in recipe.precisions}
    assert isinstance(layer.weight, Tensor)
    shape = layer.weight.shape
    channels = shape[0] if recipe.per_channel else None
    weight_quant = build(weight_part.quantizer, "weight", weight_part.options, bits=bits, channels=channels)
    assert isinstance(weight_quant, WeightQuantizer)
    if recipe.activation is None:
        return weight_quant, None
    part = recipe.edge_activation if edge else recipe.activation
    if pixels is not None:
        features = shape[1] * int(getattr(layer, "groups", 1))
        part = Part("pixels", "input", pixels.for_channels(features, name))
    act_bits = bits if edge else recipe.activation_bits
    act_quant = build(part.quantizer, part.role, part.options, bits=act_bits, signed=seen.negative, shared=edge)
    return weight_quant, act_quant


def _convert_norms(model: nn.Module, precisions: tuple[int, ...], trace: Trace) -> None:
    layers = quantized_layers(model)
    replaced: dict[int, PrecisionBatchNorm] = {}
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS):
            owner = trace.norm_owner.get(name)
            if owner in layers:
                replaced[id(module)] = PrecisionBatchNorm(module, precisions, owner, layers[owner])
            else:
                reason = f"follows {owner!r}, which is in float" if owner else "did not run on the example"
                module.__dict__[SKIPPED] = reason
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():  # named_children would hide a second name of the same module
            if id(child) in replaced:
                parent._modules[child_name] = replaced[id(child)]


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
