"""How the gradients at layers are distributed, and how far their channels' ranges lie apart, with and without groups.

Source: Guo, Liu et al., "Towards accurate and efficient sub-8-bit integer training", section 3.1, figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..integer.groups import channel_ranges, check_groups, group_exponents, grouping_cost
from .arriving import arriving_gradients
from .landscape import Loss

BINS = 41  # odd: the middle one holds zero


@dataclass(frozen=True)
class LayerRanges:
    """The gradient at one layer, on the scale of its largest magnitude tau_0.

    Attributes:
        largest: tau_0.
        counts: elements in BINS equally wide bins over -1..1 (figure 2a).
        ranges: r_i = max|g_i| / tau_0 of every channel, the widest first; 0..1 (figure 2c). All 0 for a gradient of
            zeros.
        groups: of the same channels, in the same order: the exponent e_i of its range tau_0 2^-e_i (figure 2d).
        diversity: mean of tau_0 / r_i over the channels that are not zero, what eq. 1 costs a channel with one range
            for all: how many times wider than its own values the range is that a channel is quantized with. 1 is best.
        grouped: the same with the groups' ranges.
    """

    largest: float
    counts: tuple[int, ...]
    ranges: tuple[float, ...]
    groups: tuple[int, ...]
    diversity: float
    grouped: float

    @property
    def channels(self) -> int:
        """Of the gradient."""
        return len(self.ranges)

    def near_zero(self) -> float:
        """The share of elements in the middle bin: near 1 for a peaked distribution, 1 / BINS for an even one."""
        return self.counts[BINS // 2] / sum(self.counts)


def gradient_ranges(
    model: nn.Module, loss: Loss, batch: Any, *, groups: int = 4, training: bool | None = None
) -> dict[str, LayerRanges]:
    """Distribution and channel ranges of the gradient that arrives at each layer, before this layer quantizes it.

    Layers, passes and what is left untouched are as for `gradient_variance`. Of a layer that runs several times, the
    run with the largest gradient.

    Args:
        loss: called with (model, batch), gives one number as a tensor. batch: what `loss` takes.
        groups: N_G, 1..8.
        training: as for `gradient_variance`.

    Returns:
        Qualified name -> its gradient, in the order of the forward pass; layers that no gradient reached are left out.

    Raises:
        ValueError: as `gradient_variance`.
    """
    check_groups(groups, "gradient_ranges")
    seen = arriving_gradients(model, loss, batch, training=training, where="gradient_ranges")
    found = {}
    for name, (axis, gradients) in seen.items():
        full = [gradient.float() for gradient in gradients if gradient.numel()]
        if full:
            found[name] = _measured(max(full, key=lambda g: float(g.abs().amax())), axis, groups)
    return found


def _measured(gradient: Tensor, axis: int, groups: int) -> LayerRanges:
    ranges = channel_ranges(gradient, axis).sort(descending=True).values
    exponents = group_exponents(ranges, groups)
    largest = float(ranges[0])
    bins = torch.zeros(gradient.numel()) if largest == 0 else gradient.reshape(-1) / ranges[0]
    counts = torch.histc(bins.double().cpu(), BINS, -1, 1)
    used = int((ranges > 0).sum())
    wide = torch.full_like(ranges, largest).double()
    narrow = wide * torch.exp2(-exponents.double())
    relative = ranges.double() / largest if largest else ranges.double()
    return LayerRanges(
        largest,
        tuple(int(c) for c in counts),
        tuple(relative.tolist()),
        tuple(exponents.tolist()),
        grouping_cost(ranges, wide) / used if used else 1.0,
        grouping_cost(ranges, narrow) / used if used else 1.0,
    )
