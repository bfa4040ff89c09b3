"""Linear, Conv1d and Conv2d with quantized weights and inputs.

A float layer *becomes* a quantized one by changing its class, so parameters, hooks, state_dict keys and shared
references stay as they are; the quantizers are added as the submodules `weight_quant` and `act_quant`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantizers.base import ActivationQuantizer, Grid, Quantizer, WeightQuantizer
from ..quantizers.gradient import GradientQuantizer
from ..quantizers.pixels import PixelInput
from .gradient_product import Coded, Window, coded_product
from .reuse import StepWeights


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
    grad_quant: GradientQuantizer | None  # quantizes the output gradient, whose codes make the others; None: in float
    edge: bool  # first or last layer, on the recipe's edge grid
    step_weights: StepWeights | None = None  # where a step keeps what it has computed of the weight

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
        if self.weight_transform is None and not isinstance(self.act_quant, PixelInput):
            return self.weight
        if torch.compiler.is_compiling() or self.step_weights is None:
            return self._effective_weight()
        return self.step_weights.effective(self, self._effective_weight)

    def _effective_weight(self) -> Tensor:
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
        if torch.compiler.is_compiling() or self.step_weights is None:
            return self._quantized_weight()
        return self.step_weights.quantized(self, self._quantized_weight)

    def _quantized_weight(self) -> Tensor:
        return self.weight_quant(self.effective_weight())

    @property
    def shares_weights(self) -> bool:
        """Whether precisions have the quantized weight, or what is done to the weight before, in common."""
        transformed = self.weight_transform is not None or isinstance(self.act_quant, PixelInput)
        return len(self.precisions) > 1 and (transformed or self.weight_quant.same_at_all_precisions)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Fake-quantized (and then pooled) input at the current precision, with gradient."""
        q = x if self.act_quant is None else self.act_quant(x)
        return q if self.input_pool is None else self.input_pool(q)

    def counts_gradients(self, x: Tensor) -> bool:
        """Whether this forward pass will have gradients from integer codes."""
        return self.grad_quant is not None and torch.is_grad_enabled() and x.numel() > 0

    def coded_input(self, x: Tensor) -> Coded:
        """The codes of `quantized_input(x)`, for which the quantizer's step must be set (or all of x be zero).

        Raises:
            ValueError: a pooling of codes whose grid has an offset.
        """
        quantizer = self.act_quant
        if quantizer is None:
            raise ValueError("gradients from integer codes need a quantized input; this layer reads floats")
        detached = x.detach()
        if isinstance(quantizer, ActivationQuantizer) and not quantizer.is_initialized():
            return Coded(torch.zeros_like(detached, dtype=torch.int32), x.new_ones(1), x.new_zeros(1))
        grid, codes = quantizer.grid(detached), quantizer.codes(detached)
        scale, offset = grid.scale.detach(), torch.as_tensor(grid.offset, device=x.device).detach()
        if self.input_pool is None:
            return Coded(codes, scale, offset)
        if bool((offset != 0).any()):
            raise ValueError(
                "gradients from integer codes: the layer pools its input codes, whose grid has an offset; sums of "
                "codes need offset 0"
            )
        window = _window_size(self.input_pool)
        return Coded((self.input_pool(codes.double()) * window).round().to(torch.int32), scale / window, offset)

    def coded_weight(self) -> tuple[Tensor, Coded]:
        """The fake-quantized weight, with gradient, and its codes."""
        effective = self.effective_weight()
        weight = self.weight_quant(effective) if self.step_weights is None else self.quantized_weight()
        grid, codes = self.weight_quant.grid(effective.detach()), self.weight_quant.codes(effective.detach())
        return weight, Coded(codes, grid.scale.detach(), torch.as_tensor(grid.offset, device=codes.device).detach())

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
        if not self.counts_gradients(input):
            return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)
        assert self.grad_quant is not None
        x = self.quantized_input(input)  # which may set the step first
        weight, codes = self.coded_weight()
        return coded_product(
            x, weight, self.bias, self.coded_input(input), codes, None, self.grad_quant, training=self.training
        )


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
        grid, codes = border
        return self._framed(q, grid.dequantize(codes).to(q.dtype)), 0

    def _framed(self, q: Tensor, border: Tensor) -> Tensor:
        """q with the padding around it, filled with `border`."""
        frame = F.pad(torch.zeros_like(q[:1]), self._reversed_padding_repeated_twice, value=1.0)
        return F.pad(q, self._reversed_padding_repeated_twice) + frame * border

    def _coded_convolution(self, x: Tensor) -> Tensor:
        """The convolution with gradients from integer codes."""
        assert self.grad_quant is not None
        q, padding = self._padded(x)
        weight, codes = self.coded_weight()
        xc = self.coded_input(x)
        dims = len(self.stride)
        if padding == 0 and any(self._reversed_padding_repeated_twice):
            border = self._border(q)
            assert border is not None
            xc = Coded(self._framed(xc.codes, border[1].to(xc.codes.dtype)), xc.scale, xc.offset)
        elif isinstance(padding, str):  # zeros, perhaps not the same on both sides
            q, padding = F.pad(q, self._reversed_padding_repeated_twice), 0
            xc = Coded(F.pad(xc.codes, self._reversed_padding_repeated_twice), xc.scale, xc.offset)
        window = Window(self.stride, (0,) * dims if padding == 0 else padding, self.dilation, self.groups)
        if x.dim() == self.weight.dim():
            return coded_product(q, weight, self.bias, xc, codes, window, self.grad_quant, training=self.training)
        one = Coded(
            xc.codes.unsqueeze(0), xc.scale, xc.offset
        )  # a sample without the batch's dimension, as torch allows
        y = coded_product(
            q.unsqueeze(0), weight, self.bias, one, codes, window, self.grad_quant, training=self.training
        )
        return y.squeeze(0)

    def _border(self, like: Tensor) -> tuple[Grid, Tensor] | None:
        """Grid and codes of what stands for zero outside the map; None if that is zero itself."""
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
        return grid, codes


