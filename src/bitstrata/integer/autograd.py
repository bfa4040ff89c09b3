"""Linear and convolution whose three products of a training step are computed on integers, with gradients.

Source: Guo, Liu et al., "Towards accurate and efficient sub-8-bit integer training", section 4.1 and appendix D.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .convolution import Geometry
from .engine_step import OperandError, SharedWeight
from .frozen import FrozenRange
from .layer_call import LayerCall, LayerState
from .linear import bias_grad
from .recompute import recomputes, remember
from .rule import IntegerRule
from .shiftquant import PackedShift
from .untraced import untraced


class _IntegerProduct(torch.autograd.Function):
    """Y = X W^T + b on codes; keeps X's packed codes, exponents and scale, and a reference to W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: LayerCall) -> Tensor:
        ctx.call, ctx.packing = call, None
        ctx.like = [None if t is None else (t.shape, t.dtype, t.device) for t in (x, weight, bias)]
        keep = call.differentiated and ctx.needs_input_grad[1]
        ctx.usable, ctx.step = True, call.step(x, weight, bias)
        made = None
        if ctx.step is not None:
            with suppress(OperandError):  # which operations one by one report, or skip
                made = ctx.step.forward(x, weight, bias, call.activation_noise(), keep=keep)
        y, packed = made or _IntegerProduct.result(ctx, x, weight, bias, keep=keep)
        kept: list[Tensor | None] = [None, None, None]
        if packed is not None:
            kept = [packed.codes, packed.exponents, packed.scale]
            ctx.packing = (packed.shape, packed.bits, packed.axis, packed.groups, packed.signed, packed.channels_last)
        ctx.save_for_backward(*kept, weight if ctx.needs_input_grad[0] else None)
        return y.detach()  # no view, which a rectifier in place could not write

    @staticmethod
    def result(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *, keep: bool
    ) -> tuple[Tensor, PackedShift | None]:
        """The result by operations one by one, and the codes to keep."""
        call: LayerCall = ctx.call
        dtype = torch.promote_types(x.dtype, weight.dtype)
        ctx.step = None
        with torch.autocast(x.device.type, enabled=False):
            xq = call.activation(x)
            ctx.usable = xq is not None
            if xq is None:
                return torch.full(call.result_shape(x, weight), torch.nan, dtype=dtype, device=x.device), None
            y = call.forward(xq, call.weight(weight, "out"), dtype)
        if bias is not None:
            y.add_(bias.to(dtype))
        return y, xq.pack() if keep else None

    @staticmethod
    def again(ctx: Any, weight: Tensor, bias: Tensor | None, versions: tuple[int, ...]) -> Tensor:
        """The result once more, from the codes that are kept."""
        call: LayerCall = ctx.call
        if versions != _versions(weight, bias):
            raise RuntimeError(
                f"{call.state.name}: its weight or bias was written in place after the forward pass, whose result "
                "recompute_outputs has to compute again"
            )
        kept, _ = _IntegerProduct.kept(ctx)
        if ctx.step is not None:
            y: Tensor = ctx.step.again(kept, weight, bias)
            return y
        with torch.autocast(weight.device.type, enabled=False):
            y = call.forward(
                kept.unpack(), call.weight(weight, "out"), torch.promote_types(ctx.like[0][1], weight.dtype)
            )
        return y if bias is None else y.add_(bias.to(y.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = _IntegerProduct.gradients(ctx, grad)
        if not torch.is_grad_enabled():  # that is, without create_graph
            return grads
        name = ctx.call.state.name
        return *(None if g is None else _NoSecondDerivative.apply(g.requires_grad_(), name) for g in grads[:3]), None

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        made = _IntegerProduct.gradients_of_step(ctx, grad)
        if made is not None:
            return made
        call: LayerCall = ctx.call
        needs = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            gq = call.gradient(grad) if ctx.usable else None
        if gq is None:
            call.state.skipped += 1
            return *(_zeros(like) if need else None for like, need in zip(ctx.like, needs, strict=False)), None
        (x_shape, x_dtype, _), (w_shape, w_dtype, _), b_like = ctx.like
        kept, weight = _IntegerProduct.kept(ctx)
        gx = gw = gb = None
        with torch.autocast(grad.device.type, enabled=False):
            if needs[0]:
                gx = call.input_grad(gq, call.weight(weight, "in"), tuple(x_shape[2:]), x_dtype)
            if needs[1]:
                gw = call.weight_grad(gq, kept.unpack(), tuple(w_shape[2:]), w_dtype)
            if needs[2]:
                gb = bias_grad(gq, dtype=b_like[1]).reshape(b_like[0])
        return gx, gw, gb, None

    @staticmethod
    def gradients_of_step(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...] | None:
        """By one operation; None where there is none, or something is not finite: then no stream of noise was taken."""
        if ctx.step is None:
            return None
        call: LayerCall = ctx.call
        stream = call.state.noise.stream
        (_, x_dtype, _), (w_shape, _, _), b_like = ctx.like
        kept, weight = _IntegerProduct.kept(ctx)
        try:
            gx, gw, gb = ctx.step.backward(
                grad, w_shape, weight, kept, call.gradient_noise(), needs=ctx.needs_input_grad[:3]
            )
        except OperandError:  # which operations one by one report, or skip
            call.state.noise.stream = stream
            return None
        return None if gx is None else gx.to(x_dtype), gw, None if gb is None else gb.view(b_like[0]), None

    @staticmethod
    def kept(ctx: Any) -> tuple[Any, Tensor]:
        """The input's codes, None if the weight's gradient is not needed, and the weight."""
        codes, exponents, scale, weight = ctx.saved_tensors
        return None if ctx.packing is None else PackedShift(codes, exponents, scale, *ctx.packing), weight


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient that refuses to be differentiated, rather than being taken for a constant."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, name: str) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name}: gradients of integer products are differentiable once, and a second derivative was asked for "
            "(create_graph=True)"
        )


def _zeros(like: tuple[torch.Size, torch.dtype, torch.device]) -> Tensor:
    return torch.zeros(like[0], dtype=like[1], device=like[2])


def integer_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rule: IntegerRule | None = None,
    state: LayerState | None = None,
    training: bool = True,
    frozen: FrozenRange | None = None,
    shared: SharedWeight | None = None,
) -> Tensor:
    """Y = X W^T + b with the forward product and both gradients on integer codes.

    Forward: X in ShiftQuant along its last axis, W with a scale an output. Backward: the gradient is quantized once, by
    default stochastically; the input gradient takes W with a scale an input, the weight gradient the codes of X that
    the forward pass used, the bias gradient sums dequantized codes. Gradients go straight through all quantizers. Of X
    only the packed codes, the exponents and the scale are kept for the backward pass, and only if the weight needs a
    gradient; products that nobody needs are not computed.

    Integers are exact and the same whatever the form. Autocast has no effect inside.

    Args:
        x: floating (..., in), not empty. weight: floating (out, in). bias: (out,), added in floating point.
        rule: None for `IntegerRule()`. state: the layer's name and noise; None for a new one, so for the same draws at
            every call. training: False rounds everything to nearest. frozen: range and exponents of x to use in the
            place of its own, rounded to nearest. shared: of calls with the same weight, whose codes are then made once;
            None if there is one call.

    Returns:
        (..., out) in the wider dtype of x and weight. Differentiable once.

    Raises:
        ValueError: shapes that do not fit; x empty; weights that are not finite; activations or, in the backward pass,
            gradients that are not finite under on_nonfinite "error".
    """
    call = LayerCall.of(rule, state, None, training=training, frozen=frozen, shared=shared)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{call.state.name}: input {tuple(x.shape)} must be (..., in) and weight {tuple(weight.shape)} (out, in)"
        )
    return _apply(x, weight, bias, call)


