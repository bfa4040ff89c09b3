"""The training loop: one stage, float or quantized, that can be stopped anywhere and resumed exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from bitstrata.prepare import load_noise_state_, noise_state, precisions
from bitstrata.train import checkpoint, snapshot
from bitstrata.train.config import Level, TrainConfig, differences
from bitstrata.train.evaluate import evaluate, place
from bitstrata.train.metrics import MetricsLog
from bitstrata.train.objective import LevelLoss, Objective, default_objective, make_optimizer
from bitstrata.train.progress import Reporter, reporter
from bitstrata.train.schedule import lr_factor_of
from bitstrata.train.tensorboard import TensorBoardLog
from bitstrata.train.tensorboard import require as require_tensorboard
from bitstrata.train.timing import Clock

Batch = tuple[Tensor, Tensor]


class BatchSource(Protocol):
    """What `bitstrata.data.Loader` offers: the same batches for the same epoch, from any step on."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterable[Batch]: ...
    def __len__(self) -> int: ...


@dataclass
class Position:
    """Where a run stands: `step` steps of the whole run are done; sums are over the epoch in progress."""

    step: int = 0
    loss_sum: dict[Level, float] = field(default_factory=dict)
    correct: dict[Level, int] = field(default_factory=dict)
    images: int = 0

    def add(self, results: Mapping[Any, LevelLoss], labels: Tensor) -> dict[Level, float]:
        """Count one step; returns its losses."""
        losses = {level: float(result.loss) for level, result in results.items()}
        for level, result in results.items():
            hits = int((result.logits.detach().argmax(1) == labels).sum())
            self.correct[level] = self.correct.get(level, 0) + hits
            self.loss_sum[level] = self.loss_sum.get(level, 0.0) + losses[level] * len(labels)
        self.images += len(labels)
        self.step += 1
        return losses

    def accuracy(self) -> dict[Level, float]:
        """Training accuracies of the epoch so far, as fractions; empty before its first step."""
        return {level: count / self.images for level, count in self.correct.items()}

    def end_epoch(self) -> dict[str, dict[str, float]]:
        """Means over the epoch as JSON values; the sums start again."""
        means = {
            "loss": {str(level): total / self.images for level, total in self.loss_sum.items()},
            "accuracy": {str(level): count / self.images for level, count in self.correct.items()},
        }
        self.loss_sum, self.correct, self.images = {}, {}, 0
        return means


