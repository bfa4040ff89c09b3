"""Embedding among layers that train in integers: a lookup, so nothing to quantize."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..integer.layer_call import LayerState
from ..integer.rounding import CounterGenerator
from .integer_layers import IntegerLayer, integer_form


@integer_form(nn.Embedding)
class IntegerEmbedding(IntegerLayer, nn.Embedding):
    """`torch.nn.Embedding` as it is: indices (...) -> float (..., features), with its exact gradient.

    A lookup has no product, so there are no codes, no rounding and no streams (`states` is empty), and `rule` changes
    nothing. Its weight may be that of a linear layer (tied weights): the parameter gets the sum of both gradients, of
    which the linear layer's comes from integers. Arguments and errors are those of torch's layer.
    """

    multiplies = False

    def _begin(self, label: str, noise: CounterGenerator) -> None:
        """Nothing to begin: no product, no streams."""

    @property
    def states(self) -> Mapping[str, LayerState]:
        return {}

    def extra_repr(self) -> str:
        return nn.Embedding.extra_repr(self)
