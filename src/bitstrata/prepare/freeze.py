"""freeze_: fix from data the ranges and exponents that layers trained in integers evaluate with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..integer.frozen import FrozenRange
from ..integer.groups import channel_ranges
from ..nn.integer_layers import FreezableLayer
from ..nn.l1_norm import QuantizedL1BatchNorm
from .calibrate import inputs_of
from .finite import not_finite
from .observe import evaluating
from .wrapped import refuse_sharded, unwrapped

REDUCTIONS = ("mean", "max")


def freezable_layers(model: nn.Module) -> dict[str, FreezableLayer]:
    """Qualified name -> layer trained in integers whose input range can be frozen, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FreezableLayer)}


@dataclass
class _Seen:
    """Ranges of a layer's input: the largest magnitudes of the batch at hand, and over all batches."""

    order: int
    batch: Tensor
    total: Tensor
    negative: bool
    batches: list[int] = field(default_factory=list)


def freeze_(model: nn.Module, batches: Iterable[Any], *, reduce: str = "mean") -> nn.Module:
    """Fix the dynamic ranges of a network trained in integers, for evaluation and `lower`, in place.

    The batches run in evaluation mode, every range being that of its batch. From the ranges r_c that a layer's input
    channels show it gets tau_0 = max r_c and the exponents e_c of its groups; the layer that runs first reads the
    network's input, which has one step for all channels: e_c = 0. From then on evaluation uses them, so that a sample's
    result does not depend on the batch it is in; fully quantized normalizations become affine maps
    (`QuantizedL1BatchNorm`). Training mode is as before, and evaluation after it uses the frozen ranges again, until
    `freeze_` is called anew. Frozen ranges are in the state_dict. Attention and recurrent layers keep following the
    batch.

    Args:
        model: with layers of `integer_`.
        batches: inputs as the model takes them, or (input, ...) tuples as loaders yield them; kept in memory once.
        reduce: ranges over batches: their "mean", as wide as what training has seen a batch, or their "max".

    Returns:
        The same model.

    Raises:
        TypeError: one tensor in the place of several batches.
        ValueError: no batches, an empty one, one that is not finite, or an input of a layer that is not; unknown
            `reduce`; a model without linear layers or convolutions that train in integers, or one of them that does not
            run. The model is unchanged.
    """
    refuse_sharded("freeze_", model)
    wrapper, model = model, unwrapped(model)
    layers = freezable_layers(model)
    if not layers:
        raise ValueError(
            "freeze_: the model has no Linear or convolution that trains in integers; call integer_ or quantize_ "
            "first, with a recipe such as recipes.shiftquant()"
        )
    if reduce not in REDUCTIONS:
        raise ValueError(f"freeze_: reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    data = inputs_of("freeze_", batches)
    if not data:
        raise ValueError("freeze_: no batches given")
    norms = [module for module in model.modules() if isinstance(module, QuantizedL1BatchNorm)]
    before = [(layer, layer.frozen) for layer in layers.values()], [(norm, norm.is_frozen) for norm in norms]
    try:
        for layer in layers.values():
            layer.thaw_()
        for norm in norms:
            norm.freeze_()
        seen = _ranges(model, layers, data, reduce)
        idle = [name for name in layers if name not in seen]
        if idle:
            raise ValueError(f"freeze_: layer {idle[0]!r} did not run on the batches, so its input has no range")
    except BaseException:
        _restore(*before)
        raise
    first = min(seen, key=lambda name: seen[name].order)
    for name, layer in layers.items():
        found, rule = seen[name], layer.rule
        ranges = found.total / len(found.batches) if reduce == "mean" else found.total
        groups = 1 if name == first else rule.shift_groups
        layer.freeze_(
            FrozenRange.of(ranges * rule.clip_ratio, groups, signed=found.negative or not rule.unsigned_nonneg)
        )
    return wrapper


def _ranges(model: nn.Module, layers: dict[str, FreezableLayer], data: list[Tensor], reduce: str) -> dict[str, _Seen]:
    """Layer -> what its inputs showed: sum over batches of their ranges, or the largest."""
    seen: dict[str, _Seen] = {}
    with torch.no_grad(), evaluating(model):
        for index, x in enumerate(data):
            with _watching(layers, seen, index):
                model(x)
            for found in seen.values():
                if found.batches and found.batches[-1] == index:
                    found.total = found.total + found.batch if reduce == "mean" else found.total.maximum(found.batch)
    return seen


@contextmanager
def _watching(layers: dict[str, FreezableLayer], seen: dict[str, _Seen], index: int) -> Iterator[None]:
    def enter(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else kwargs["input"]).detach()
            if x.numel() == 0:
                return
            problem = not_finite({"it": x})
            if problem:
                raise ValueError(f"freeze_: the input of layer {name!r} in batch {index}: {problem}")
            channels = x.dim() - 1 if isinstance(layer, nn.Linear) else x.dim() - layer.weight.dim() + 1  # type: ignore[operator]
            ranges = channel_ranges(x.to(torch.promote_types(x.dtype, torch.float32)), channels)
            found = seen.setdefault(name, _Seen(len(seen), ranges, torch.zeros_like(ranges), False))
            again = bool(found.batches) and found.batches[-1] == index
            found.batch = found.batch.maximum(ranges) if again else ranges
            found.negative |= bool((x < 0).any())
            if not again:
                found.batches.append(index)

        return hook

    handles = [layer.register_forward_pre_hook(enter(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _restore(
    layers: list[tuple[FreezableLayer, FrozenRange | None]], norms: list[tuple[QuantizedL1BatchNorm, bool]]
) -> None:
    for layer, frozen in layers:
        layer.thaw_()
        if frozen is not None:
            layer.freeze_(frozen)
    for norm, was in norms:
        norm.freeze_(was)
