"""A model put back as it was after passes that change it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..prepare.integer_training import load_noise_state_, noise_state
from ..quantizers.base import ActivationQuantizer


@contextmanager
def kept(model: nn.Module, *, training: bool | None) -> Iterator[None]:
    """Inside, the model is in training mode, in evaluation mode, or (None) in the modes its modules have.

    Afterwards, also behind an error: parameters, buffers and the mode of each module are what they were, to the bit and
    as the same tensors; torch's default generators and the streams of the model's stochastic rounding stand where they
    stood.
    """
    parameters = [(p, p.detach().clone()) for p in model.parameters()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    modes = [(module, module.training) for module in model.modules()]
    known = [(m, m.known_steps) for m in model.modules() if isinstance(m, ActivationQuantizer)]
    noise = noise_state(model)
    devices = sorted({p.device.index or 0 for p, _ in parameters if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            if training is not None:
                model.train(training)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for parameter, value in parameters:
                _put_back(parameter, value)
            for module, name, buffer, content in buffers:
                module._buffers[name] = buffer
                if buffer is not None and content is not None:
                    _put_back(buffer, content)
        for quantizer, steps in known:
            quantizer.known_steps = steps
        load_noise_state_(model, noise)


def _put_back(tensor: Tensor, value: Tensor) -> None:
    """In place, and only where something changed, so that version counters of untouched tensors stay."""
    if not torch.equal(tensor, value):  # NaN differs from itself, and is copied
        tensor.copy_(value)
