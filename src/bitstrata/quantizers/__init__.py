"""Quantizers: functions from a real tensor to a grid, all behind the one contract of `base.Quantizer`.

Weight transforms (w -> w', before the quantizer) and rescalings (of a weight quantizer's grid) are registered here too.

Every module of this package registers its quantizers on import; a new one is a new file here and its test.
"""

import importlib
import pkgutil

from .base import Grid, LayerFacts, Quantizer
from .registry import QuantizerRecord, build, build_rescale, build_transform, describe, names, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Grid",
    "LayerFacts",
    "Quantizer",
    "QuantizerRecord",
    "build",
    "build_rescale",
    "build_transform",
    "describe",
    "names",
    "register",
]
