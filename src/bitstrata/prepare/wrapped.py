"""Wrappers of distributed training: looked through where that is right, refused where it is not."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .compiled import uncompiled


def undistributed(model: nn.Module) -> nn.Module:
    """The module inside `DistributedDataParallel` or `DataParallel`, compiled if it was; else `model` itself."""
    while isinstance(model, DistributedDataParallel | DataParallel):
        model = model.module
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside `DistributedDataParallel`, `DataParallel` and `torch.compile`; else `model` itself."""
    while (inner := uncompiled(undistributed(model))) is not model:
        model = inner
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether some of the parameters are spread over ranks: `fully_shard` or `FullyShardedDataParallel`."""
    return any(hasattr(p, "device_mesh") for p in model.parameters()) or has_flat_parameters(model)


def has_flat_parameters(model: nn.Module) -> bool:
    """Whether `FullyShardedDataParallel` has joined parameters, which then are none of their layers' any more."""
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def refuse_wrapped(what: str, model: nn.Module) -> None:
    """Raise ValueError where `what` would change a model that a wrapper has taken stock of already."""
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, DistributedDataParallel | DataParallel):
            where = "the model is" if not name else f"{name!r} is"
            raise ValueError(
                f"{what}: {where} wrapped in {type(module).__name__}, which keeps the parameters it was given; call "
                f"{what} first and wrap the result"
            )
    refuse_sharded(what, model)


def refuse_sharded(what: str, model: nn.Module) -> None:
    """Raise ValueError where `what` needs whole parameters and every rank holds a part of them."""
    if isinstance(model, nn.Module) and is_sharded(model):
        raise ValueError(
            f"{what}: the model's parameters are sharded over ranks (FSDP); call {what} before sharding, or on an "
            "unsharded copy that has the gathered state_dict"
        )
