"""bitstrata: low-bit networks, trained once and run anywhere in pure integer arithmetic.

The training side needs torch (``pip install "bitstrata[train]"``); names are imported when first used, so the serving
half of the command line works without it. `bitstrata_runtime` is the package that runs programs.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import data, diagnostics, functional, nn, objectives, quantizers, recipes, report, train, zoo
    from .fused import FusedNetwork, FuseError, fuse
    from .integer import recompute_outputs
    from .lowering import add_plan, lower, pack, program_summary
    from .nn import PrecisionBatchNorm, QuantConv1d, QuantConv2d, QuantLinear
    from .objectives import PrecisionSampler, joint_backward, joint_loss, warm_start_chain
    from .prepare import (
        Pixels,
        accumulate_,
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
        step_weights,
        summary,
        synchronize_,
    )
    from .recipes import Recipe
    from .train import TrainConfig, Trainer
    from .verification import verify

try:
    __version__ = version("bitstrata")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

_MODULES = ("data", "diagnostics", "functional", "nn", "objectives", "quantizers", "recipes", "report", "train", "zoo")
_HOMES = {
    "add_plan": "lowering",
    "lower": "lowering",
    "pack": "lowering",
    "program_summary": "lowering",
    "PrecisionBatchNorm": "nn",
    "QuantConv1d": "nn",
    "QuantConv2d": "nn",
    "QuantLinear": "nn",
    "PrecisionSampler": "objectives",
    "joint_backward": "objectives",
    "joint_loss": "objectives",
    "warm_start_chain": "objectives",
    "Pixels": "prepare",
    "accumulate_": "prepare",
    "calibrate_": "prepare",
    "float_form_": "prepare",
    "freeze_": "prepare",
    "FuseError": "fused",
    "FusedNetwork": "fused",
    "fuse": "fused",
    "recompute_outputs": "integer",
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
    "step_weights": "prepare",
    "summary": "prepare",
    "synchronize_": "prepare",
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
    "PrecisionSampler",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "Recipe",
    "TrainConfig",
    "Trainer",
    "accumulate_",
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
    "joint_loss",
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
    "recompute_outputs",
    "reestimate_batchnorm_",
    "report",
    "saved_memory",
    "set_precision",
    "step_weights",
    "summary",
    "synchronize_",
    "train",
    "verify",
    "warm_start_chain",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES and name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_HOMES.get(name, name)}", __name__)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        text = f'bitstrata.{name} belongs to training, which needs torch: pip install "bitstrata[train]"'
        raise ModuleNotFoundError(text, name="torch") from None
    if name in _MODULES:
        return module
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
