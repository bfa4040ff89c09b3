"""Calibration: step sizes of activations, and statistics of batch normalizations, from data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.norm import PrecisionBatchNorm
from ..quantizers.base import ActivationQuantizer
from .precision import precision, precisions


def calibrate_(model: nn.Module, batches: Iterable[Any], precisions: Iterable[int] | None = None) -> nn.Module:
    """Set the activation step sizes from data, in place (UniQ section 4.2).

    Every batch runs at every precision, widest first, in training mode without gradients: batch-normalization
    statistics move, each layer sees inputs that are already quantized upstream, and each step comes from the largest
    statistic so far.

    Args:
        batches: inputs as the model takes them, or (input, ...) tuples as loaders yield them; kept in memory once.
        precisions: which to calibrate; all by default.

    Raises:
        ValueError: no batches, a float model, or activations that are not finite.
    """
    data = [input_of(batch) for batch in batches]
    chosen = _checked(model, "calibrate_", data, precisions)
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.statistic.zero_()
    with _training(model), torch.no_grad():
        for quantizer in quantizers:
            quantizer.observing = True
        try:
            for p in sorted(chosen, reverse=True):
                with precision(model, p):
                    for x in data:
                        model(x)
        finally:
            for quantizer in quantizers:
                quantizer.observing = False
    return model


def reestimate_batchnorm_(
    model: nn.Module, batches: Iterable[Any], precisions: Iterable[int] | None = None
) -> nn.Module:
    """Replace the running statistics of the batch normalizations by the plain average over `batches`, in place.

    Args:
        batches: inputs, or (input, ...) tuples.
        precisions: which to re-estimate; all by default.
    """
    data = [input_of(batch) for batch in batches]
    chosen = _checked(model, "reestimate_batchnorm_", data, precisions)
    for p in chosen:
        with precision(model, p):
            average_statistics_(model, data)
    return model


def average_statistics_(model: nn.Module, data: list[Tensor]) -> None:
    levels = [m.level for m in model.modules() if isinstance(m, PrecisionBatchNorm)]
    momenta = [level.momentum for level in levels]
    for level in levels:
        level.reset_running_stats()
        level.momentum = None  # torch's cumulative average
    try:
        with _training(model), torch.no_grad():
            for x in data:
                model(x)
    finally:
        for level, momentum in zip(levels, momenta, strict=True):
            level.momentum = momentum


def input_of(batch: Any) -> Tensor:
    return batch[0] if isinstance(batch, tuple | list) else batch


def _checked(model: nn.Module, what: str, data: list[Tensor], chosen: Iterable[int] | None) -> tuple[int, ...]:
    known = precisions(model)
    if not known:
        raise ValueError(f"{what}: the model has no quantized layers; call quantize_ first")
    if not data:
        raise ValueError(f"{what}: no batches given")
    picked = known if chosen is None else tuple(chosen)
    for p in picked:
        if p not in known:
            raise ValueError(f"{what}: {p!r} is not among the model's precisions {known}")
    return picked


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
