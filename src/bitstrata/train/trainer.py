"""The training loop: one stage, float or quantized, that can be stopped anywhere and resumed exactly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from bitstrata.fused import fuse
from bitstrata.train import checkpoint, snapshot
from bitstrata.train.callback import Callback, Callbacks, Moment
from bitstrata.train.config import Level, TrainConfig
from bitstrata.train.distributed import Distributed, refuse_distributed
from bitstrata.train.evaluate import accuracies, count_correct, place
from bitstrata.train.guard import Guard
from bitstrata.train.keeper import Keeper
from bitstrata.train.lock import DirectoryLock
from bitstrata.train.metrics import MetricsLog
from bitstrata.train.objective import FollowsSteps, Objective, default_objective, make_optimizer
from bitstrata.train.progress import Reporter, quiet, reporter
from bitstrata.train.schedule import lr_factor_of
from bitstrata.train.signals import StopEvaluationError, StopRequest, TrainingStopped
from bitstrata.train.source import Batch, BatchSource, as_source, identity
from bitstrata.train.state import (
    Parts,
    Position,
    capture,
    check_same_execution,
    check_same_run,
    randomness,
    restore,
    set_randomness,
)
from bitstrata.train.tensorboard import TensorBoardLog
from bitstrata.train.tensorboard import require as require_tensorboard
from bitstrata.train.timing import Clock

if TYPE_CHECKING:
    from accelerate import Accelerator


class Trainer:
    """Trains a network at every precision it has, or as a float network if it is not quantized.

        trainer = Trainer(model, TrainConfig(epochs=5, lr=0.02), train_loader, test_loader, out_dir="runs/x")
        trainer.fit()          # re-running the same lines after an interruption continues bit for bit
        trainer.evaluate()     # {1: 0.64, 2: 0.77, ...} or {"float": 0.81}

    train_loader, eval_loader: `bitstrata.data.Loader`, or any sized iterable of (float images (N, C, H, W), int64
    labels (N,)), such as torch's DataLoader without worker processes. objective: replaces `joint_backward` (or the
    plain loss, for a float network) with everything the configuration says of it. teacher: a network of its own that
    all precisions learn from, in the place of a wider precision; it is not trained and not saved, so a resumed run
    has to be given the same one. out_dir: holds checkpoints (NAME.ckpt is the last one), metrics.jsonl and, for a
    quantized network, NAME.layers.json (grids and weight histograms as of the last epoch); None writes nothing.
    reporter: `bitstrata.train.reporter`, which shows progress on stderr, `quiet`, or a function of (name, total steps,
    steps done) that returns a `Reporter`. tensorboard: directory for TensorBoard's events, in a subdirectory NAME;
    ModuleNotFoundError without tensorboard. callbacks: look on between steps, see `Callback`. accelerator: of
    accelerate; by default one is made where torchrun or accelerate has launched several processes. Each of these then
    runs the same lines and takes its share of the loader's batches, which are of batch_size on each; statistics are of
    the joined batch, and the first alone writes files.

    Raises ValueError for options that exclude each other; FuseError with fused=True for a network with nothing to fuse.
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
        accelerator: Accelerator | None = None,
        tensorboard: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        refuse_distributed(model)
        self.ranks = Distributed(accelerator)
        self.model = model
        self.config = config
        self.name = name
        self.train_loader = as_source(self.ranks.share(train_loader, config.seed), config.seed)
        self.eval_loader = eval_loader
        self.steps_per_epoch = len(self.train_loader)
        if self.steps_per_epoch < 1:
            raise ValueError("Trainer: train_loader has no batches")
        self.out_dir = None if out_dir is None else Path(out_dir)
        if objective is not None and teacher is not None:
            raise ValueError("Trainer: give either an objective or a teacher; an objective brings its own teacher")
        self.objective = objective or default_objective(model, config, teacher)
        # Kept apart, so that it is told the step although something is wrapped around `objective` later.
        self._follower = self.objective if isinstance(self.objective, FollowsSteps) else None
        self.reporter = reporter if self.ranks.is_first else quiet
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.wrapped = self._stepping(model)
        self.device = next(model.parameters()).device
        if teacher is not None and self.ranks.accelerator is not None:
            teacher.to(self.device)
        self.optimizer = make_optimizer(model, config)
        self.position = Position()
        source = {**identity(self.train_loader), "ranks": str(self.ranks.size)}
        self.parts = Parts(model, self.optimizer, config, source, self.device)
        self.keeper = None if self.out_dir is None else Keeper(self.out_dir, name, config.keep)
        self.guard = Guard(model, config)
        self.stop = StopRequest()
        writes = self.ranks.is_first and self.out_dir is not None
        self.log = MetricsLog(cast(Path, self.out_dir) / "metrics.jsonl" if writes else None, name)
        self.clock = Clock()
        self.callbacks = Callbacks(callbacks)
        self.tensorboard = None if tensorboard is None else Path(tensorboard)
        if self.tensorboard is not None:
            require_tensorboard()

    def _stepping(self, model: nn.Module) -> nn.Module:
        """What training steps run: the network itself, fused, or shared out over ranks."""
        if not self.config.fused:
            return self.ranks.wrap(model)
        if self.ranks.accelerator is not None:
            raise ValueError("Trainer: fused=True runs in one process, without accelerate or torchrun")
        return fuse(model)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def checkpoint_path(self) -> Path | None:
        """Where this stage keeps its last checkpoint; older ones and the best one lie beside it, see `Keeper`."""
        return None if self.keeper is None else self.keeper.last

    def fit(self, resume: bool = True, *, allow_inexact: bool = False) -> dict[Level, float]:
        """Train to the end; returns the accuracies of the last evaluation (empty without an eval_loader).

        resume: continue from the last whole checkpoint in out_dir if there is one; False deletes them and starts over.
        A finished run is not repeated. allow_inexact: continue under other threads, instruction sets or versions than
        those of the checkpoint, with a warning, although the result will not be the same to the bit.

        In the main thread, SIGTERM or Ctrl-C ends the run after the step in progress with a checkpoint; a second Ctrl-C
        ends it at once.

        Raises:
            CheckpointError: the checkpoint belongs to another configuration, recipe or network, or to other conditions;
                or all checkpoints are damaged; or one cannot be written.
            DirectoryInUseError: another process trains in out_dir.
            FloatingPointError: a loss or gradient stops being finite (with on_nonfinite="skip", nonfinite_limit times
                in a row), or a step size has exploded. The weights are those before the step.
            TrainingStopped: a signal asked for it; a SystemExit with code 0, so that left alone it ends the process.
        """
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        with self.ranks.synchronized(self.model), ExitStack() as held:
            if self.out_dir is not None:
                self.ranks.from_first(held.enter_context(DirectoryLock(self.out_dir)).take)
            return self._fit(resume, allow_inexact)

    def _fit(self, resume: bool, allow_inexact: bool) -> dict[Level, float]:
        self.callbacks.begin(self.model, self.objective)
        random = self._begin(resume, allow_inexact)
        self.guard = Guard(self.model, self.config)
        accuracy: dict[Level, float] = {}
        with StopRequest() as self.stop, self._shown() as report:
            while self.position.epochs < self.config.epochs:
                accuracy = self._epoch(report, random)
                random = None
        if random is not None:  # the run was complete already
            accuracy = {} if self.eval_loader is None else self.evaluate()
            set_randomness(self.model, random)
        self._stop_if_requested()
        return accuracy

    @contextmanager
    def _shown(self) -> Iterator[Reporter]:
        """The run's progress reporter, with TensorBoard's events and the clock in forward passes beside it."""
        self.clock.lap()
        with ExitStack() as stack:
            stack.enter_context(self.clock.forward_of(self.wrapped if self.config.fused else self.model))
            if self.tensorboard is not None and self.ranks.is_first:
                stack.enter_context(self.log.also(TensorBoardLog(self.tensorboard, self.name, self.position.step)))
            yield stack.enter_context(self.reporter(self.name, self.total_steps, self.position.step))

    def evaluate(self, levels: tuple[int, ...] | None = None) -> dict[Level, float]:
        """Top-1 accuracy on eval_loader, a fraction for each of `levels`, by default what the configuration trains.

        Every rank counts its share of the batches, and all must call this. Raises ValueError without an eval_loader.
        """
        if self.eval_loader is None:
            raise ValueError("Trainer.evaluate: the trainer was made without an eval_loader")
        return self._evaluation(self.eval_loader, levels, lambda batches: batches)

    def _evaluation(
        self,
        loader: BatchSource | Iterable[Batch],
        levels: tuple[int, ...] | None,
        watch: Callable[[Iterable[Batch]], Iterable[Batch]],
    ) -> dict[Level, float]:
        wanted = self.config.precisions if levels is None else levels
        correct, seen = count_correct(
            self.model,
            watch(self.ranks.every(loader)),
            wanted,
            amp=self.config.amp,
            channels_last=self.config.channels_last,
        )
        *hits, images = self.ranks.sums([*correct.values(), seen])
        return accuracies(dict(zip(correct, hits, strict=True)), images)

    def _begin(self, resume: bool, allow_inexact: bool) -> dict[str, Any] | None:
        """Start over, or take up the last whole checkpoint; returns the random state to continue with."""
        keeper = self.keeper
        found = None if keeper is None else self.ranks.from_first(lambda: _open(keeper, resume))
        if found is None:
            self.log.drop_run()
            checkpoint.seed_all(self.ranks.seed(self.config.seed))
            self.ranks.own_noise_(self.model)
            return None
        state, path = found
        check_same_run(self.parts, path, state)
        check_same_execution(self.parts, path, state, allow_inexact)
        self.position = restore(self.parts, state)
        self.callbacks.take_from(state)
        self.ranks.from_first(lambda: self.log.cut(state["metrics"]))
        return cast(dict[str, Any], self.ranks.mine(state["random"]))

    def _epoch(self, report: Reporter, random: dict[str, Any] | None) -> dict[Level, float]:
        """The rest of the current epoch, its evaluation and its checkpoint."""
        epoch = self.position.epochs
        start = self.position.step - epoch * self.steps_per_epoch
        if start < self.steps_per_epoch:
            self._steps(report, epoch, start, random)
        elif random is not None:
            set_randomness(self.model, random)
        accuracy = self._epoch_evaluation(report, epoch)
        self._log_epoch(epoch, self.position.step - epoch * self.steps_per_epoch - start)
        self.position.epochs += 1
        self._save(best=self.position.improves(accuracy, self.config.best))
        self._stop_if_requested()
        return accuracy

    def _log_epoch(self, epoch: int, steps: int) -> None:
        """Step sizes and layers as they are now, and where the time went since the last such line."""
        step = self.position.step
        with self.clock("logging"):
            grids = snapshot.steps(self.model) if self.ranks.is_first else {}
            if grids:
                self.log.write("grids", step=step, epoch=epoch, layers=grids)
            if self.out_dir is not None and self.ranks.is_first:
                snapshot.write(self.out_dir / f"{self.name}.layers.json", self.model, step=step, epoch=epoch)
        wall, seconds = self.clock.lap()
        parts = {part: round(value, 4) for part, value in seconds.items()}
        self.log.write("time", step=step, epoch=epoch, steps=steps, wall=round(wall, 4), seconds=parts)

    def _steps(self, report: Reporter, epoch: int, start: int, random: dict[str, Any] | None) -> None:
        """Training steps from `start` to the end of the epoch."""
        self.wrapped.train()
        if random is not None and start == 0:
            set_randomness(self.model, random)
        with self.clock("data"):
            batches = iter(self.train_loader.epoch(epoch, start))
        if random is not None and start > 0:  # after the batches before it were drawn once more
            set_randomness(self.model, random)
        begun, images_before = time.monotonic(), self.position.images
        for images, labels in self.clock.each("data", batches):
            seen = self.position.images
            self._look(images, labels)
            losses = self._step(images, labels)
            step = self.position.step
            if step == self.total_steps:
                self._look(images, labels)
            with self.clock("logging"):
                images_seen, accuracy = self.position.images - seen, self.position.accuracy()
                report.step(step, epoch, images_seen, losses, lr=self._lr(), accuracy=accuracy)
                if losses and step % self.config.log_every == 0:
                    self._log_step(epoch, losses)
            if step == (epoch + 1) * self.steps_per_epoch:
                continue  # the checkpoint follows the evaluation
            every, self.stop.requested = self.config.checkpoint_every, self.ranks.agreed(self.stop.requested)
            if self.stop.requested or (every and step % every == 0):
                self._save()
                self._stop_if_requested()
        if self.position.step != (epoch + 1) * self.steps_per_epoch:
            done = self.position.step - epoch * self.steps_per_epoch
            raise RuntimeError(f"Trainer: epoch {epoch} gave {done} batches, len(loader) says {self.steps_per_epoch}")
        rate = (self.position.images - images_before) / max(time.monotonic() - begun, 1e-9)
        means = self.position.means()
        self.log.write("epoch", step=self.position.step, epoch=epoch, images_per_s=round(rate, 1), **means)

    def _look(self, images: Tensor, labels: Tensor) -> None:
        """Callbacks that are due, on the first rank."""
        at = self.position.step, self.position.epochs, self.total_steps
        wanted = self.callbacks.due(at[0], at[2]) if self.ranks.is_first else []
        if wanted:
            with self.clock("diagnosis"), self.ranks.alone(self.model):
                inputs = place(images, self.device, self.config.channels_last)
                write = partial(self.log.write, step=at[0], epoch=at[1])
                moment = Moment(self.model, inputs, labels.to(self.device), *at, self.objective, write)
                for callback in wanted:
                    callback.look(moment)

    def _step(self, images: Tensor, labels: Tensor) -> dict[Level, float]:
        """One optimizer step; its losses, or {} where it was left out. Only finite numbers get to the weights."""
        factor = lr_factor_of(self.config, self.position.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        inputs = place(images, self.device, self.config.channels_last)
        targets = labels.to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        if self._follower is not None:
            self._follower.at_step(self.position.step)
        self.guard.before()
        losses: dict[Level, float] = {}
        try:
            with self.clock("backward"):
                results = self.objective(self.wrapped, inputs, targets)
            with self.clock("logging"):
                losses, hits, count = self.ranks.joined(results, targets)
            with self.clock("optimizer"):
                problem = self.guard.problem(losses)
        except (FloatingPointError, ValueError) as error:
            self._not_finite(inputs, targets, str(error), error)
            return {}
        if problem:
            self._not_finite(inputs, targets, problem)
            return {}
        with self.clock("optimizer"):
            self.optimizer.step()
        self.position.add(losses, hits, count)
        return losses

    def _lr(self) -> float:
        """The learning rate of the step that was made last."""
        return self.config.lr * lr_factor_of(self.config, self.position.step - 1, self.steps_per_epoch)

    def _not_finite(self, inputs: Tensor, targets: Tensor, problem: str, error: Exception | None = None) -> None:
        """Leave the step out, or raise FloatingPointError that says where it went wrong."""
        with self.ranks.alone(self.model):  # what is not finite may be on one rank only
            origin = self.guard.origin(inputs, lambda: self.objective(self.model, inputs, targets))
        if isinstance(error, ValueError) and not origin:
            raise error  # it is about something else
        self.guard.undo()
        step, config = self.position.step, self.config
        message = f"{problem}; {origin}" if origin else problem
        if config.on_nonfinite == "skip" and self.position.in_a_row + 1 < config.nonfinite_limit:
            self.position.skip()
            self.log.write("skipped", step=self.position.step, epoch=self.position.epochs, reason=message)
            return
        times = f" ({config.nonfinite_limit} in a row)" if config.on_nonfinite == "skip" else ""
        raise FloatingPointError(f"Trainer: step {step}{times}: {message}; {self.guard.advice}") from error

    def _log_step(self, epoch: int, losses: Mapping[Level, float]) -> None:
        self.guard.check_steps(self.position.step)
        loss = {str(level): value for level, value in losses.items()}
        self.log.write("step", step=self.position.step, epoch=epoch, lr=self._lr(), loss=loss)

    def _epoch_evaluation(self, report: Reporter, epoch: int) -> dict[Level, float]:
        every, last = self.config.eval_every, epoch + 1 == self.config.epochs
        if self.eval_loader is None or not (last or (every and (epoch + 1) % every == 0)):
            return {}
        before = randomness(self.model)  # an evaluation that is broken off is done again from its start
        try:
            with self.clock("evaluation"):
                accuracy = self._evaluation(self.eval_loader, None, self.ranks.breaking_off(self.stop.watching))
        except StopEvaluationError:
            set_randomness(self.model, before)
            self._save()
            self._stop_if_requested()
            raise
        self.log.write(
            "eval", step=self.position.step, epoch=epoch, accuracy={str(k): value for k, value in accuracy.items()}
        )
        report.evaluation(epoch, self.config.epochs, accuracy)
        return accuracy

    def _save(self, best: bool = False) -> None:
        """Write a checkpoint, of weights that can still be trained on."""
        if self.keeper is not None:
            self.guard.check_steps(self.position.step)
            self.guard.check_weights(self.position.step)
            state, keeper = capture(self.parts, self.position, self.log.position()), self.keeper
            state["random"] = self.ranks.of_all(state["random"])
            self.callbacks.add_to(state)
            with self.clock("checkpoint"):
                self.ranks.from_first(lambda: keeper.save(state, best))

    def _stop_if_requested(self) -> None:
        self.stop.requested = self.ranks.agreed(self.stop.requested)
        if self.stop.requested:
            self._stopped()

    def _stopped(self) -> NoReturn:
        done = f"{self.stop.requested}: {self.name} stopped after step {self.position.step} of {self.total_steps}"
        if self.keeper is None:
            raise TrainingStopped(f"{done}; nothing was saved, as the trainer has no out_dir")
        raise TrainingStopped(f"{done}, saved in {self.keeper.last}; run the same again to continue")


def _open(keeper: Keeper, resume: bool) -> tuple[dict[str, Any], Path] | None:
    """The last whole checkpoint, if there is one and the run is to go on."""
    keeper.directory.mkdir(parents=True, exist_ok=True)
    if not resume:
        keeper.clear()
    return keeper.load()
