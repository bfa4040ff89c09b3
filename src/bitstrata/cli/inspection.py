"""What `bitstrata inspect` measures (torch side)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bitstrata.data import Dataset, Loader
from bitstrata.diagnostics import (
    layer_signals,
    nonzero_activations,
    nonzero_weights,
    objective_geometry,
    training_rules,
)
from bitstrata.prepare import precision


def inspect(model: nn.Module, data: Dataset, levels: Sequence[int], images: int) -> dict[str, Any]:
    """Signals and rules at each precision, and the geometry of their objectives, as JSON values."""
    batch = Loader(data, min(images, len(data)), train=False).batch(0, 0)
    found: dict[str, Any] = {"precisions": {}, "objectives": None}
    for bits in levels:
        with precision(model, bits):
            signals = layer_signals(model, [batch[0]])
            rules = training_rules(model, _loss, batch, training=True)
            zeros = {"R_w": nonzero_weights(model).pooled}
            if len(signals) > 1:
                zeros["R_a"] = nonzero_activations(model, [batch[0]]).pooled
        found["precisions"][str(bits)] = {
            "signals": {name: _plain(dataclasses.asdict(part)) for name, part in signals.items()},
            "rules": {**_plain(dataclasses.asdict(rules)), "text": rules.explain()},
            "nonzero": zeros,
        }
    if len(levels) > 1:
        geometry = dataclasses.asdict(objective_geometry(model, _loss, batch))
        found["objectives"] = _plain({**geometry, "cosines": geometry["cosines"].tolist()})
    return found


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: None stands for both."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
