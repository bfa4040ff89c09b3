"""What a training run is: every number that decides its result, in one frozen record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol

#: A precision, or "float" for a network that is not quantized: the key of losses and accuracies.
Level = int | str

#: Fields that a resumed run may change: they decide which files are written and what becomes of a failing step, not
#: what is computed. (`threads` changes the order of floating-point sums; checkpoints record the number in use.)
FREE_ON_RESUME = frozenset(
    {"checkpoint_every", "log_every", "threads", "keep", "best", "on_nonfinite", "nonfinite_limit"}
)

CHOICES: dict[str, tuple[object, ...]] = {
    "schedule": ("cosine", "cosine_epoch", "constant"),
    "optimizer": ("sgd", "adam"),
    "decay": ("all", "weights", "weights_no_depthwise"),
    "loss": ("cross_entropy", "maqd"),
    "distill": ("cosine", "kl", None),
    "teacher": ("next", "widest"),
    "combine": ("scalarization", "mgd"),
    "reduction": ("mean", "sum"),
    "sampling": ("all", "sandwich", "pair"),
    "amp": ("none", "bf16"),
    "on_nonfinite": ("error", "skip"),
}


class SupportsTraining(Protocol):
    """A recipe, as far as training is concerned."""

    @property
    def training(self) -> Mapping[str, Any]: ...


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
    """SGD momentum; Adam ignores it."""
    nesterov: bool = True
    """Nesterov's form of momentum."""
    weight_decay: float = 5e-4
    """L2 decay of the parameters that `decay` names; step sizes, clipping levels and scale ratios never decay."""
    decay: Literal["all", "weights", "weights_no_depthwise"] = "all"
    """Which parameters decay: weights, biases and normalizations; weights; or weights but depthwise ones."""
    batch_size: int = 128
    """Images a step."""
    warmup: float = 0.0
    """Epochs of warm-up; fractions are allowed, but for cosine_epoch."""
    warmup_start: float = 0.0
    """Factor of lr at the first step of a linear warm-up, as 256/batch_size in SAT; 0: one rise above zero."""
    warmup_lr: float | None = None
    """A constant learning rate during the warm-up, in the place of a rising one (UniQ at 1 bit)."""
    schedule: Literal["cosine", "cosine_epoch", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine to zero, set anew at every iteration or epoch, or constant."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd or adam."""
    loss: Literal["cross_entropy", "maqd"] = "cross_entropy"
    """Cross entropy, or MaQD's blend with the squared error (eq. 9)."""
    loss_gamma: float = 0.05
    """Weight of the squared error in the maqd loss."""
    distill: Literal["cosine", "kl"] | None = "cosine"
    """Loss by which each precision learns from its teacher; None for no teacher (quantized networks only)."""
    distill_weight: float = 1.0
    """Factor of the distillation loss."""
    distill_temperature: float = 1.0
    """Temperature of the kl distillation."""
    teacher: Literal["next", "widest"] = "next"
    """Teacher of a precision: the next wider or the widest one; a network given to the Trainer takes its place."""
    combine: Literal["scalarization", "mgd"] = "scalarization"
    """How precisions make one gradient: by fixed factors, or by multiple gradient descent."""
    reduction: Literal["mean", "sum"] = "mean"
    """Scalarization takes the mean of the precisions' gradients or their sum."""
    sampling: Literal["all", "sandwich", "pair"] = "all"
    """Precisions of a step: all; the narrowest, the widest and a random one between; or the widest and a random one."""
    precisions: tuple[int, ...] | None = None
    """Precisions to train and evaluate; None for all (quantized networks only)."""
    amp: Literal["none", "bf16"] = "none"
    """bf16 runs forward passes under autocast."""
    channels_last: bool = False
    """Keep images and convolution weights in NHWC memory order."""
    fused: bool = False
    """Run the steps of a quantized network with `fuse`: on the CPU, in one process, convolutions in integer kernels."""
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
    keep: int = 2
    """Checkpoints that are kept, the last ones, beside the best one."""
    best: Literal["mean"] | int = "mean"
    """Which accuracy makes a checkpoint the best one: the mean over precisions, or that of one precision."""
    on_nonfinite: Literal["error", "skip"] = "error"
    """A loss or gradient that is not finite ends the run with an error, or its step is left out, counted and logged."""
    nonfinite_limit: int = 10
    """Steps left out in a row after which it is an error all the same."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_every", "keep", "nonfinite_limit"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("weight_decay", "warmup", "warmup_start", "distill_weight", "checkpoint_every", "eval_every"):
            value = getattr(self, name)
            _require(value >= 0 and math.isfinite(value), name, value, "must not be negative")
        for name in ("lr", "distill_temperature"):
            value = getattr(self, name)
            _require(value > 0 and math.isfinite(value), name, value, "must be positive")
        for name in ("clip_grad", "warmup_lr"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "must be positive")
        for name in ("momentum", "label_smoothing"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must be in [0, 1)")
        _require(0 <= self.loss_gamma <= 1, "loss_gamma", self.loss_gamma, "must be in [0, 1]")
        _require(self.threads is None or self.threads >= 1, "threads", self.threads, "must be at least 1")
        chosen = self.best == "mean" or (isinstance(self.best, int) and not isinstance(self.best, bool))
        _require(chosen, "best", self.best, "must be 'mean' or a precision")
        _require(self.warmup <= self.epochs, "warmup", self.warmup, f"must not exceed epochs={self.epochs}")
        if self.precisions is not None:
            object.__setattr__(self, "precisions", tuple(self.precisions))  # a list, where it was read from JSON
            _require(
                bool(self.precisions), "precisions", self.precisions, "must name at least one precision, or be None"
            )
        for name, allowed in CHOICES.items():
            _require(getattr(self, name) in allowed, name, getattr(self, name), f"must be one of {_listed(allowed)}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        """An option that another one makes void is an error, not a surprise."""
        whole = self.schedule != "cosine_epoch" or float(self.warmup).is_integer()
        _require(whole, "warmup", self.warmup, "must be a whole number of epochs with schedule='cosine_epoch'")
        rising = self.warmup_lr is None or not self.warmup_start
        _require(rising, "warmup_start", self.warmup_start, f"is void with warmup_lr={self.warmup_lr!r}")
        smooth = self.loss == "cross_entropy" or not self.label_smoothing
        _require(smooth, "label_smoothing", self.label_smoothing, f"is void with loss={self.loss!r}")
        tempered = self.distill == "kl" or self.distill_temperature == 1
        _require(tempered, "distill_temperature", self.distill_temperature, f"is void with distill={self.distill!r}")
        free = self.combine == "scalarization" or self.reduction == "mean"
        _require(free, "reduction", self.reduction, f"is void with combine={self.combine!r}")
        whole = self.combine == "scalarization" or self.sampling == "all"
        _require(whole, "sampling", self.sampling, "cannot be with combine='mgd', which weighs all precisions")

    @classmethod
    def from_recipe(cls, recipe: SupportsTraining, **overrides: Any) -> TrainConfig:
        """The configuration that a recipe's source trains with; `overrides` replace fields.

        recipe: its `training` maps names of fields to values. Raises ValueError for a name that is no field, and for
        values out of range.
        """
        known = {f.name for f in fields(cls)}
        values = {**dict(recipe.training), **overrides}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"TrainConfig: no field {', '.join(map(repr, unknown))}; there are: {', '.join(sorted(known))}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON values of all fields."""
        return asdict(self)


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Readable differences between two configurations, without the fields that a resumed run may change.

    A field that the saved one does not know counts as having its default: fields are added so that their default is
    what was done before.
    """
    known = {**TrainConfig().to_dict(), **saved}
    names = sorted((set(known) | set(current)) - FREE_ON_RESUME)
    return [
        f"{name}: {known.get(name, 'absent')!r} saved, {current.get(name, 'absent')!r} now"
        for name in names
        if known.get(name, "absent") != current.get(name, "absent")
    ]


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"TrainConfig: {name}={value!r} {rule}")


def _listed(allowed: tuple[object, ...]) -> str:
    return ", ".join(map(repr, allowed))
