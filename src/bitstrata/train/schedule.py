"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from bitstrata.train.config import TrainConfig


def lr_factor(
    step: int,
    total: int,
    warmup: int,
    schedule: str,
    *,
    start: float = 0.0,
    level: float | None = None,
    steps_per_epoch: int = 1,
) -> float:
    """Multiplier of the peak learning rate at `step` (0-based) of `total` steps, the first `warmup` of them warm-up.

    Warm-up step k has (k + 1) / warmup; with start > 0, start + (1 - start) k / warmup (SAT, section 4: start = 256 /
    batch); with a level, that level throughout (UniQ, section 5.1: 1-bit networks). Afterwards "constant" is 1 and
    "cosine" (1 + cos(pi t)) / 2, t = (step - warmup) / (total - warmup), which starts at 1 and would reach 0 at step
    `total`; "cosine_epoch" holds the value at the start of each epoch of `steps_per_epoch` steps.

    Raises:
        ValueError: a step outside the schedule.
    """
    if not 0 <= step < total:
        raise ValueError(f"lr_factor: step {step} is outside the schedule of {total} steps")
    if step < warmup:
        if level is not None:
            return level
        return start + (1 - start) * step / warmup if start else (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = step - warmup
    if schedule == "cosine_epoch":
        done -= done % steps_per_epoch
    return 0.5 * (1.0 + math.cos(math.pi * done / (total - warmup)))


def lr_factor_of(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """`lr_factor` with lengths taken from the configuration."""
    return lr_factor(
        step,
        config.epochs * steps_per_epoch,
        round(config.warmup * steps_per_epoch),
        config.schedule,
        start=config.warmup_start,
        level=None if config.warmup_lr is None else config.warmup_lr / config.lr,
        steps_per_epoch=steps_per_epoch,
    )
