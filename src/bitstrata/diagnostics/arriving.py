"""The gradients that arrive at layers with a product, before these quantize them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..fused import FusedNetwork
from ..nn.integer_layers import IntegerLayerOfSeveral
from .kept import kept
from .landscape import Loss

AXES: dict[type[nn.Module], int] = {nn.Linear: -1, nn.Conv1d: -2, nn.Conv2d: -3}  # of a layer's output: its channels

#: Name -> (axis of the channels, gradients of the output, one for each run that a gradient reached), in forward order.
Arriving = dict[str, tuple[int, list[Tensor]]]


def arriving_gradients(model: nn.Module, loss: Loss, batch: Any, *, training: bool | None, where: str) -> Arriving:
    """One forward and backward pass; the model is left as it was. `gradient_variance` says which layers are seen.

    Args:
        loss, batch, training: as for `gradient_variance`. where: names the caller in errors.

    Raises:
        ValueError: a fused network; no parameter needs a gradient; no layer got one; a gradient is not finite.
    """
    if any(isinstance(module, FusedNetwork) for module in model.modules()):
        raise ValueError(
            f"{where}: the layers of a fused network do not run one by one; give the network it was made of, "
            "its attribute `model`"
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{where}: no parameter of {type(model).__name__} needs a gradient")
    with kept(model, training=training), torch.enable_grad(), _watching(model) as seen:
        torch.autograd.grad(loss(model, batch), parameters, allow_unused=True)
    for name, (_, gradients) in reversed(seen.items()):  # the one nearest to the loss is the cause
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise ValueError(f"{where}: the gradient at layer {name!r} contains NaN or infinity")
    if not any(gradients for _, gradients in seen.values()):
        raise ValueError(
            f"{where}: no gradient reached a layer of {type(model).__name__} "
            f"(Linear, Conv1d, Conv2d, or a product of an integer layer); {len(seen)} are there"
        )
    return seen


@contextmanager
def _watching(model: nn.Module) -> Iterator[Arriving]:
    """What is filled as a backward pass runs."""
    seen: Arriving = {}
    handles, wrapped, watched = [], [], {}

    def watch(name: str, axis: int, output: Any) -> None:
        entry = seen.setdefault(name, (axis, []))
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: entry[1].append(gradient.detach().clone()))

    def after(name: str, axis: int) -> Callable[..., None]:
        return lambda module, args, output: watch(name, axis, output)

    def product_of(layer: IntegerLayerOfSeveral, owner: str) -> Callable[..., Tensor]:
        plain = layer._product

        def product(name: str, *operands: Any) -> Tensor:
            output = plain(name, *operands)
            watch(f"{owner}.{name}" if owner else name, -1, output)
            return output

        return product

    modules = dict(model.named_modules())
    inside = {id(child) for m in modules.values() if isinstance(m, nn.MultiheadAttention) for child in m.children()}
    try:
        for name, module in modules.items():
            if isinstance(module, IntegerLayerOfSeveral):
                module.__dict__["_product"] = product_of(module, name)
                wrapped.append(module)
            axis = next((axis for kind, axis in AXES.items() if isinstance(module, kind)), None)
            if axis is not None and id(module) not in inside:
                handles.append(module.register_forward_hook(after(name, axis)))
                watched[name] = axis
        yield seen
        for name, axis in watched.items():  # those that did not run, behind those that did
            seen.setdefault(name, (axis, []))
    finally:
        for handle in handles:
            handle.remove()
        for module in wrapped:
            del module.__dict__["_product"]
