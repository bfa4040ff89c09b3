"""What a training run is: every number that decides its result, in one frozen record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

#: A precision, or "float" for a network that is not quantized: the key of losses and accuracies.
Level = int | str

#: Fields that a resumed run may change: they decide how often files are written or how fast it runs, not what it
#: computes (`threads` may change the order of floating-point sums, so bits repeat only with the same number).
FREE_ON_RESUME = frozenset({"checkpoint_every", "log_every", "threads"})


@dataclass(frozen=True)
class TrainConfig:
    """One training stage: a float network, or a quantized one at all its precisions together.

    Raises ValueError for a value out of its range, naming the field.
    """

    epochs: int = 10
    """Passes over the training set."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """SGD momentum (Nesterov); Adam ignores it."""
    weight_decay: float = 5e-4
    """L2 decay of weights; step sizes and scale ratios never decay."""
    batch_size: int = 128
    """Images a step."""
    warmup: float = 0.0
    """Epochs of linear warm-up; fractions are allowed."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine to zero, set anew at every iteration, or constant."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd (Nesterov momentum) or adam."""
    distill: Literal["cosine"] | None = "cosine"
    """Each precision learns from the next wider one (quantized networks only)."""
    amp: Literal["none", "bf16"] = "none"
    """bf16 runs forward passes under autocast."""
    channels_last: bool = False
    """Keep images and convolution weights in NHWC memory order."""
    clip_grad: float | None = None
    """Largest allowed norm of the whole gradient."""
    label_smoothing: float = 0.0
    """Probability mass spread evenly over all classes."""
    seed: int = 0
    """Seeds torch, numpy and Python at the start of the run."""
    threads: int | None = None
    """Compute threads of torch; None leaves torch's own choice."""
    checkpoint_every: int = 0
    """Steps between checkpoints inside an epoch; 0: at the end of each epoch only."""
    log_every: int = 50
    """Steps between lines of the metrics file."""
    eval_every: int = 1
    """Epochs between evaluations; 0: only after the last one."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("weight_decay", "warmup", "checkpoint_every", "eval_every"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        _require(self.lr > 0, "lr", self.lr, "must be positive")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "must be in [0, 1)")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "must be in [0, 1)")
        _require(self.clip_grad is None or self.clip_grad > 0, "clip_grad", self.clip_grad, "must be positive")
        _require(self.threads is None or self.threads >= 1, "threads", self.threads, "must be at least 1")
        _require(self.warmup <= self.epochs, "warmup", self.warmup, f"must not exceed epochs={self.epochs}")
        _one_of("schedule", self.schedule, ("cosine", "constant"))
        _one_of("optimizer", self.optimizer, ("sgd", "adam"))
        _one_of("distill", self.distill, ("cosine", None))
        _one_of("amp", self.amp, ("none", "bf16"))

    def to_dict(self) -> dict[str, Any]:
        """JSON values of all fields."""
        return asdict(self)


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Readable differences between two configurations, without the fields that a resumed run may change."""
    names = sorted((set(saved) | set(current)) - FREE_ON_RESUME)
    return [
        f"{name}: {saved.get(name, 'absent')!r} saved, {current.get(name, 'absent')!r} now"
        for name in names
        if saved.get(name, "absent") != current.get(name, "absent")
    ]


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"TrainConfig: {name}={value!r} {rule}")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    _require(value in allowed, name, value, f"must be one of {', '.join(map(repr, allowed))}")
