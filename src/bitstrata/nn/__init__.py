"""Quantized layers and per-precision normalization: what `quantize_` puts in place of their float forms."""

from .layers import QuantConv1d, QuantConv2d, QuantizedLayer, QuantLinear, convert
from .norm import PrecisionBatchNorm

__all__ = ["PrecisionBatchNorm", "QuantConv1d", "QuantConv2d", "QuantLinear", "QuantizedLayer", "convert"]
