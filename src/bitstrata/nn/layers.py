"""Linear, Conv1d and Conv2d with quantized weights and inputs.

A float layer *becomes* a quantized one by changing its class, so parameters, hooks, state_dict keys and shared
references stay as they are; the quantizers are added as the submodules `weight_quant` and `act_quant`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantizers.base import ActivationQuantizer, Grid, Quantizer, WeightQuantizer
from ..quantizers.pixels import PixelInput


class QuantizedLayer(nn.Module):
    """Common part of the quantized layers.

    precision: the precision the layer runs at now; its weight and input widths follow from the quantizers' `bits`.
    """

    weight: Tensor
    bias: Any  # Parameter or None; torch's own classes declare it in two ways
    weight_quant: WeightQuantizer
    act_quant: Quantizer | None
    weight_transform: nn.Module | None  # what the quantizer sees of the weight, e.g. standardized
    input_pool: nn.Module | None  # average pooling between the quantized input and the convolution
    edge: bool  # first or last layer, on the recipe's edge grid

    @property
    def precision(self) -> int:
        return self.weight_quant.precision

    @property
    def precisions(self) -> tuple[int, ...]:
        return tuple(self.weight_quant.bits)

    def set_precision(self, precision: int) -> None:
        """ValueError if the layer was not quantized for it."""
        if precision not in self.weight_quant.bits:
            raise ValueError(f"set_precision: {precision} is not among this layer's precisions {self.precisions}")
        self.weight_quant.precision = precision
        if self.act_quant is not None:
            self.act_quant.precision = precision

    def effective_weight(self) -> Tensor:
        """The real-valued weight that is quantized: transformed, after division by std where the layer reads pixels."""
        weight = self.weight
        if isinstance(self.act_quant, PixelInput):
            weight = weight * self.per_input_channel(tuple(1.0 / s for s in self.act_quant.std))
        return weight if self.weight_transform is None else self.weight_transform(weight)

    def weight_grid(self) -> Grid:
        """The grid of the weight's codes at the current precision."""
        return self.weight_quant.grid(self.effective_weight().detach())

    def weight_codes(self) -> Tensor:
        """Integer codes of the weight at the current precision: int32, the weight's shape."""
        return self.weight_quant.codes(self.effective_weight().detach())

    def per_input_channel(self, values: tuple[float, ...]) -> Tensor:
        """One number, or one an input channel, shaped to broadcast over the weight (out, in/groups, ...)."""
        if len(values) == 1:
            return self.weight.new_tensor(values)
        groups = int(getattr(self, "groups", 1))
        table = self.weight.new_tensor(values).view(groups, -1)
        table = table.repeat_interleave(self.weight.shape[0] // groups, dim=0)
        return table.view(*table.shape, *[1] * (self.weight.dim() - 2))

    def quantized_weight(self) -> Tensor:
        """Fake-quantized weight at the current precision, with gradient."""
        return self.weight_quant(self.effective_weight())

    def quantized_input(self, x: Tensor) -> Tensor:
        """Fake-quantized (and then pooled) input at the current precision, with gradient."""
        q = x if self.act_quant is None else self.act_quant(x)
        return q if self.input_pool is None else self.input_pool(q)

    def init_weight_steps_(self) -> None:
        """Set the weight quantizer's steps from the present weight."""
        self.weight_quant.init_(self.effective_weight().detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not any(key.startswith(f"{prefix}weight_quant.") for key in state_dict):
            self.init_weight_steps_()
            if isinstance(self.act_quant, ActivationQuantizer):
                self.act_quant.restart_()


class QuantLinear(QuantizedLayer, nn.Linear):
    """`torch.nn.Linear` on quantized input and weight: (..., in) -> (..., out)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class _QuantConv(QuantizedLayer):
    _reversed_padding_repeated_twice: list[int]
    padding: Any
    stride: Any
    dilation: Any
    groups: int

    def _padded(self, x: Tensor) -> tuple[Tensor, Any]:
        """Quantized input and what padding is left for the convolution itself.

        A grid without an exact zero pads with its code nearest zero, before the convolution.
        """
        q = self.quantized_input(x)
        border = self._border(q) if any(self._reversed_padding_repeated_twice) else None
        if border is None:
            return q, self.padding
        frame = F.pad(torch.zeros_like(q[:1]), self._reversed_padding_repeated_twice, value=1.0)
        return F.pad(q, self._reversed_padding_repeated_twice) + frame * border, 0

    def _border(self, like: Tensor) -> Tensor | None:
        """The value that stands for zero outside the map, by the arithmetic of a value inside; None if it is zero."""
        quantizer = self.act_quant
        if quantizer is None or not quantizer.shifted:
            return None
        if isinstance(quantizer, ActivationQuantizer) and not quantizer.is_initialized():
            return None  # only an all-zero map comes this far
        if isinstance(quantizer, PixelInput):
            codes = quantizer.channel(tuple(float(c) for c in quantizer.pad_codes), like)
            grid = quantizer.grid(like)
        else:
            grid = quantizer.grid()
            codes = (-torch.as_tensor(grid.offset)).round().clamp(grid.lo, grid.hi)
        return grid.dequantize(codes).to(like.dtype)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """`torch.nn.Conv1d` on quantized input and weight: (N, C, L)."""

    def forward(self, input: Tensor) -> Tensor:
        q, padding = self._padded(input)
        return F.conv1d(q, self.quantized_weight(), self.bias, self.stride, padding, self.dilation, self.groups)


class QuantConv2d(_QuantConv, nn.Conv2d):
    """`torch.nn.Conv2d` on quantized input and weight: (N, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        q, padding = self._padded(input)
        return F.conv2d(q, self.quantized_weight(), self.bias, self.stride, padding, self.dilation, self.groups)


FORMS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
}


def convert(
    layer: nn.Module,
    weight_quant: WeightQuantizer,
    act_quant: Quantizer | None,
    *,
    edge: bool,
    weight_transform: nn.Module | None = None,
) -> QuantizedLayer:
    """Turn a float layer into its quantized form, in place, and set the weight steps from its weight.

    Raises:
        TypeError: no quantized form of this type.
        ValueError: a padding mode other than zeros.
    """
    form = FORMS.get(type(layer))
    if form is None:
        raise TypeError(
            f"convert: no quantized form of {type(layer).__name__}; there are: {[t.__name__ for t in FORMS]}"
        )
    mode = getattr(layer, "padding_mode", "zeros")
    if mode != "zeros":
        raise ValueError(f"convert: padding_mode must be 'zeros', got {mode!r}")
    layer.__class__ = form
    assert isinstance(layer, QuantizedLayer)
    device, dtype = layer.weight.device, layer.weight.dtype
    layer.weight_quant = weight_quant.to(device=device, dtype=dtype)
    layer.act_quant = None if act_quant is None else act_quant.to(device=device, dtype=dtype)
    layer.edge = edge
    layer.weight_transform = weight_transform
    if "input_pool" not in layer._modules:  # set before, where a pooling moved into the layer
        layer.input_pool = None
    if isinstance(act_quant, PixelInput):
        act_quant.dims = max(layer.weight.dim() - 2, 0)
    with torch.no_grad():
        layer.init_weight_steps_()
    layer.train(layer.training)
    return layer
