"""Top-1 accuracy of a network, float or at each of its precisions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from bitstrata.prepare import precision, precisions
from bitstrata.prepare.wrapped import undistributed
from bitstrata.train.config import Level


def autocast(amp: str, device: torch.device) -> AbstractContextManager[object]:
    """Context for forward passes: bf16 autocast for "bf16", nothing for "none"."""
    return torch.autocast(device.type, torch.bfloat16) if amp == "bf16" else nullcontext()


def at_level(model: nn.Module, level: Level) -> AbstractContextManager[object]:
    """Context in which the network runs at `level`."""
    return precision(model, level) if isinstance(level, int) else nullcontext()


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    levels: Sequence[int] | None = None,
    *,
    amp: str = "none",
    channels_last: bool = False,
) -> dict[Level, float]:
    """Top-1 accuracy as a fraction, keyed by precision, or {"float": ...} for a float network.

    batches: (normalized float images (N, C, H, W), int64 labels (N,)); read once, whatever the number of
    precisions. levels: some of the network's precisions, default all. Training mode and precision are put back.
    Raises ValueError when `batches` is empty.
    """
    return accuracies(*count_correct(model, batches, levels, amp=amp, channels_last=channels_last))


def accuracies(correct: Mapping[Level, float], seen: float) -> dict[Level, float]:
    """Shares of `seen` images. Raises ValueError for none."""
    if not seen:
        raise ValueError("evaluate: no batches, so there is no accuracy")
    return {level: count / seen for level, count in correct.items()}


def count_correct(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    levels: Sequence[int] | None = None,
    *,
    amp: str = "none",
    channels_last: bool = False,
) -> tuple[dict[Level, int], int]:
    """Numbers of right answers, keyed as those of `evaluate`, and of images."""
    model = undistributed(model)
    keys: tuple[Level, ...] = tuple(levels) if levels is not None else (precisions(model) or ("float",))
    device = next(model.parameters()).device
    correct = dict.fromkeys(keys, 0)
    seen = 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(amp, device):
            for images, labels in batches:
                inputs = place(images, device, channels_last)
                targets = labels.to(device)
                for key in keys:
                    with at_level(model, key):
                        correct[key] += int((model(inputs).argmax(1) == targets).sum())
                seen += len(targets)
    finally:
        model.train(was_training)
    return correct, seen


def place(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Images on `device`, in NHWC memory order if asked for."""
    if channels_last:
        return images.to(device, memory_format=torch.channels_last)
    return images.to(device)
