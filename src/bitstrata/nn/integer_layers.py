"""Linear, Conv1d and Conv2d that train in integers.

A float layer *becomes* one of these by changing its class, so parameters, hooks, tied weights and state_dict keys stay
as they are; nothing is added to the state_dict.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..integer.autograd import IntegerRule, LayerState, integer_conv, integer_linear
from ..integer.convolution import Geometry
from ..integer.rounding import CounterGenerator

STREAMS_A_LAYER = 1 << 40  # gradients of one layer before its streams meet the next one's
MAX_LAYERS = 1 << 23


def layer_noise(seed: int, index: int) -> CounterGenerator:
    """The generator of module number `index` of a model: streams of its own under the model's seed.

    Raises:
        ValueError: index outside 0..2^23 - 1; seed outside 0..2^64 - 1.
    """
    if not 0 <= index < MAX_LAYERS:
        raise ValueError(f"layer_noise: index must be in 0..{MAX_LAYERS - 1}, got {index}")
    return CounterGenerator(seed, index * STREAMS_A_LAYER)


class IntegerLayer(nn.Module):
    """Common part of the layers that train in integers (Guo, Liu et al., section 4.1); see `integer_linear`.

    Forward product, input gradient and weight gradient are products of integer codes; the weight is a float master that
    gradients reach straight through. For the backward pass a layer keeps the packed codes of its input and not the
    input. In evaluation mode everything is rounded to nearest. An empty batch gives an empty result and gradients of 0.
    Ranges are those of the batch at hand, in evaluation too, so the result of a sample depends on the others.

    Args:
        rule, seed, index: as for `to_integer`; all others are those of torch's layer.

    Attributes:
        rule: an `IntegerRule`; may be exchanged at any time.
        state: a `LayerState`: the layer's name, the generator of its gradients' rounding, and how many steps were
            skipped.
    """

    weight: Tensor
    bias: Any  # Parameter or None; torch's own classes declare it in two ways
    rule: IntegerRule
    state: LayerState

    def __init__(
        self, *args: Any, rule: IntegerRule | None = None, seed: int = 0, index: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._start(rule, seed, index, "")

    def _start(self, rule: IntegerRule | None, seed: int, index: int, name: str) -> None:
        form = type(self).__name__
        self.rule = rule or IntegerRule()
        self.state = LayerState(f"{form} {name!r}" if name else form, layer_noise(seed, index))

    def extra_repr(self) -> str:
        rule = self.rule
        grid = f"groups={rule.groups}" if rule.method == "shift" else "per tensor"
        return f"{super().extra_repr()}, w/a/g={rule.w}/{rule.a}/{rule.g}, {grid}"


class IntegerLinear(IntegerLayer, nn.Linear):
    """`torch.nn.Linear` in integers: (..., in) -> (..., out); see `IntegerLayer`."""

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() == 0:
            return F.linear(input, self.weight, self.bias)
        return integer_linear(input, self.weight, self.bias, rule=self.rule, state=self.state, training=self.training)


class _IntegerConv(IntegerLayer):
    _reversed_padding_repeated_twice: list[int]
    padding: Any
    padding_mode: Any
    stride: Any
    dilation: Any
    groups: int

    def _conv(self, x: Tensor) -> Tensor:
        """The convolution of a batch that is not empty."""
        if x.dim() == self.weight.dim() - 1:  # one sample without the dimension of the batch, as torch allows
            return self._conv(x.unsqueeze(0)).squeeze(0)
        x, padding = self._padded(x)
        geometry = Geometry(self.stride, padding, self.dilation, self.groups)
        return integer_conv(
            x, self.weight, self.bias, geometry, rule=self.rule, state=self.state, training=self.training
        )

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The input and what zero padding, the same on both sides, is left for the convolution."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return x, tuple(self.padding)
        frame = self._reversed_padding_repeated_twice
        before, after = frame[::2], frame[1::2]
        if self.padding_mode == "zeros" and before == after:
            return x, tuple(reversed(before))
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, frame, mode=mode), (0,) * len(before)


class IntegerConv1d(_IntegerConv, nn.Conv1d):
    """`torch.nn.Conv1d` in integers: (N, C, L), every padding and padding mode; see `IntegerLayer`."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv(input) if input.numel() else nn.Conv1d.forward(self, input)


class IntegerConv2d(_IntegerConv, nn.Conv2d):
    """`torch.nn.Conv2d` in integers: (N, C, H, W), every padding and padding mode; see `IntegerLayer`."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv(input) if input.numel() else nn.Conv2d.forward(self, input)


INTEGER_FORMS: dict[type[nn.Module], type[IntegerLayer]] = {
    nn.Linear: IntegerLinear,
    nn.Conv1d: IntegerConv1d,
    nn.Conv2d: IntegerConv2d,
}


def to_integer(
    layer: nn.Module, rule: IntegerRule | None = None, *, seed: int = 0, index: int = 0, name: str = ""
) -> IntegerLayer:
    """Turn a Linear, Conv1d or Conv2d into the layer that trains in integers, in place.

    Args:
        layer: of exactly one of these types. rule: None for `IntegerRule()`.
        seed, index: which streams round the layer's gradients; give each layer of a model an index of its own.
        name: how errors call the layer; "" for its type.

    Raises:
        TypeError: another type. ValueError: index or seed out of range.
    """
    form = INTEGER_FORMS.get(type(layer))
    if form is None:
        raise TypeError(
            f"to_integer: no integer form of {type(layer).__name__}; there are: "
            f"{', '.join(t.__name__ for t in INTEGER_FORMS)}"
        )
    layer_noise(seed, index)  # checks both before the layer changes
    layer.__class__ = form
    assert isinstance(layer, IntegerLayer)
    layer._start(rule, seed, index, name)
    return layer
