"""The precision a model runs at: read it, set it for all layers or some, set it for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral

from torch import nn

from ..nn.layers import QuantizedLayer
from .wrapped import unwrapped


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Qualified name -> quantized layer, in the model's order; names are those inside DDP and compiled models."""
    return {name: module for name, module in unwrapped(model).named_modules() if isinstance(module, QuantizedLayer)}


def precisions(model: nn.Module) -> tuple[int, ...]:
    """Precisions the model was quantized for, ascending; () for a float model."""
    found = {p for layer in quantized_layers(model).values() for p in layer.precisions}
    return tuple(sorted(found))


def precision_map(model: nn.Module) -> dict[str, int]:
    """Layer name -> the precision it runs at now."""
    return {name: layer.precision for name, layer in quantized_layers(model).items()}


def set_precision(model: nn.Module, precision: int | Mapping[str, int]) -> None:
    """Run at another precision: all layers at one, or some layers at their own (the others keep theirs).

    Each batch normalization follows the layer that owns it.

    Raises:
        ValueError: a precision the model was not quantized for, an unknown layer, or a float model; nothing is changed.
    """
    _set(quantized_layers(model), precision)


def _set(layers: Mapping[str, QuantizedLayer], precision: int | Mapping[str, int]) -> None:
    if not layers:
        raise ValueError("set_precision: the model has no quantized layers; call quantize_ first")
    wanted = dict.fromkeys(layers, precision) if not isinstance(precision, Mapping) else dict(precision)
    for name, value in wanted.items():
        if name not in layers:
            raise ValueError(f"set_precision: no quantized layer named {name!r}; there are: {', '.join(layers)}")
        if isinstance(value, bool) or not isinstance(value, Integral) or value not in layers[name].precisions:
            raise ValueError(
                f"set_precision: {value!r} is not among the precisions {layers[name].precisions} of {name!r}"
            )
    for name, value in wanted.items():
        layers[name].set_precision(int(value))


@contextmanager
def precision(model: nn.Module, value: int | Mapping[str, int]) -> Iterator[nn.Module]:
    """Run at another precision inside the `with` block; the former per-layer precisions return after it."""
    layers = quantized_layers(model)  # once: training does this at every step
    before = [(layer, layer.precision) for layer in layers.values()]
    _set(layers, value)
    try:
        yield model
    finally:
        for layer, own in before:
            layer.set_precision(own)
