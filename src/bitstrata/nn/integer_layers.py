"""Layers that train in integers: what they share, their registry, and Linear, Conv1d and Conv2d.

A float layer *becomes* one of these by changing its class, so parameters, hooks, tied weights and state_dict keys stay
as they are; nothing is added to the state_dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..integer.autograd import integer_conv, integer_linear
from ..integer.convolution import Geometry
from ..integer.engine_step import SharedWeight
from ..integer.frozen import FrozenRange
from ..integer.layer_call import LayerState
from ..integer.rounding import CounterGenerator
from ..integer.rule import IntegerRule

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
    gradients reach straight through. For the backward pass a product keeps the packed codes of its input and not the
    input. In evaluation mode everything is rounded to nearest. An empty batch gives an empty result and gradients of 0.
    Ranges are those of the batch at hand, in evaluation too, so the result of a sample depends on the others, until
    `freeze_` fixes them for evaluation.

    Args:
        rule, seed, index: as for `to_integer`; all others are those of torch's layer.

    Attributes:
        rule: an `IntegerRule`; may be exchanged at any time.
        state: of layers with one product, a `LayerState`: the layer's name, the generator of its gradients' rounding,
            and how many steps were skipped.
        states: product -> its `LayerState`. The product of a layer that has only one is called "".
    """

    multiplies: ClassVar[bool] = True  # False for layers without a product
    inner_width: int | None = None  # of weights of the network's inner layers, which names its precision
    rule: IntegerRule
    state: LayerState

    def __init__(
        self, *args: Any, rule: IntegerRule | None = None, seed: int = 0, index: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._start(rule, seed, index, "")

    def _start(self, rule: IntegerRule | None, seed: int, index: int, name: str) -> None:
        self.rule = rule or IntegerRule()
        self._begin(self._label(name), layer_noise(seed, index))

    def _label(self, name: str) -> str:
        form = type(self).__name__
        return f"{form} {name!r}" if name else form

    def _begin(self, label: str, noise: CounterGenerator) -> None:
        self.state = LayerState(label, noise)

    @property
    def states(self) -> Mapping[str, LayerState]:
        return {"": self.state}

    def extra_repr(self) -> str:
        rule = self.rule
        grid = f"groups={rule.groups}" if rule.method == "shift" else "per tensor"
        widths = f"w/a/g={rule.w}/{rule.a}/{rule.g}, {grid}"
        return ", ".join(part for part in (super().extra_repr(), widths) if part)


FROZEN = ("frozen_range", "frozen_exponents", "frozen_signed")


class FreezableLayer(IntegerLayer):
    """Common part of the layers with one product, whose input range can be frozen for evaluation (`freeze_`).

    A frozen layer evaluates with the range and exponents it was given, so the result of a sample depends on it alone;
    training goes on with those of each batch. They are buffers, float32 (), uint8 (channels,) and bool (), which the
    state_dict of a frozen layer has and that of another has not: loading a state freezes the layer or thaws it.
    """

    @property
    def frozen(self) -> FrozenRange | None:
        """Range and exponents in evaluation; None where they are those of the batch."""
        if "frozen_range" not in self._buffers:
            return None
        values = [self._buffers[name] for name in FROZEN]
        assert all(value is not None for value in values)
        return FrozenRange(values[0], values[1], bool(values[2]))  # type: ignore[arg-type]

    def freeze_(self, frozen: FrozenRange) -> None:
        """Evaluate with these from now on."""
        for name, value in zip(FROZEN, (frozen.range, frozen.exponents, torch.tensor(frozen.signed)), strict=True):
            self.register_buffer(name, value.detach().clone())

    def thaw_(self) -> None:
        """Evaluate with the range of each batch again."""
        for name in FROZEN:
            self._buffers.pop(name, None)

    @property
    def _evaluated_with(self) -> FrozenRange | None:
        return None if self.training else self.frozen

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = self._buffers.get("frozen_range")
        super()._apply(fn, recurse)
        if kept is not None:  # a change of dtype must not round the range
            self._buffers["frozen_range"] = kept.to(self._buffers["frozen_range"].device)  # type: ignore[union-attr]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.thaw_()
        if all(f"{prefix}{name}" in state_dict for name in FROZEN):
            device = next(iter(self.parameters())).device
            for name in FROZEN:
                self.register_buffer(name, torch.empty_like(state_dict[f"{prefix}{name}"], device=device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", frozen" if self.frozen is not None else "")


class IntegerLayerOfSeveral(IntegerLayer):
    """Common part of layers with several products, each with a `LayerState` and streams of its own.

    The products share the layer's streams in equal parts, and errors name the layer and the product. Under on_nonfinite
    "skip" each product skips by itself.

    Attributes:
        label: how errors call the layer.
    """

    label: str
    _states: dict[str, LayerState]

    def _product_names(self) -> tuple[str, ...]:
        raise NotImplementedError(f"{type(self).__name__} must name its products")

    def _begin(self, label: str, noise: CounterGenerator) -> None:
        names = self._product_names()
        share = STREAMS_A_LAYER // len(names)
        self.label = label
        self._states = {
            name: LayerState(f"{label}, {name}", CounterGenerator(noise.seed, noise.stream + position * share))
            for position, name in enumerate(names)
        }

    @property
    def states(self) -> Mapping[str, LayerState]:
        return self._states

    def _product(
        self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, shared: SharedWeight | None = None
    ) -> Tensor:
        """x W^T + b in integers, or in float where there is nothing to quantize."""
        if x.numel() == 0:
            return F.linear(x, weight, bias)
        state = self.states[name]
        return integer_linear(x, weight, bias, rule=self.rule, state=state, training=self.training, shared=shared)

    def _guarded(self, x: Tensor) -> Tensor:
        """x, whose gradient is 0 in steps that are skipped: for what the layer reads in float besides its products."""
        if self.rule.on_nonfinite != "skip" or not (x.requires_grad and torch.is_grad_enabled()):
            return x
        x = x.view_as(x)
        x.register_hook(lambda grad: grad if bool(grad.isfinite().all()) else torch.zeros_like(grad))
        return x


Form = TypeVar("Form", bound=type[IntegerLayer])
INTEGER_FORMS: dict[type[nn.Module], type[IntegerLayer]] = {}


def integer_form(layer: type[nn.Module]) -> Callable[[Form], Form]:
    """Class decorator: `to_integer` and `integer_` turn layers of exactly the type `layer` into the class."""

    def register(form: Form) -> Form:
        INTEGER_FORMS[layer] = form
        return form

    return register


@integer_form(nn.Linear)
class IntegerLinear(FreezableLayer, nn.Linear):
    """`torch.nn.Linear` in integers: (..., in) -> (..., out); see `IntegerLayer`."""

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() == 0:
            return F.linear(input, self.weight, self.bias)
        frozen = self._evaluated_with
        return integer_linear(
            input, self.weight, self.bias, rule=self.rule, state=self.state, training=self.training, frozen=frozen
        )


class _IntegerConv(FreezableLayer):
    weight: Tensor
    bias: Any  # Parameter or None; torch's own classes declare it in two ways
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
            x,
            self.weight,
            self.bias,
            geometry,
            rule=self.rule,
            state=self.state,
            training=self.training,
            frozen=self._evaluated_with,
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


@integer_form(nn.Conv1d)
class IntegerConv1d(_IntegerConv, nn.Conv1d):
    """`torch.nn.Conv1d` in integers: (N, C, L), every padding and padding mode; see `IntegerLayer`."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv(input) if input.numel() else nn.Conv1d.forward(self, input)


@integer_form(nn.Conv2d)
class IntegerConv2d(_IntegerConv, nn.Conv2d):
    """`torch.nn.Conv2d` in integers: (N, C, H, W), every padding and padding mode; see `IntegerLayer`."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv(input) if input.numel() else nn.Conv2d.forward(self, input)


def to_integer(
    layer: nn.Module, rule: IntegerRule | None = None, *, seed: int = 0, index: int = 0, name: str = ""
) -> IntegerLayer:
    """Turn a layer into the one that trains in integers, in place.

    Linear, Conv1d, Conv2d, Embedding, MultiheadAttention, LSTM, GRU, RNN and the cells LSTMCell, GRUCell, RNNCell.
    Torch's transformer layers have a fused path for evaluation that reads the weights of their parts; `integer_`
    switches it off.

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
