"""Models that torch.compile has wrapped: what preparation works on is the model underneath, run as it is written."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` was made of, which shares everything with it; else `model` itself.

    Qualified names of layers are those of the module; the wrapper would put "_orig_mod." in front of them.
    """
    inner = model._modules.get("_orig_mod") if isinstance(model, nn.Module) else None
    return model if inner is None else inner


def eagerly() -> AbstractContextManager[object]:
    """A context in which modules run without their compiled form, so that hooks see every tensor as it is.

    Torch before 2.6 cannot switch that off for a module compiled in place (`Module.compile`).
    """
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes long
        return nullcontext()
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")
