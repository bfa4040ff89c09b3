"""Statistics of the joined batch of all ranks in the place of each rank's own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..nn.batch_norm import JOINED, PLAIN
from ..nn.l1_norm import L1BatchNorm
from ..nn.layer_batch_norm import LayerBatchNorm
from ..quantizers.base import ActivationQuantizer


def synchronize_(model: nn.Module, on: bool = True) -> nn.Module:
    """Compute statistics over the batches of all torch.distributed ranks together, in place; `on` False: each its own.

    Concerned are batch and layer-batch normalizations, at every precision, and what activation quantizers take from
    data: first step sizes, the running maxima of `calibrate_`, and N of the gradient scale where it counts the batch.
    A training step on ranks is then that of one rank with the joined batch. In a run of one rank nothing changes.

    All ranks must run the model in training mode, and in `calibrate_`, together: one that does not come is waited for.
    Evaluation needs no other rank. Keys of the state_dict and parameters stay.

    Returns:
        The same model.

    Warns:
        UserWarning: L1 batch normalizations and layers that train in integers, whose ranges and statistics stay those
            of each rank's batch.
    """
    for module in model.modules():
        if isinstance(module, ActivationQuantizer | LayerBatchNorm):
            module.sync = on
        forms = JOINED if on else PLAIN
        if type(module) in forms:
            module.__class__ = forms[type(module)]
    alone = [name for name, module in model.named_modules() if isinstance(module, L1BatchNorm)]
    if on and alone:
        warnings.warn(
            f"synchronize_: {len(alone)} L1 batch normalizations, the first is {alone[0]!r}, keep the statistics and "
            "ranges of each rank's own batch",
            stacklevel=2,
        )
    return model


def is_synchronized(model: nn.Module) -> bool:
    """Whether `synchronize_` has been called, or a part asks for it by itself."""
    return any(type(m) in PLAIN or getattr(m, "sync", False) for m in model.modules())


@contextmanager
def synchronized(model: nn.Module) -> Iterator[nn.Module]:
    """`synchronize_` inside the `with` block; every module is then what it was."""
    classes = [(module, type(module)) for module in model.modules() if type(module) in JOINED]
    flags = [(m, m.sync) for m in model.modules() if isinstance(m, ActivationQuantizer | LayerBatchNorm)]
    try:
        yield synchronize_(model)
    finally:
        for module, plain in classes:
            module.__class__ = plain
        for flagged, sync in flags:
            flagged.sync = sync
