"""The product of a quantized layer whose gradients are computed from integer codes.

Forward is the product of the fake-quantized input and weight as it is. Backward quantizes the output gradient once and
multiplies codes: gradient by weight for the input, gradient by input for the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..integer.shiftquant import along
from ..quantizers.gradient import GradientQuantizer

FINEST_OFFSET = 256  # offsets that are multiples of 1/256 become integers, as in programs
EXACT = {torch.float32: 2**24, torch.float64: 2**53}


@dataclass(frozen=True)
class Coded:
    """What integers stand for a fake-quantized tensor: value = scale * (code + offset).

    Attributes:
        codes: integers of the tensor's shape.
        scale: one element; of a weight also one an output channel.
        offset: a number; of an input also one an input channel.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Window:
    """Stride, padding (zeros, code 0), dilation and groups of a convolution, an entry a spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class _Call:
    """One call of a layer; window None for linear."""

    quantizer: GradientQuantizer
    window: Window | None
    training: bool

    def axis(self, x: Tensor) -> int:
        return x.dim() - 1 if self.window is None else 1


class _CodedGradients(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, xc: Coded, wc: Coded, call: _Call
    ) -> Tensor:
        ctx.call = call
        ctx.like = [None if t is None else (t.shape, t.dtype) for t in (x, weight, bias)]
        ctx.save_for_backward(_small(xc.codes), xc.scale, xc.offset, _small(wc.codes), wc.scale, wc.offset)
        if call.window is None:
            return F.linear(x, weight, bias)
        convolve = F.conv2d if x.dim() == 4 else F.conv1d
        w = call.window
        return convolve(x, weight, bias, w.stride, w.padding, w.dilation, w.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call, needs = ctx.call, ctx.needs_input_grad
        if not call.quantizer.usable(grad):
            zeros = [grad.new_zeros(t[0], dtype=t[1]) if n else None for t, n in zip(ctx.like, needs, strict=False)]
            return *zeros, None, None, None
        saved = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            products = _Products(call, Coded(*saved[:3]), Coded(*saved[3:]), grad)
            gx = products.of_input(*ctx.like[0]) if needs[0] else None
            gw = products.of_weight(*ctx.like[1]) if needs[1] else None
            gb = products.of_bias(*ctx.like[2]) if needs[2] else None
        return gx, gw, gb, None, None, None


def _small(codes: Tensor) -> Tensor:
    """Codes in the smallest integer type that holds them."""
    low, high = (int(v) for v in codes.aminmax())
    if low >= 0 and high <= 255:
        return codes.to(torch.uint8)
    return codes.to(torch.int8 if low >= -128 and high <= 127 else torch.int16)


class _Products:
    """Both gradients of one backward pass, from one quantization of the output gradient.

    Weights with a step an output channel have it inside the sum of the input gradient. There the gradient of the
    integer sums is quantized, gradient times step, and the weight gradient divides by the step, which is outside.
    """

    def __init__(self, call: _Call, x: Coded, w: Coded, grad: Tensor) -> None:
        self.call, self.x, self.w = call, x, w
        self.axis = call.axis(grad)
        self.steps: Tensor | None = None
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if w.scale.numel() > 1:
            steps = w.scale.detach().reshape(-1).to(wide.dtype)
            self.steps = torch.where(steps > 0, steps, torch.ones_like(steps))
            wide = wide * along(self.steps, self.axis, grad.dim())
        self.g = call.quantizer.quantize(wide, self.axis, training=call.training)

    def of_input(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Gradient of the fake-quantized input: sum over outputs of (G code << shift) * (weight code + offset)."""
        shifted = self.g.codes.to(torch.int32) << along(self.g.shifts().to(torch.int32), self.axis, self.g.codes.dim())
        mul, add, rest = _integer_offset(self.w.offset)
        weights = self.w.codes.to(torch.int32) * mul + add
        total = self._back(shifted, weights, shape).double()
        if rest:
            total = total + rest * self._back(shifted, torch.ones_like(weights), shape).double()
        unit = self.g.scale.double() * 2.0 ** (1 - self.g.groups) / mul
        if self.steps is None:
            unit = unit * self.w.scale.double().reshape(())
        return (total * unit).to(dtype)

    def of_weight(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Gradient of the fake-quantized weight: sum over samples and positions of G code * (input code + offset)."""
        total = self._across(shape).double()
        if bool((self.x.offset != 0).any()):  # such inputs have no padding left, so every tap meets every position
            total = total + self._offsets(shape) * along(self._code_sums(), 0, len(shape))
        return (total * along(self._outer(), 0, len(shape)) * self.x.scale.double().reshape(())).to(dtype)

    def of_bias(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Gradient of the bias: sums of codes."""
        return (self._code_sums() * self._outer()).to(dtype).reshape(shape)

    def _outer(self) -> Tensor:
        """What one code of each output channel stands for in the layer's output gradient: float64 (out,)."""
        unit = self.g.scale.double() * self.g.factors(torch.float64)
        return unit if self.steps is None else unit / self.steps.double()

    def _code_sums(self) -> Tensor:
        """Sum of each output channel's codes: float64 (out,)."""
        others = [d for d in range(self.g.codes.dim()) if d != self.axis]
        return self.g.codes.sum(dim=others, dtype=torch.int64).double() if others else self.g.codes.double()

    def _offsets(self, shape: torch.Size) -> Tensor:
        """The input's offsets, one element or (out, in / groups, ...) for the weight's shape."""
        offset = self.x.offset.double().reshape(-1)
        if offset.numel() == 1:
            return offset.reshape(())
        groups = 1 if self.call.window is None else self.call.window.groups
        rows = offset.reshape(groups, -1).repeat_interleave(shape[0] // groups, dim=0)
        return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))

    def _back(self, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
        terms = w.shape[0] if self.call.window is None else w[:, 0].numel() // self.call.window.groups
        kind = _exact_type(terms, self.g.largest << (self.g.groups - 1), int(w.abs().max()), g)
        g, w = g.to(kind), w.to(kind)
        if self.call.window is None:
            return g @ w
        return _convolution(g, g.new_empty(shape), w, self.call.window, 0)

    def _across(self, shape: torch.Size) -> Tensor:
        x, codes = self.x.codes, self.g.codes
        terms = codes.numel() // codes.shape[self.axis]
        kind = _exact_type(terms, self.g.largest, max(abs(int(v)) for v in x.aminmax()), codes)
        if self.call.window is None:
            return codes.reshape(-1, codes.shape[-1]).to(kind).T @ x.reshape(-1, x.shape[-1]).to(kind)
        g = codes.to(kind)
        return _convolution(g, x.to(kind), g.new_empty(shape), self.call.window, 1)


def _integer_offset(offset: Tensor) -> tuple[int, int, float]:
    """(mul, add, rest) with code + offset = (mul code + add) / mul + rest / mul, the first two being integers."""
    number = float(offset)
    ratio = Fraction(number)
    return (ratio.denominator, ratio.numerator, 0.0) if ratio.denominator <= FINEST_OFFSET else (1, 0, number)


def _exact_type(terms: int, left: int, right: int, like: Tensor) -> torch.dtype:
    """The floating type in which sums of `terms` products of integers up to left and right have no rounding.

    Float32 only on CPUs, where neither reduced precision nor a transform of the convolution comes in between.
    """
    bound = terms * left * right
    plain = like.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    if plain and bound < EXACT[torch.float32]:
        return torch.float32
    if bound >= EXACT[torch.float64]:
        raise ValueError(f"gradients from codes: sums may reach {bound}, beyond the 2^53 up to which float64 is exact")
    return torch.float64


def _convolution(g: Tensor, x: Tensor, w: Tensor, window: Window, which: int) -> Tensor:
    """The input gradient (which = 0) or the weight gradient (1) of a convolution."""
    mask = [which == 0, which == 1, False]
    zeros = [0] * len(window.stride)
    found = torch.ops.aten.convolution_backward(
        g, x, w, None, window.stride, window.padding, window.dilation, False, zeros, window.groups, mask
    )
    result: Tensor = found[which]
    return result


def coded_product(  # noqa: PLR0917
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    xc: Coded,
    wc: Coded,
    window: Window | None,
    quantizer: GradientQuantizer,
    *,
    training: bool = True,
) -> Tensor:
    """The product of fake-quantized x and weight, with gradients from integer codes.

    Forward: `F.linear`, or a convolution with a window. Backward, with G the codes of the output gradient, quantized
    once by `quantizer`: dL/dx from G and the weight's codes, dL/dweight from G and the codes of x, dL/dbias from sums
    of G. Integers are summed exactly; offsets of the grids enter as offset times sums of codes; factors are float64,
    rounded once.

    Args:
        x: floating (..., in), or (samples, in, [height,] width) with a window, not empty: xc's values.
        weight: floating (out, in), or (out, in / groups, ...): wc's values. bias: (out,) or None.
        window: None for linear. x with an offset must be padded already, its window's padding 0.
        quantizer: its noise decides stochastic rounding. training: False rounds to nearest.

    Returns:
        What the float product returns. Differentiable once.

    Raises:
        ValueError: in the backward pass, a gradient that is not finite, unless the quantizer skips it; sums that no
            floating type holds exactly.
    """
    result: Tensor = _CodedGradients.apply(x, weight, bias, xc, wc, _Call(quantizer, window, training))
    return result