class Trainer:
    """Trains a network at every precision it has, or as a float network if it is not quantized.

        trainer = Trainer(model, TrainConfig(epochs=5, lr=0.02), train_loader, test_loader, out_dir="runs/x")
        trainer.fit()          # re-running the same lines after an interruption continues bit for bit
        trainer.evaluate()     # {1: 0.64, 2: 0.77, ...} or {"float": 0.81}

    train_loader, eval_loader: `bitstrata.data.Loader`, or any sized iterable of (float images (N, C, H, W), int64
    labels (N,)), such as torch's DataLoader without worker processes. objective: replaces `joint_backward` (or
    the plain loss, for a float network) with everything the configuration says of it. teacher: a network of its own
    that all precisions learn from, in the place of a wider precision; it is not trained and not saved, so a resumed run
    has to be given the same one. out_dir: holds NAME.ckpt, metrics.jsonl and, for a quantized network, NAME.layers.json
    (grids and weight histograms as of the last epoch); None writes nothing. reporter: `bitstrata.train.reporter`, which
    shows progress on stderr, `quiet`, or a function of (name, total steps, steps done) that returns a `Reporter`.
    tensorboard: directory for TensorBoard's events, in a subdirectory NAME; ModuleNotFoundError without tensorboard.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        train_loader: BatchSource | Iterable[Batch],
        eval_loader: BatchSource | Iterable[Batch] | None = None,
        out_dir: str | Path | None = None,
        *,
        objective: Objective | None = None,
        teacher: nn.Module | None = None,
        name: str = "train",
        reporter: Callable[[str, int, int], Reporter] = reporter,
        tensorboard: str | Path | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.name = name
        self.train_loader = as_source(train_loader, config.seed)
        self.eval_loader = eval_loader
        self.steps_per_epoch = len(self.train_loader)
        if self.steps_per_epoch < 1:
            raise ValueError("Trainer: train_loader has no batches")
        self.out_dir = None if out_dir is None else Path(out_dir)
        if objective is not None and teacher is not None:
            raise ValueError("Trainer: give either an objective or a teacher; an objective brings its own teacher")
        self.objective = objective or default_objective(model, config, teacher)
        self.reporter = reporter
        self.device = next(model.parameters()).device
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(model, config)
        self.position = Position()
        self.log = MetricsLog(None if self.out_dir is None else self.out_dir / "metrics.jsonl", name)
        self.clock = Clock()
        self.tensorboard = None if tensorboard is None else Path(tensorboard)
        if self.tensorboard is not None:
            require_tensorboard()

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def checkpoint_path(self) -> Path | None:
        """Where this stage keeps its checkpoint."""
        return None if self.out_dir is None else self.out_dir / f"{self.name}.ckpt"

    def fit(self, resume: bool = True) -> dict[Level, float]:
        """Train to the end; returns the accuracies of the last evaluation (empty without an eval_loader).

        resume: continue from the checkpoint in out_dir if there is one; False starts over. A finished run is not
        repeated. Raises CheckpointError when the checkpoint belongs to another configuration or network, and
        FloatingPointError when a loss stops being finite.
        """
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        if self.out_dir is not None:
            self.out_dir.mkdir(parents=True, exist_ok=True)
        rng = self._restore() if resume else None
        if rng is None:
            self.log.drop_run()
            checkpoint.seed_all(self.config.seed)
        accuracy: dict[Level, float] = {}
        with self._shown() as report:
            while self.position.step < self.total_steps:
                accuracy = self._epoch(report, rng)
                rng = None
        return accuracy or self._final_accuracy()

    def evaluate(self, levels: tuple[int, ...] | None = None) -> dict[Level, float]:
        """Top-1 accuracy on eval_loader, a fraction for each of `levels`, by default what the configuration trains.

        Raises ValueError without an eval_loader.
        """
        if self.eval_loader is None:
            raise ValueError("Trainer.evaluate: the trainer was made without an eval_loader")
        loader = self.eval_loader
        batches = cast(BatchSource, loader).epoch(0, 0) if hasattr(loader, "epoch") else loader
        wanted = self.config.precisions if levels is None else levels
        return evaluate(self.model, batches, wanted, amp=self.config.amp, channels_last=self.config.channels_last)

    @contextmanager
    def _shown(self) -> Iterator[Reporter]:
        """The run's progress reporter, with TensorBoard's events and the clock in forward passes beside it."""
        self.clock.lap()
        with ExitStack() as stack:
            stack.enter_context(self.clock.forward_of(self.model))
            if self.tensorboard is not None:
                stack.enter_context(self.log.also(TensorBoardLog(self.tensorboard, self.name, self.position.step)))
            yield stack.enter_context(self.reporter(self.name, self.total_steps, self.position.step))

    def _epoch(self, report: Reporter, rng: dict[str, Any] | None) -> dict[Level, float]:
        """The rest of the current epoch, its evaluation and its checkpoint."""
        epoch, start = divmod(self.position.step, self.steps_per_epoch)
        self.model.train()
        with self.clock("data"):
            batches = iter(self.train_loader.epoch(epoch, start))
        if rng is not None:
            checkpoint.set_rng_state(rng)
        begun, images_before = time.monotonic(), self.position.images
        for images, labels in self.clock.each("data", batches):
            losses = self._step(images, labels)
            step = self.position.step
            with self.clock("logging"):
                report.step(step, epoch, len(labels), losses, lr=self._lr(), accuracy=self.position.accuracy())
                if step % self.config.log_every == 0:
                    self._log_step(epoch, losses)
            if self.config.checkpoint_every and step % self.config.checkpoint_every == 0:
                self._save()
        if self.position.step != (epoch + 1) * self.steps_per_epoch:
            done = self.position.step - epoch * self.steps_per_epoch
            raise RuntimeError(f"Trainer: epoch {epoch} gave {done} batches, len(loader) says {self.steps_per_epoch}")
        rate = (self.position.images - images_before) / max(time.monotonic() - begun, 1e-9)
        means = self.position.end_epoch()
        self.log.write("epoch", step=self.position.step, epoch=epoch, images_per_s=round(rate, 1), **means)
        accuracy = self._epoch_evaluation(report, epoch)
        self._log_epoch(epoch, self.position.step - epoch * self.steps_per_epoch - start)
        self._save()
        return accuracy

    def _log_epoch(self, epoch: int, steps: int) -> None:
        """Step sizes and layers as they are now, and where the time went since the last such line."""
        step = self.position.step
        with self.clock("logging"):
            grids = snapshot.steps(self.model)
            if grids:
                self.log.write("grids", step=step, epoch=epoch, layers=grids)
            if self.out_dir is not None:
                snapshot.write(self.out_dir / f"{self.name}.layers.json", self.model, step=step, epoch=epoch)
        wall, seconds = self.clock.lap()
        parts = {part: round(value, 4) for part, value in seconds.items()}
        self.log.write("time", step=step, epoch=epoch, steps=steps, wall=round(wall, 4), seconds=parts)

    def _step(self, images: Tensor, labels: Tensor) -> dict[Level, float]:
        """One optimizer step. Raises FloatingPointError before a non-finite loss can reach the weights."""
        factor = lr_factor_of(self.config, self.position.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        inputs = place(images, self.device, self.config.channels_last)
        targets = labels.to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with self.clock("backward"):
            results = self.objective(self.model, inputs, targets)
        with self.clock("logging"):
            losses = self.position.add(results, targets)
        for level, loss in losses.items():
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"Trainer: loss {loss} at step {self.position.step - 1}, precision {level}; "
                    f"lower lr={self.config.lr} or set clip_grad"
                )
        with self.clock("optimizer"):
            if self.config.clip_grad is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
            self.optimizer.step()
        return losses

    def _lr(self) -> float:
        """The learning rate of the step that was made last."""
        return self.config.lr * lr_factor_of(self.config, self.position.step - 1, self.steps_per_epoch)

    def _log_step(self, epoch: int, losses: Mapping[Level, float]) -> None:
        loss = {str(level): value for level, value in losses.items()}
        self.log.write("step", step=self.position.step, epoch=epoch, lr=self._lr(), loss=loss)

    def _epoch_evaluation(self, report: Reporter, epoch: int) -> dict[Level, float]:
        every, last = self.config.eval_every, epoch + 1 == self.config.epochs
        if self.eval_loader is None or not (last or (every and (epoch + 1) % every == 0)):
            return {}
        with self.clock("evaluation"):
            accuracy = self.evaluate()
        self.log.write(
            "eval", step=self.position.step, epoch=epoch, accuracy={str(k): value for k, value in accuracy.items()}
        )
        report.evaluation(epoch, self.config.epochs, accuracy)
        return accuracy

    def _final_accuracy(self) -> dict[Level, float]:
        """Accuracies of a run that was already complete when `fit` was called."""
        return {} if self.eval_loader is None else self.evaluate()

    def _save(self) -> None:
        if self.checkpoint_path is None:
            return
        with self.clock("checkpoint"):
            checkpoint.save(self.checkpoint_path, self._state())

    def _state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "config": self.config.to_dict(),
            "steps_per_epoch": self.steps_per_epoch,
            "precisions": list(precisions(self.model)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": vars(self.position),
            "rng": checkpoint.rng_state(),
            "noise": noise_state(self.model),
            "metrics": self.log.position(),
        }

    def _restore(self) -> dict[str, Any] | None:
        """Load the checkpoint if there is one; returns the state of the random generators."""
        path = self.checkpoint_path
        if path is None or not path.exists():
            return None
        state = checkpoint.load(path)
        self._check_same_run(path, state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        load_noise_state_(self.model, state.get("noise", {}))
        self.position = Position(**state["position"])
        self.log.cut(state["metrics"])
        return cast(dict[str, Any], state["rng"])

    def _check_same_run(self, path: Path, state: dict[str, Any]) -> None:
        changes = differences(state["config"], self.config.to_dict())
        if state["steps_per_epoch"] != self.steps_per_epoch:
            changes.append(f"steps an epoch: {state['steps_per_epoch']} saved, {self.steps_per_epoch} now")
        if state["precisions"] != list(precisions(self.model)):
            changes.append(f"precisions: {state['precisions']} saved, {list(precisions(self.model))} now")
        mine, saved = self.model.state_dict(), state["model"]
        odd = sorted(k for k in set(mine) | set(saved) if _shape(mine.get(k)) != _shape(saved.get(k)))
        if odd:
            changes.append(f"network: {len(odd)} entries differ, the first is {odd[0]}")
        if changes:
            raise checkpoint.CheckpointError(
                f"checkpoint {path} belongs to another run ({'; '.join(changes)}); "
                "use another output directory, or start over with resume=False"
            )


class IterableSource:
    """Makes a plain sized iterable of batches repeatable: generators are seeded at the start of each epoch.

    Skipped batches are drawn and thrown away, so whatever the iterable draws from the global generators repeats.
    """

    def __init__(self, batches: Iterable[Batch], seed: int) -> None:
        if not hasattr(batches, "__len__"):
            raise TypeError(f"Trainer: a loader needs a length, {type(batches).__name__} has none")
        self.batches = batches
        self.seed = seed

    def __len__(self) -> int:
        return len(cast(Any, self.batches))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of `epoch` from `start_step` on."""
        checkpoint.seed_all(self.seed * 1_000_003 + epoch)
        iterator = iter(self.batches)
        for _ in range(start_step):
            next(iterator)
        return iterator


def as_source(loader: BatchSource | Iterable[Batch], seed: int) -> BatchSource:
    """`loader` itself if it can start an epoch anywhere, otherwise a wrapper that can."""
    return cast(BatchSource, loader) if hasattr(loader, "epoch") else IterableSource(cast(Any, loader), seed)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value is not None
