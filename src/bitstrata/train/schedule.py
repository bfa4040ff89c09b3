"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from bitstrata.train.config import TrainConfig


def lr_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Multiplier of the peak learning rate at `step` (0-based) of `total` steps, the first `warmup` of them rising.

    Warm-up step k has (k + 1) / warmup. Cosine: (1 + cos(pi * t)) / 2, t = (step - warmup) / (total - warmup),
    which starts at 1 and would reach 0 at step `total`.
    """
    if not 0 <= step < total:
        raise ValueError(f"lr_factor: step {step} is outside the schedule of {total} steps")
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def lr_factor_of(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """`lr_factor` with lengths taken from the configuration."""
    total = config.epochs * steps_per_epoch
    return lr_factor(step, total, round(config.warmup * steps_per_epoch), config.schedule)
