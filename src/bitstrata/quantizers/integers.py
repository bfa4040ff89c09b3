"""ShiftQuant of weights and activations inside layers that train in integers: options of a recipe, no quantizer."""

from __future__ import annotations

from torch import nn

from ..integer.rule import IntegerRule
from .registry import register


@register("shiftquant", "integer", "ShiftQuant inside layers that train in integers, ranges of the batch at hand")
class ShiftQuantIntegers(nn.Module):
    """What a recipe says of the forward pass of `integer_`; the layers themselves quantize (`IntegerLayer`).

    Activations get the step tau_0 / B 2^-e of their channel's group e; weights the step max|w| / B of an output
    channel, and for the input gradient that of an input channel. Source: Guo, Liu et al., section 4.1 and appendix D.

    Args:
        groups: N_G of activations, 1..8.
        act_rounding: of activations in training, "nearest" or "stochastic".
        unsigned_nonneg: activations without negative elements get codes 0..2^a - 1.
        clip_ratio: above 0 and at most 1, multiplies the activations' ranges; for rounding to nearest.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        *,
        groups: int = 4,
        act_rounding: str = "nearest",
        unsigned_nonneg: bool = False,
        clip_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.rule = IntegerRule(
            groups=groups, act_rounding=act_rounding, unsigned_nonneg=unsigned_nonneg, clip_ratio=clip_ratio
        )