class QuantConv1d(_QuantConv, nn.Conv1d):
    """`torch.nn.Conv1d` on quantized input and weight: (N, C, L)."""

    def forward(self, input: Tensor) -> Tensor:
        if self.counts_gradients(input):
            return self._coded_convolution(input)
        q, padding = self._padded(input)
        return F.conv1d(q, self.quantized_weight(), self.bias, self.stride, padding, self.dilation, self.groups)


class QuantConv2d(_QuantConv, nn.Conv2d):
    """`torch.nn.Conv2d` on quantized input and weight: (N, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        if self.counts_gradients(input):
            return self._coded_convolution(input)
        q, padding = self._padded(input)
        return F.conv2d(q, self.quantized_weight(), self.bias, self.stride, padding, self.dilation, self.groups)


def _window_size(pool: nn.Module) -> int:
    """Positions that an average pooling adds up."""
    size: Any = getattr(pool, "kernel_size", None)
    if not isinstance(pool, nn.AvgPool1d | nn.AvgPool2d) or size is None:
        raise ValueError(f"gradients from integer codes: no number of positions of pooling {pool}")
    return math.prod(size) if isinstance(size, tuple) else int(size) ** (1 if isinstance(pool, nn.AvgPool1d) else 2)


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
    grad_quant: GradientQuantizer | None = None,
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
    layer.grad_quant = grad_quant
    if "input_pool" not in layer._modules:  # set before, where a pooling moved into the layer
        layer.input_pool = None
    if isinstance(act_quant, PixelInput):
        act_quant.dims = max(layer.weight.dim() - 2, 0)
    with torch.no_grad():
        layer.init_weight_steps_()
    layer.train(layer.training)
    return layer
