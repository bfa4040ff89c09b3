"""What stochastic rounding adds to the gradients that arrive at layers, under quantizers of different granularity.

Source: Guo, Liu et al., "Towards accurate and efficient sub-8-bit integer training", section 4.1, appendix B, figure
10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..fused import FusedNetwork
from ..integer.groups import channel_ranges, check_groups
from ..integer.peers import channel_steps, quantization_variance
from ..integer.shiftquant import check_bits
from ..nn.integer_layers import IntegerLayerOfSeveral
from .kept import kept
from .landscape import Loss

GROUPS = (1, 2, 3, 4, 6, 8)
AXES: dict[type[nn.Module], int] = {nn.Linear: -1, nn.Conv1d: -2, nn.Conv2d: -3}  # of a layer's output: its channels


@dataclass(frozen=True)
class LayerVariance:
    """The gradient at one layer.

    Keys of `variance` and `bound`: ("tensor", 1), one step for all; ("channel", channels), a step a channel; ("shift",
    n) and ("optimal", n) for each number of groups n asked for, the latter with the n ranges that minimize the bound.

    Attributes:
        channels: of the gradient. elements: of the gradient, all calls of the layer together.
        spread: the largest range max|g_i| of a channel divided by the median of those that are not zero; 1 for a
            gradient of zeros. Of several calls the mean.
        variance: sum over elements of d^2 f (1 - f), f the fractional part of g / d: the expected squared error.
        bound: sum over elements of d^2 / 4, which is N/4 sum_j d_j^2 (eq. 28): the largest it can be with these steps.
    """

    channels: int
    elements: int
    spread: float
    variance: dict[tuple[str, int], float]
    bound: dict[tuple[str, int], float]

    def relative(self, *, bound: bool = False) -> dict[tuple[str, int], float]:
        """The variances, or the bounds, divided by that per tensor; NaN where that is 0."""
        values = self.bound if bound else self.variance
        whole = values["tensor", 1]
        return {key: value / whole if whole else float("nan") for key, value in values.items()}


@dataclass(frozen=True)
class GradientVariance:
    """The gradients of one backward pass.

    Attributes:
        layers: qualified name -> its gradient, in the order of the forward pass; the products of a layer that has
            several by "layer.product".
        missed: names of layers that no gradient reached.
        bits: of the codes.
    """

    layers: dict[str, LayerVariance]
    missed: tuple[str, ...]
    bits: int

    def mean_relative(self, *, bound: bool = False) -> dict[tuple[str, int], float]:
        """`LayerVariance.relative`, the plain mean over layers whose variance per tensor is not 0; NaN if none is.

        "channel" has the key ("channel", 0) here, for layers differ in channels.
        """
        rows = []
        for layer in self.layers.values():
            if layer.variance["tensor", 1] > 0:
                found = layer.relative(bound=bound)
                rows.append({(kind, 0 if kind == "channel" else n): value for (kind, n), value in found.items()})
        keys = rows[0] if rows else {}
        return {key: sum(row[key] for row in rows) / len(rows) for key in keys}


def gradient_variance(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    *,
    bits: int = 4,
    groups: Sequence[int] = GROUPS,
    training: bool | None = None,
) -> GradientVariance:
    """The variance that quantizing each layer's incoming gradient would add, for quantizers from coarse to fine.

    The gradient is that of the layer's output as it arrives from above, before this layer quantizes it; in an integer
    network it carries the quantization of the layers above. Closed form, no sampling (`quantization_variance`). Always:
    shift with more groups <= shift with fewer <= tensor, since each grid contains the coarser one. Between other pairs
    the order holds for `bound` alone: channel <= optimal <= shift.

    Layers: Linear, Conv1d and Conv2d, float, quantized or in integers, and the products inside integer attention and
    recurrent layers. Those inside float attention and recurrent layers are not visible; `integer_` makes them so. Give
    the model itself and not its fused form, whose layers do not run one by one. A layer that runs several times has the
    sum over its runs.

    One forward and backward pass; the model is left as it was, `grad` of its parameters and the streams of its
    stochastic rounding included.

    Args:
        loss: called with (model, batch), gives one number as a tensor.
        batch: what `loss` takes.
        bits: of the codes, 2..8, in all layers alike.
        groups: numbers of groups, each 1..8.
        training: True or False for that mode of the model in the pass; None leaves every module in the mode it has.

    Raises:
        ValueError: bits or groups out of range; a fused network; no parameter needs a gradient; no layer got one; a
            gradient is not finite, with the name of the layer.
    """
    check_bits(bits, "gradient_variance")
    wanted = tuple(dict.fromkeys(groups))
    for number in wanted:
        check_groups(number, "gradient_variance")
    if any(isinstance(module, FusedNetwork) for module in model.modules()):
        raise ValueError(
            "gradient_variance: the layers of a fused network do not run one by one; give the network it was made of, "
            "its attribute `model`"
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"gradient_variance: no parameter of {type(model).__name__} needs a gradient")
    with kept(model, training=training), torch.enable_grad(), _watching(model) as seen:
        torch.autograd.grad(loss(model, batch), parameters, allow_unused=True)
    _refuse_not_finite(seen)
    layers, missed = {}, []
    for name, (axis, gradients) in seen.items():
        if gradients:
            layers[name] = _measured(gradients, axis, bits, wanted)
        else:
            missed.append(name)
    if not layers:
        raise ValueError(
            f"gradient_variance: no gradient reached a layer of {type(model).__name__} "
            f"(Linear, Conv1d, Conv2d, or a product of an integer layer); {len(missed)} are there"
        )
    return GradientVariance(layers, tuple(missed), bits)


Seen = dict[str, tuple[int, list[Tensor]]]


@contextmanager
def _watching(model: nn.Module) -> Iterator[Seen]:
    """Name -> (axis of the channels, gradients of the output), filled as a backward pass runs."""
    seen: Seen = {}
    handles, wrapped, watched = [], [], {}

    def watch(name: str, axis: int, output: Any) -> None:
        entry = seen.setdefault(name, (axis, []))
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: entry[1].append(gradient.detach().clone()))

    def after(name: str, axis: int) -> Callable[..., None]:
        return lambda module, args, output: watch(name, axis, output)

    def product_of(layer: IntegerLayerOfSeveral, owner: str) -> Callable[..., Tensor]:
        plain = layer._product

        def product(name: str, *operands: Any) -> Tensor:
            output = plain(name, *operands)
            watch(f"{owner}.{name}" if owner else name, -1, output)
            return output

        return product

    modules = dict(model.named_modules())
    inside = {id(child) for m in modules.values() if isinstance(m, nn.MultiheadAttention) for child in m.children()}
    try:
        for name, module in modules.items():
            if isinstance(module, IntegerLayerOfSeveral):
                module.__dict__["_product"] = product_of(module, name)
                wrapped.append(module)
            axis = next((axis for kind, axis in AXES.items() if isinstance(module, kind)), None)
            if axis is not None and id(module) not in inside:
                handles.append(module.register_forward_hook(after(name, axis)))
                watched[name] = axis
        yield seen
        for name, axis in watched.items():  # those that did not run, behind those that did
            seen.setdefault(name, (axis, []))
    finally:
        for handle in handles:
            handle.remove()
        for module in wrapped:
            del module.__dict__["_product"]


def _refuse_not_finite(seen: Seen) -> None:
    for name, (_, gradients) in reversed(seen.items()):  # the one nearest to the loss is the cause
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise ValueError(f"gradient_variance: the gradient at layer {name!r} contains NaN or infinity")


def _measured(gradients: list[Tensor], axis: int, bits: int, groups: tuple[int, ...]) -> LayerVariance:
    channels = gradients[0].shape[axis]
    quantizers = [("tensor", 1), ("channel", channels), *((kind, n) for kind in ("shift", "optimal") for n in groups)]
    variance, bound = dict.fromkeys(quantizers, 0.0), dict.fromkeys(quantizers, 0.0)
    spreads = []
    for gradient in gradients:
        if gradient.numel() == 0:
            continue
        spreads.append(_spread(channel_ranges(gradient.float(), axis)))
        for kind, number in quantizers:
            count = number if kind in ("shift", "optimal") else 1
            variance[kind, number] += quantization_variance(gradient, kind, bits=bits, groups=count, axis=axis)
            steps = channel_steps(gradient, kind, bits=bits, groups=count, axis=axis)
            bound[kind, number] += gradient.numel() // channels / 4 * float(steps.square().sum())
    elements = sum(gradient.numel() for gradient in gradients)
    return LayerVariance(channels, elements, sum(spreads) / max(1, len(spreads)), variance, bound)


def _spread(ranges: Tensor) -> float:
    used = ranges[ranges > 0]
    return float(used.amax() / used.median()) if used.numel() else 1.0
