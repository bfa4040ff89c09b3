"""What stochastic rounding adds to the gradients that arrive at layers, under quantizers of different granularity.

Source: Guo, Liu et al., "Towards accurate and efficient sub-8-bit integer training", section 4.1, appendix B, figure
10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..integer.groups import channel_ranges, check_groups
from ..integer.peers import channel_steps, quantization_variance
from ..integer.powers import WIDEST, power_variance
from ..integer.shiftquant import check_bits
from .arriving import arriving_gradients
from .landscape import Loss

GROUPS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class LayerVariance:
    """The gradient at one layer.

    Keys of `variance` and `bound`: ("tensor", 1), one step for all; ("channel", channels), a step a channel; ("shift",
    n) and ("optimal", n) for each number of groups n asked for, the latter with the n ranges that minimize the bound.
    `variance` has ("powers", 1) too where the bits are few enough: codes that are powers of two (`power_quantize`).

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
    seen = arriving_gradients(model, loss, batch, training=training, where="gradient_variance")
    layers, missed = {}, []
    for name, (axis, gradients) in seen.items():
        if gradients:
            layers[name] = _measured(gradients, axis, bits, wanted)
        else:
            missed.append(name)
    return GradientVariance(layers, tuple(missed), bits)


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
    if bits <= WIDEST:
        variance["powers", 1] = sum(power_variance(gradient, bits) for gradient in gradients if gradient.numel())
    elements = sum(gradient.numel() for gradient in gradients)
    return LayerVariance(channels, elements, sum(spreads) / max(1, len(spreads)), variance, bound)


def _spread(ranges: Tensor) -> float:
    used = ranges[ranges > 0]
    return float(used.amax() / used.median()) if used.numel() else 1.0