def integer_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    geometry: Geometry | None = None,
    *,
    rule: IntegerRule | None = None,
    state: LayerState | None = None,
    training: bool = True,
    frozen: FrozenRange | None = None,
) -> Tensor:
    """Convolution with all three products on integer codes; as integer_linear, groups along axis 1.

    Args:
        x: floating (samples, in, [height,] width), not empty. weight: (out, in / groups, ...). bias: (out,).
        geometry: None for stride 1 without padding. rule, state, training, frozen: as integer_linear.

    Returns:
        (samples, out, ...) in the wider dtype of x and weight. Differentiable once.

    Raises:
        ValueError: as integer_linear.
    """
    call = LayerCall.of(rule, state, geometry or Geometry(), training=training, frozen=frozen)
    if x.dim() != weight.dim() or x.dim() not in (3, 4) or x.shape[1] != weight.shape[1] * call.conv_groups():
        raise ValueError(
            f"{call.state.name}: input {tuple(x.shape)} must be (samples, in, [height,] width) and weight "
            f"{tuple(weight.shape)} (out, in / groups, ...) with groups={call.conv_groups()}"
        )
    bias = None if bias is None else bias.reshape(-1, *[1] * (x.dim() - 2))
    return _apply(x, weight, bias, call)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, call: LayerCall) -> Tensor:
    if x.numel() == 0:
        raise ValueError(f"{call.state.name}: input {tuple(x.shape)} has no elements, so no range")
    result: Tensor = untraced(_product, x, weight, bias, call)
    return result


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, call: LayerCall) -> Tensor:
    y: Tensor = _IntegerProduct.apply(x, weight, bias, call)
    node: Any = y.grad_fn
    if recomputes() and node is not None and node.packing is not None:
        remember(y, partial(_IntegerProduct.again, node, weight, bias, _versions(weight, bias)))
    return y


def _versions(weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    return (weight._version,) if bias is None else (weight._version, bias._version)
