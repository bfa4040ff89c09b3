"""One call of a layer that trains in integers: what its operands are quantized with, and its products one by one.

Source: Guo, Liu et al., "Towards accurate and efficient sub-8-bit integer training", section 4.1 and appendix D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .convolution import Geometry, conv_forward, conv_input_grad, conv_weight_grad
from .engine_codes import Noise, noise_of
from .engine_step import EngineStep, SharedWeight
from .frozen import FrozenRange, frozen_quantize
from .linear import WeightCodes, linear_forward, linear_input_grad, linear_weight_grad
from .rounding import CounterGenerator
from .rule import IntegerRule
from .shiftquant import ShiftQuantized

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
class LayerCall:
    """One call of a layer; geometry None for linear."""

    rule: IntegerRule
    state: LayerState
    geometry: Geometry | None
    training: bool
    differentiated: bool  # gradients are recorded: there will be a backward pass
    frozen: FrozenRange | None = None
    shared: SharedWeight | None = None

    @staticmethod
    def of(
        rule: IntegerRule | None, state: LayerState | None, geometry: Geometry | None, *, training: bool, **options: Any
    ) -> LayerCall:
        """With defaults in the place of None, and gradients recorded as torch does now."""
        recorded = torch.is_grad_enabled()
        return LayerCall(rule or IntegerRule(), state or LayerState(), geometry, training, recorded, **options)

    def activation(self, x: Tensor) -> ShiftQuantized | None:
        """Its codes; None as of `usable`."""
        if self.frozen is not None:
            return self._coded(
                x,
                "the activation",
                partial(frozen_quantize, frozen=self.frozen, bits=self.rule.a, groups=self.rule.shift_groups),
            )
        quantize = partial(self.rule.quantize_activation, training=self.training, generator=self._forward_noise())
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
        return noise_of("stochastic", self._forward_noise())

    def _forward_noise(self) -> CounterGenerator | None:
        """A stream by torch's default generator: checkpointing restores that, so that a second run draws the same."""
        if self.rule.act_rounding == "nearest" or not self.training:
            return None
        return CounterGenerator(self.state.noise.seed, FORWARD_STREAMS + int(torch.randint(FORWARD_STREAMS - 1, ())))

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
