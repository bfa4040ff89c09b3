"""Between a step's gradients and the optimizer: nothing that is not finite gets past, and what it was is said."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitstrata.prepare import load_noise_state_, noise_state
from bitstrata.train.config import Level, TrainConfig
from bitstrata.train.divergence import StepSizes, first_bad_gradient, first_bad_parameter, gradient_norm, trace


class Guard:
    """Checks the losses and gradients of each step of a network, and finds the layer when one is not finite.

    A healthy step costs one norm over the gradients and a copy of torch's random state (with on_nonfinite="skip" also
    one of the buffers); the search runs the failing batch once more.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        self.noisy = bool(noise_state(model))
        self.steps = StepSizes(model)
        self._random: tuple[Tensor, Tensor | None, dict[str, Any]] | None = None
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def before(self) -> None:
        """Take note of what the forward pass changes, so that the step can be repeated or undone."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        self._random = torch.get_rng_state(), cuda, noise_state(self.model) if self.noisy else {}
        if self.config.on_nonfinite == "skip":
            self._buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]

    def problem(self, losses: Mapping[Level, float]) -> str:
        """What is not finite among the losses and gradients of a step, in words, or ""; clips if asked to."""
        for level, loss in losses.items():
            if not math.isfinite(loss):
                return f"the loss at precision {level} is {loss}"
        if self.config.clip_grad is None:
            norm = gradient_norm(self.model.parameters())
        else:
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad))
        return "" if math.isfinite(norm) else f"the norm of the gradients is {norm}"

    def origin(self, inputs: Tensor, run: Callable[[], object]) -> str:
        """The first tensor of the step that is not finite, in words, by repeating it; "" if all are finite.

        inputs: the batch. run: the objective on it; it has to draw the same random numbers each time.
        """
        if not bool(torch.isfinite(inputs).all()):
            return "the batch itself holds values that are not finite"
        from_gradients = first_bad_gradient(self.model)
        self._repeat_random()
        self.model.zero_grad(set_to_none=True)
        found = trace(self.model, run)
        return from_gradients if found is None else str(found)

    def undo(self) -> None:
        """Leave the step out: buffers as before it, no gradients."""
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)

    def check_steps(self, step: int) -> None:
        """Raise FloatingPointError if a step size is not finite or has exploded; warn where it is not positive."""
        problem = self.steps.problem()
        if problem:
            raise FloatingPointError(f"Trainer: after step {step}, {problem}; {self.advice}")

    def check_weights(self, step: int) -> None:
        """Raise FloatingPointError if a parameter is not finite: a quantized layer can hide an infinite weight."""
        problem = first_bad_parameter(self.model)
        if problem:
            raise FloatingPointError(f"Trainer: after step {step}, {problem}; {self.advice}")

    @property
    def advice(self) -> str:
        """What to do about it."""
        return f"lower lr={self.config.lr} or set clip_grad"

    def _repeat_random(self) -> None:
        assert self._random is not None
        host, cuda, noise = self._random
        torch.set_rng_state(host)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self.device)
        if self.noisy:
            load_noise_state_(self.model, noise)
