"""Calibration: step sizes of activations, and statistics of batch normalizations, from data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.ranks import require_equal
from ..nn.integer_layers import IntegerLayer
from ..nn.norm import PrecisionBatchNorm
from ..quantizers.base import ActivationQuantizer, Quantizer
from .finite import not_finite
from .precision import precision, precisions, quantized_layers
from .synchronize import is_synchronized
from .wrapped import refuse_sharded, unwrapped


def calibrate_(model: nn.Module, batches: Iterable[Any], precisions: Iterable[int] | None = None) -> nn.Module:
    """Set the activation step sizes from data, in place (UniQ section 4.2).

    Every batch runs at every precision, widest first, in training mode without gradients: batch-normalization
    statistics move, each layer sees inputs that are already quantized upstream, and each step comes from the largest
    statistic so far. After `synchronize_`, ranks of a distributed run give their shares of the same batches, and find
    the steps of one rank with the joined ones; without it each goes by its own.

    Args:
        batches: inputs as the model takes them, or (input, ...) tuples as loaders yield them; kept in memory once.
        precisions: which to calibrate; all by default.

    Raises:
        TypeError: one tensor in the place of several batches.
        ValueError: no batches, an empty one, a float model, or inputs or activations that are not finite; numbers of
            batches that differ between synchronized ranks.

    Warns:
        UserWarning: a layer's inputs were zero in every batch, so that its step is not set.
    """
    refuse_sharded("calibrate_", model)
    wrapper, model = model, unwrapped(model)
    data = inputs_of("calibrate_", batches)
    chosen = _checked(model, "calibrate_", data, precisions)
    _same_on_ranks(model, "calibrate_", data)
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.statistic.zero_()
    with _training(model), torch.no_grad(), _watched(model, "calibrate_") as met:
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
    _warn_of_unset_steps(model, met)
    return wrapper


def reestimate_batchnorm_(
    model: nn.Module, batches: Iterable[Any], precisions: Iterable[int] | None = None
) -> nn.Module:
    """Replace the running statistics of the batch normalizations by the plain average over `batches`, in place.

    Args:
        batches: inputs, or (input, ...) tuples.
        precisions: which to re-estimate; all by default.

    Raises:
        TypeError, ValueError: as for `calibrate_`.
    """
    wrapper, model = model, unwrapped(model)
    data = inputs_of("reestimate_batchnorm_", batches)
    chosen = _checked(model, "reestimate_batchnorm_", data, precisions)
    _same_on_ranks(model, "reestimate_batchnorm_", data)
    for p in chosen:
        with precision(model, p):
            average_statistics_(model, data)
    return wrapper


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
    if not known and any(isinstance(m, IntegerLayer) for m in model.modules()):
        raise ValueError(
            f"{what}: the model trains in integers, whose ranges follow each batch, so there is nothing to set before "
            "training; freeze_ fixes them after it"
        )
    if not known:
        raise ValueError(f"{what}: the model has no quantized layers; call quantize_ first")
    if not data:
        raise ValueError(f"{what}: no batches given")
    picked = known if chosen is None else tuple(chosen)
    for p in picked:
        if p not in known:
            raise ValueError(f"{what}: {p!r} is not among the model's precisions {known}")
    return picked


def _same_on_ranks(model: nn.Module, what: str, data: list[Tensor]) -> None:
    if is_synchronized(model):
        require_equal(f"{what}: the number of batches", len(data), next(model.parameters()).device)


def inputs_of(what: str, batches: Iterable[Any]) -> list[Tensor]:
    if isinstance(batches, Tensor):
        raise TypeError(
            f"{what}: batches must be an iterable of batches, got one tensor of shape {tuple(batches.shape)}; give [x]"
        )
    data = [input_of(batch) for batch in batches]
    for index, x in enumerate(data):
        if isinstance(x, Tensor):
            if x.numel() == 0:
                raise ValueError(f"{what}: batch {index} has no elements, shape {tuple(x.shape)}")
            problem = not_finite({f"batch {index}": x})
            if problem:
                raise ValueError(f"{what}: {problem}, shape {tuple(x.shape)}")
    return data


@contextmanager
def _watched(model: nn.Module, what: str) -> Iterator[dict[tuple[str, int], None]]:
    """Collects (layer, precision) of the input quantizers that run; a ValueError of theirs gets the layer's name."""
    met: dict[tuple[str, int], None] = {}  # an ordered set
    inside: list[str] = []

    def enter(name: str) -> Any:
        def hook(quantizer: Quantizer, _args: Any) -> None:
            inside.append(name)
            met[name, quantizer.precision] = None

        return hook

    def leave(*_: Any) -> None:
        inside.clear()

    handles = []
    for name, layer in quantized_layers(model).items():
        if layer.act_quant is not None:
            handles.append(layer.act_quant.register_forward_pre_hook(enter(name)))
            handles.append(layer.act_quant.register_forward_hook(leave))
    try:
        yield met
    except ValueError as error:
        if inside:
            raise ValueError(f"{what}: input of layer {inside[-1]!r}: {error}") from error
        raise
    finally:
        for handle in handles:
            handle.remove()


def _warn_of_unset_steps(model: nn.Module, met: Iterable[tuple[str, int]]) -> None:
    layers, unset = quantized_layers(model), []
    for name, p in met:
        with precision(model, {name: p}):
            quantizer = layers[name].act_quant
            if isinstance(quantizer, ActivationQuantizer) and not quantizer.is_initialized():
                unset.append(f"{name!r} at precision {p}")
    if unset:
        warnings.warn(
            f"calibrate_: no step is set for the input of {', '.join(unset)}: it was zero in every batch. The model "
            "runs as long as it stays zero, and cannot be lowered before a batch with other values was seen",
            stacklevel=3,
        )


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
