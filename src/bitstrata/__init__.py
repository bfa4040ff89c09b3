"""bitstrata: low-bit networks, trained once and run anywhere in pure integer arithmetic.

The training side needs torch (``pip install "bitstrata[train]"``); names are imported when first used, so the serving
half of the command line works without it. `bitstrata_runtime` is the package that runs programs.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import data, diagnostics, functional, nn, objectives, quantizers, recipes, train, zoo
    from .fused import FusedNetwork, FuseError, fuse
    from .lowering import add_plan, lower, pack, program_summary
    from .nn import PrecisionBatchNorm, QuantConv1d, QuantConv2d, QuantLinear
    from .objectives import joint_backward
    from .prepare import (
        Pixels,
        calibrate_,
        float_form_,
        freeze_,
        integer_,
        mixed_precision_map,
        parameter_groups,
        precision,
        precision_parameters,
        precisions,
        quantize_,
        reestimate_batchnorm_,
        saved_memory,
        set_precision,
        summary,
    )
    from .recipes import Recipe
    from .train import TrainConfig, Trainer
    from .verification import verify

try:
    __version__ = version("bitstrata")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

_MODULES = ("data", "diagnostics", "functional", "nn", "objectives", "quantizers", "recipes", "train", "zoo")
_HOMES = {
    "add_plan": "lowering",
    "lower": "lowering",
    "pack": "lowering",
    "program_summary": "lowering",
    "PrecisionBatchNorm": "nn",
    "QuantConv1d": "nn",
    "QuantConv2d": "nn",
    "QuantLinear": "nn",
    "joint_backward": "objectives",
    "Pixels": "prepare",
    "calibrate_": "prepare",
    "float_form_": "prepare",
    "freeze_": "prepare",
    "FuseError": "fused",
    "FusedNetwork": "fused",
    "fuse": "fused",
    "integer_": "prepare",
    "mixed_precision_map": "prepare",
    "parameter_groups": "prepare",
    "precision": "prepare",
    "precision_parameters": "prepare",
    "precisions": "prepare",
    "quantize_": "prepare",
    "reestimate_batchnorm_": "prepare",
    "saved_memory": "prepare",
    "set_precision": "prepare",
    "summary": "prepare",
    "Recipe": "recipes",
    "TrainConfig": "train",
    "Trainer": "train",
    "verify": "verification",
}

__all__ = [
    "FuseError",
    "FusedNetwork",
    "Pixels",
    "PrecisionBatchNorm",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "Recipe",
    "TrainConfig",
    "Trainer",
    "add_plan",
    "calibrate_",
    "data",
    "diagnostics",
    "float_form_",
    "freeze_",
    "functional",
    "fuse",
    "integer_",
    "joint_backward",
    "lower",
    "mixed_precision_map",
    "nn",
    "objectives",
    "pack",
    "parameter_groups",
    "precision",
    "precision_parameters",
    "precisions",
    "program_summary",
    "quantize_",
    "quantizers",
    "recipes",
    "reestimate_batchnorm_",
    "saved_memory",
    "set_precision",
    "summary",
    "train",
    "verify",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f'bitstrata.{name} trains and needs torch: pip install "bitstrata[train]"', name="torch"
        ) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
