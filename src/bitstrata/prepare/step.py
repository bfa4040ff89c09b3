"""Quantized weights computed once for all forward and backward passes of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..nn.layers import QuantizedLayer
from ..nn.reuse import StepWeights

# Wrappers that watch the gradients of each backward pass, or take parameters away between uses; by name, because
# importing them takes long.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule", "FusedNetwork"}


@contextmanager
def step_weights(model: nn.Module) -> Iterator[None]:
    """Quantize each weight once in the `with` block, however often it is used: one block, one optimizer step.

        with bs.step_weights(model):
            for x, y in parts_of_a_batch:
                (F.cross_entropy(model(x), y) / count).backward()
        optimizer.step()

    It saves time where a layer runs several times: parts of a batch whose gradients are accumulated, a layer applied
    again and again (recurrence, modules in several places), layers that are run again in the backward pass
    (`torch.utils.checkpoint`). Gradients of weights and of their quantizers reach `.grad` when the block ends; they are
    those of quantizing at each use, with sums in another order. Forward and backward passes lie inside, changes of
    parameters outside. After an exception gradients of weights are incomplete. A block inside a block is part of it.
    `joint_backward` does this for itself where precisions share something and for layers that stand in several places
    of a model; within a block it keeps all quantized weights for its next call.

    Second derivatives by way of weights are not to be had inside, nor `torch.autograd.grad` with respect to them.

    Args:
        model: any; layers that are not quantized have no part in it.

    Raises:
        ValueError: a model wrapped for training on several machines, compiled or fused; these have their own ways.
        RuntimeError: parameters written to inside the block, or a backward pass that comes after it.
    """
    wrapped = wrapper(model)
    if wrapped is not None:
        raise ValueError(f"step_weights: not for a model in {wrapped}, which handles each backward pass by itself")
    with weights_of_a_step(model, keep=True):
        yield


def wrapper(model: nn.Module) -> str | None:
    """What the model or a part of it is wrapped in that does not go with shared weights; None if nothing."""
    names = (base.__name__ for module in model.modules() for base in type(module).__mro__)
    return next((name for name in names if name in _WRAPPERS), None)


@contextmanager
def weights_of_a_step(model: nn.Module, *, keep: bool = False) -> Iterator[StepWeights]:
    """The store that the layers use in the block, the present one if there is one; settled and closed by who opens it.

    keep: what is computed stays until the block ends (`StepWeights.keep`), for all layers. Else only for layers whose
    precisions share something, or that stand in several places of the model: for the others it would be in vain. A
    wrapped model gets a store that no layer uses.
    """
    layers = [] if wrapper(model) is not None else _layers_and_places(model)
    present = next((layer.step_weights for layer, _ in layers if layer.step_weights is not None), None)
    if present is not None:
        yield present
        return
    chosen = [layer for layer, places in layers if keep or places > 1 or layer.shares_weights]
    store = StepWeights(keep=keep)
    for layer in chosen:
        layer.step_weights = store
    try:
        yield store
        store.settle(last=True)
    finally:
        for layer in chosen:
            layer.step_weights = None
        store.close()


def _layers_and_places(model: nn.Module) -> list[tuple[QuantizedLayer, int]]:
    """Quantized layers, and how many names each of them has."""
    places: dict[QuantizedLayer, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer):
            places[module] = places.get(module, 0) + 1
    return list(places.items())
