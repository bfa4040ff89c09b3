"""What `bitstrata inspect` measures and draws (torch side)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bitstrata.data import Dataset, Loader
from bitstrata.diagnostics import layer_signals, objective_geometry, training_rules
from bitstrata.prepare import precision

COLUMNS = 4


def inspect(model: nn.Module, data: Dataset, levels: Sequence[int], images: int) -> dict[str, Any]:
    """Signals and rules at each precision, and the geometry of their objectives, as JSON values."""
    batch = Loader(data, min(images, len(data)), train=False).batch(0, 0)
    found: dict[str, Any] = {"precisions": {}, "objectives": None}
    for bits in levels:
        with precision(model, bits):
            signals = layer_signals(model, [batch[0]])
            rules = training_rules(model, _loss, batch, training=True)
        found["precisions"][str(bits)] = {
            "signals": {name: _plain(dataclasses.asdict(part)) for name, part in signals.items()},
            "rules": {**_plain(dataclasses.asdict(rules)), "text": rules.explain()},
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


def draw(found: dict[str, Any], path: Path) -> None:
    """How often each weight code occurs, a panel a layer at the widest precision (UniQ, figure 3)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bits = max(found["precisions"], key=int)
    layers = found["precisions"][bits]["signals"]
    rows = -(-len(layers) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(11, 1.7 * rows + 0.6), squeeze=False)
    for axis in axes.ravel()[len(layers) :]:
        axis.axis("off")
    for axis, (name, parts) in zip(axes.ravel(), layers.items(), strict=False):
        weight = parts["weight"]
        axis.bar(
            range(weight["lo"], weight["lo"] + len(weight["counts"])), weight["counts"], color="#4477aa", width=0.9
        )
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_yticks([])
    figure.suptitle(f"weight codes at {bits} bits", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
