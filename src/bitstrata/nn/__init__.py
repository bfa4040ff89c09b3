"""Quantized layers and normalizations: what `quantize_` puts in place of their float forms."""

from .layer_batch_norm import LayerBatchNorm1d, LayerBatchNorm2d
from .layers import QuantConv1d, QuantConv2d, QuantizedLayer, QuantLinear, convert
from .norm import PrecisionBatchNorm
from .own import OwnLayer

__all__ = [
    "LayerBatchNorm1d",
    "LayerBatchNorm2d",
    "OwnLayer",
    "PrecisionBatchNorm",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "QuantizedLayer",
    "convert",
]
