"""Linear and convolution whose three products of a training step are computed on integers, with gradients.

Source: Guo, Liu et al., "Towards accurate and efficient sub-8-bit integer training", section 4.1 and appendix D.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .convolution import Geometry, conv_forward, conv_input_grad, conv_weight_grad
from .engine_codes import Noise, noise_of
from .engine_step import EngineStep, OperandError, SharedWeight
from .frozen import FrozenRange, frozen_quantize
from .linear import WeightCodes, bias_grad, linear_forward, linear_input_grad, linear_weight_grad
from .rounding import CounterGenerator
from .rule import IntegerRule
from .shiftquant import PackedShift, ShiftQuantized
from .untraced import untraced

FORWARD_STREAMS = 1 << 63  # streams from here on belong to activations, those below to gradients


@dataclass
class LayerState:
    """What a layer carries from step to step.

    Attributes:
        name: how errors call the layer.
        noise: each gradient that is rounded takes its next stream, so draws depend on the seed, on the layer's own
            streams and on how many backward passes it has seen; not on threads, other layers, or on whether its
            forward pass was run twice (checkpointing).
        skipped: backward passes whose gradients were set to 0.
    """

    name: str = "integer layer"
    noise: CounterGenerator = field(default_factory=lambda: CounterGenerator(0))
    skipped: int = 0


@dataclass(frozen=True)
class _Call:
    """One call of a layer; geometry None for linear."""

    rule: IntegerRule
    state: LayerState
    geometry: Geometry | None
    training: bool
    differentiated: bool  # gradients are recorded: there will be a backward pass
    frozen: FrozenRange | None = None
    shared: SharedWeight | None = None

    def activation(self, x: Tensor) -> ShiftQuantized | None:
        """Its codes; None as of `usable`."""
        if self.frozen is not None:
            return self._coded(
                x,
                "the activation",
                partial(frozen_quantize, frozen=self.frozen, bits=self.rule.a, groups=self.rule.shift_groups),
            )
        quantize = partial(self.rule.quantize_activation, training=self.training, generator=_forward_noise(self))
        return self._coded(x, "the activation", quantize)

    def gradient(self, grad: Tensor) -> ShiftQuantized | None:
        """Its codes; None as of `usable`. Then no stream of random bits was taken."""
        noise = self.state.noise
        stream = noise.stream
        quantize = partial(self.rule.quantize_gradient, training=self.training, generator=noise)
        codes = None
        try:
            codes = self._coded(grad, "the gradient", quantize)
        finally:
            if codes is None:
                noise.stream = stream
        return codes

    def _coded(self, x: Tensor, what: str, quantize: Callable[..., ShiftQuantized]) -> ShiftQuantized | None:
        try:  # that x is finite shows as its range is found: looking first would read it once more
            return quantize(x, axis=self.axis(x))
        except ValueError as error:
            problem = error
        if self.usable(x, what):
            raise problem
        return None

    def step(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> EngineStep | None:
        """All of it as one operation each way, if there is such."""
        if self.frozen is not None:
            return None
        return EngineStep.of(self.rule, self.geometry, self.result_shape(x, weight), (x, weight, bias), self.shared)

    def activation_noise(self) -> Noise:
        """For the activation's codes: a stream, or None to round to nearest."""
        return noise_of("stochastic", _forward_noise(self))

    def gradient_noise(self) -> Noise:
        """For the gradient's codes: the next stream, or None to round to nearest."""
        return noise_of(self.rule.grad_rounding if self.training else "nearest", self.state.noise)

    def axis(self, x: Tensor) -> int:
        return x.dim() - 1 if self.geometry is None else 1

    def conv_groups(self) -> int:
        return 1 if self.geometry is None else self.geometry.groups

    def usable(self, x: Tensor, what: str) -> bool:
        """Whether x is finite in float32; ValueError if it is not and the rule says so."""
        values = x.detach()
        if bool(values.sum(dtype=torch.float32).isfinite()):  # NaN and infinity stay in a sum
            return True
        finite = values.to(torch.float32).isfinite()
        if bool(finite.all()):
            return True
        if self.rule.on_nonfinite == "error":
            bad = x.numel() - int(finite.sum())
            raise ValueError(
                f"{self.state.name}: {bad} of {x.numel()} elements of {what} {tuple(x.shape)} are not finite (NaN or "
                "infinite in float32)"
            )
        return False

    def weight(self, weight: Tensor, side: str) -> WeightCodes:
        try:
            return self.rule.quantize_weight(weight, side, self.conv_groups())
        except ValueError as error:
            raise ValueError(f"{self.state.name}: weight {tuple(weight.shape)}: {error}") from error

    def result_shape(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        if self.geometry is None:
            return (*x.shape[:-1], weight.shape[0])
        return (x.shape[0], weight.shape[0], *self.geometry.output(tuple(x.shape[2:]), tuple(weight.shape[2:])))

    def forward(self, x: ShiftQuantized, w: WeightCodes, dtype: torch.dtype) -> Tensor:
        if self.geometry is None:
            return linear_forward(x, w, form=self.rule.form, dtype=dtype)
        return conv_forward(x, w, self.geometry, form=self.rule.form, dtype=dtype)

    def input_grad(self, g: ShiftQuantized, w: WeightCodes, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.geometry is None:
            return linear_input_grad(g, w, form=self.rule.form, dtype=dtype)
        return conv_input_grad(g, w, size, self.geometry, form=self.rule.form, dtype=dtype)

    def weight_grad(self, g: ShiftQuantized, x: ShiftQuantized, kernel: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.geometry is None:
            return linear_weight_grad(g, x, form=self.rule.form, dtype=dtype)
        return conv_weight_grad(g, x, kernel, self.geometry, form=self.rule.form, dtype=dtype)


class _IntegerProduct(torch.autograd.Function):
    """Y = X W^T + b on codes; keeps X's packed codes, exponents and scale, and a reference to W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
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
        return y

    @staticmethod
    def result(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *, keep: bool
    ) -> tuple[Tensor, PackedShift | None]:
        """The result by operations one by one, and the codes to keep."""
        call: _Call = ctx.call
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
        call: _Call = ctx.call
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
        call: _Call = ctx.call
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


def _forward_noise(call: _Call) -> CounterGenerator | None:
    """A stream that torch's default generator picks: checkpointing restores that, so a second run draws the same."""
    if call.rule.act_rounding == "nearest" or not call.training:
        return None
    return CounterGenerator(call.state.noise.seed, FORWARD_STREAMS + int(torch.randint(FORWARD_STREAMS - 1, ())))


def _call(
    rule: IntegerRule | None, state: LayerState | None, geometry: Geometry | None, *, training: bool, **options: Any
) -> _Call:
    recorded = torch.is_grad_enabled()
    return _Call(rule or IntegerRule(), state or LayerState(), geometry, training, recorded, **options)


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
    call = _call(rule, state, None, training=training, frozen=frozen, shared=shared)
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
    call = _call(rule, state, geometry or Geometry(), training=training, frozen=frozen)
    if x.dim() != weight.dim() or x.dim() not in (3, 4) or x.shape[1] != weight.shape[1] * call.conv_groups():
        raise ValueError(
            f"{call.state.name}: input {tuple(x.shape)} must be (samples, in, [height,] width) and weight "
            f"{tuple(weight.shape)} (out, in / groups, ...) with groups={call.conv_groups()}"
        )
    bias = None if bias is None else bias.reshape(-1, *[1] * (x.dim() - 2))
    return _apply(x, weight, bias, call)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
    if x.numel() == 0:
        raise ValueError(f"{call.state.name}: input {tuple(x.shape)} has no elements, so no range")
    result: Tensor = untraced(_IntegerProduct.apply, x, weight, bias, call)
    return result
