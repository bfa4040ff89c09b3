"""Quantized layers and normalizations: what `quantize_` puts in place of their float forms."""

from .integer_attention import IntegerMultiheadAttention
from .integer_embedding import IntegerEmbedding
from .integer_layers import IntegerConv1d, IntegerConv2d, IntegerLayer, IntegerLinear, to_integer
from .integer_recurrent import (
    IntegerGRU,
    IntegerGRUCell,
    IntegerLSTM,
    IntegerLSTMCell,
    IntegerRNN,
    IntegerRNNCell,
)
from .l1_layer_norm import L1LayerNorm, QuantizedL1LayerNorm
from .l1_norm import (
    L1BatchNorm1d,
    L1BatchNorm2d,
    QuantizedL1BatchNorm1d,
    QuantizedL1BatchNorm2d,
    l1_batch_norm_from,
)
from .layer_batch_norm import LayerBatchNorm1d, LayerBatchNorm2d
from .layers import QuantConv1d, QuantConv2d, QuantizedLayer, QuantLinear, convert
from .norm import PrecisionBatchNorm
from .own import OwnLayer

__all__ = [
    "IntegerConv1d",
    "IntegerConv2d",
    "IntegerEmbedding",
    "IntegerGRU",
    "IntegerGRUCell",
    "IntegerLSTM",
    "IntegerLSTMCell",
    "IntegerLayer",
    "IntegerLinear",
    "IntegerMultiheadAttention",
    "IntegerRNN",
    "IntegerRNNCell",
    "L1BatchNorm1d",
    "L1BatchNorm2d",
    "L1LayerNorm",
    "LayerBatchNorm1d",
    "LayerBatchNorm2d",
    "OwnLayer",
    "PrecisionBatchNorm",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "QuantizedL1BatchNorm1d",
    "QuantizedL1BatchNorm2d",
    "QuantizedL1LayerNorm",
    "QuantizedLayer",
    "convert",
    "l1_batch_norm_from",
    "to_integer",
]
