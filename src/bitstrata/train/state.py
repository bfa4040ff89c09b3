"""The whole state of a run: what a checkpoint holds, what has to agree before it is taken up, and taking it up."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitstrata.prepare import load_noise_state_, noise_state, precisions
from bitstrata.train import checkpoint
from bitstrata.train.checkpoint import CheckpointError
from bitstrata.train.config import Level, TrainConfig, differences
from bitstrata.train.execution import execution, quantization, requantized, unequal, unsaved_buffers


@dataclass
class Position:
    """Where a run stands; the learning rate and the order of the data follow from it.

    step: steps that are done, of the whole run. epochs: epochs that are done, with their evaluation. Sums are over the
    epoch in progress. seen: images that a level was trained on, where not every step trains every level. best: highest
    accuracy so far of the kind that the configuration names. skipped, in_a_row: steps that were left out.
    """

    step: int = 0
    epochs: int = 0
    loss_sum: dict[Level, float] = field(default_factory=dict)
    correct: dict[Level, int] = field(default_factory=dict)
    seen: dict[Level, int] = field(default_factory=dict)
    images: int = 0
    best: float | None = None
    skipped: int = 0
    in_a_row: int = 0

    def add(self, losses: Mapping[Level, float], hits: Mapping[Level, int], images: int) -> None:
        """Count one step on `images` images, of which `hits` were answered right."""
        for level, loss in losses.items():
            self.correct[level] = self.correct.get(level, 0) + hits[level]
            self.loss_sum[level] = self.loss_sum.get(level, 0.0) + loss * images
            self.seen[level] = self.seen.get(level, 0) + images
        self.images += images
        self.step += 1
        self.in_a_row = 0

    def skip(self) -> None:
        """Count a step that is left out."""
        self.step += 1
        self.skipped += 1
        self.in_a_row += 1

    def accuracy(self) -> dict[Level, float]:
        """Training accuracies of the epoch so far, as fractions, of the levels trained in it."""
        return {level: count / self.seen[level] for level, count in self.correct.items()}

    def means(self) -> dict[str, dict[str, float]]:
        """Means over the epoch as JSON values, of the levels trained in it; the sums start again."""
        means = {
            "loss": {str(level): total / self.seen[level] for level, total in self.loss_sum.items()},
            "accuracy": {str(level): count / self.seen[level] for level, count in self.correct.items()},
        }
        self.loss_sum, self.correct, self.seen, self.images = {}, {}, {}, 0
        return means

    def improves(self, accuracy: Mapping[Level, float], kind: str | int) -> bool:
        """Take note of an evaluation; whether it is the best so far. kind: "mean", or a precision."""
        if not accuracy:
            return False
        if kind != "mean" and kind not in accuracy:
            raise ValueError(f"Trainer: best={kind!r}, but the evaluation has {', '.join(map(str, accuracy))}")
        score = sum(accuracy.values()) / len(accuracy) if kind == "mean" else accuracy[kind]
        if self.best is not None and score <= self.best:
            return False
        self.best = score
        return True


@dataclass(frozen=True)
class Parts:
    """What a run consists of, beside its position. source: `identity` of the batches."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    source: dict[str, str]
    device: torch.device


def capture(parts: Parts, position: Position, metrics: int) -> dict[str, Any]:
    """Everything that the rest of the run depends on. metrics: bytes of the metrics file."""
    return {
        "config": parts.config.to_dict(),
        "source": parts.source,
        "precisions": list(precisions(parts.model)),
        "quantization": quantization(parts.model),
        "execution": execution(parts.device),
        "model": dict(parts.model.state_dict()),
        "unsaved": unsaved_buffers(parts.model),
        "optimizer": parts.optimizer.state_dict(),
        "position": vars(position),
        "random": randomness(parts.model),
        "metrics": metrics,
    }


def restore(parts: Parts, state: Mapping[str, Any]) -> Position:
    """Put a captured state back into the parts, but for the random generators; returns the position."""
    parts.model.load_state_dict(state["model"])
    buffers = dict(parts.model.named_buffers())
    with torch.no_grad():
        for name, value in state["unsaved"].items():
            buffers[name].copy_(value)
    parts.optimizer.load_state_dict(state["optimizer"])
    return Position(**state["position"])


def randomness(model: nn.Module) -> dict[str, Any]:
    """State of all random numbers: the global generators, and the counters of the network's own noise."""
    return {"generators": checkpoint.rng_state(), "noise": noise_state(model)}


def set_randomness(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put back what `randomness` returned."""
    checkpoint.set_rng_state(state["generators"])
    load_noise_state_(model, state["noise"])


def check_same_run(parts: Parts, path: Path, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the checkpoint is of another configuration, data, recipe or network."""
    if "source" not in state:
        raise CheckpointError(
            f"checkpoint {path}: format {state['format']} does not hold all that an exact continuation needs; start "
            "over with resume=False (its weights can still be evaluated and packed)"
        )
    changes = differences(state["config"], parts.config.to_dict()) + unequal(state["source"], parts.source)
    current = list(precisions(parts.model))
    if state["precisions"] != current:
        changes.append(f"precisions: {state['precisions']} saved, {current} now")
    recipe = requantized(state["quantization"], quantization(parts.model))
    if recipe:
        changes.append(f"recipe: {recipe}")
    mine, saved = parts.model.state_dict(), state["model"]
    odd = sorted(k for k in set(mine) | set(saved) if _shape(mine.get(k)) != _shape(saved.get(k)))
    if odd:
        changes.append(f"network: {len(odd)} entries differ, the first is {odd[0]}")
    if changes:
        raise CheckpointError(
            f"checkpoint {path} belongs to another run ({'; '.join(changes)}); "
            "use another output directory, or start over with resume=False"
        )


def check_same_execution(parts: Parts, path: Path, state: Mapping[str, Any], allow_inexact: bool) -> None:
    """Refuse to go on, or with `allow_inexact` warn, where this machine would compute other bits."""
    changes = unequal(cast(dict[str, str], state["execution"]), execution(parts.device))
    if not changes:
        return
    found = f"checkpoint {path} was taken under other conditions ({'; '.join(changes)})"
    if not allow_inexact:
        raise CheckpointError(
            f"{found}, under which the rest of the run would not be the same to the bit. Continue under the same "
            "ones, or accept that with allow_inexact=True (--allow-inexact)"
        )
    warnings.warn(f"{found}: the rest of the run will not be the same to the bit", stacklevel=4)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value is not None
