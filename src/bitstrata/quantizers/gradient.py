"""Quantizers of a layer's output gradient: the backward pass of a quantized layer on integer codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..integer.layer_call import LayerState
from ..integer.rounding import CounterGenerator
from ..integer.rule import IntegerRule
from ..integer.shiftquant import ShiftQuantized
from .registry import register


class GradientQuantizer(nn.Module, ABC):
    """What a quantized layer asks for the codes of its output gradient, once a backward pass.

    It has no parameters and adds nothing to the state_dict. `noise_state` holds where its random numbers stand.

    Attributes:
        state: the layer's name, the generator of the rounding, and how many backward passes were skipped.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.state = LayerState("quantized layer", CounterGenerator(seed))

    def start_(self, name: str, noise: CounterGenerator) -> None:
        """Told once, by `quantize_`: the layer's name for errors, and streams that no other layer draws from."""
        self.state = LayerState(name, noise)

    def usable(self, grad: Tensor) -> bool:
        """Whether the gradient is finite in float32.

        Raises:
            ValueError: it is not, unless the quantizer is to skip such backward passes.
        """
        finite = grad.detach().to(torch.float32).isfinite()
        if bool(finite.all()):
            return True
        if not self.skips:
            bad = grad.numel() - int(finite.sum())
            raise ValueError(
                f"{self.state.name}: {bad} of {grad.numel()} elements of the gradient {tuple(grad.shape)} are not "
                "finite (NaN or infinite in float32)"
            )
        self.state.skipped += 1
        return False

    @property
    @abstractmethod
    def skips(self) -> bool:
        """Whether a gradient that is not finite gives gradients of 0 instead of an error."""

    @abstractmethod
    def quantize(self, grad: Tensor, axis: int, *, training: bool) -> ShiftQuantized:
        """Codes of a finite gradient with channels along `axis`; takes a stream of `state.noise` if it is random."""


@register("shiftquant", "gradient", "ShiftQuant: power-of-two steps for groups of channels, stochastic rounding")
class ShiftQuantGradient(GradientQuantizer):
    """Gradient codes in -B..B, B = 2^(g-1) - 1, with the step tau_0 / B 2^-e of their channel's group e.

    tau_0 is the largest magnitude of the gradient at hand. Rounding up and down is drawn an element so that the mean
    over draws is the gradient. Source: Guo, Liu et al., section 4.1.

    Args:
        edge: the layer is the network's first or last; set by `quantize_`.
        g: width of the codes, 2..8.
        groups: N_G, 1..8; 1 is one step a tensor.
        edge_bits: width in first and last layer, 2..8; None for g.
        rounding: "stochastic", or "nearest", which is biased. Evaluation mode rounds to nearest.
        grid: "uniform", or "powers": 0 and powers of two, one scale a tensor, g up to 4 (`integer.power_quantize`);
            first and last layer have the uniform one if edge_bits is given.
        on_nonfinite: NaN or infinity in a gradient is an "error", or the layer's gradients are 0: "skip".
        seed: of the random numbers, 0..2^64 - 1. Every layer has streams of its own.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        *,
        edge: bool = False,
        g: int = 4,
        groups: int = 4,
        edge_bits: int | None = 8,
        rounding: str = "stochastic",
        grid: str = "uniform",
        on_nonfinite: str = "error",
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        inner = IntegerRule(g=g, groups=groups, grad_rounding=rounding, grad_grid=grid, on_nonfinite=on_nonfinite)
        self.rule = replace(inner, g=edge_bits, grad_grid="uniform") if edge and edge_bits is not None else inner

    @property
    def skips(self) -> bool:
        return self.rule.on_nonfinite == "skip"

    def quantize(self, grad: Tensor, axis: int, *, training: bool) -> ShiftQuantized:
        return self.rule.quantize_gradient(grad, axis, training=training, generator=self.state.noise)

    def extra_repr(self) -> str:
        grid = "" if self.rule.grad_grid == "uniform" else f", {self.rule.grad_grid}"
        return f"g={self.rule.g}, groups={self.rule.groups}, {self.rule.grad_rounding}{grid}"
