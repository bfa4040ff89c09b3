"""What a person sees while a network trains: a live display on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from bitstrata.train.config import Level

NOTHING: Mapping[Level, float] = {}


class Reporter(Protocol):
    """Receives what happens; used as a context manager around the run."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def step(
        self,
        step: int,
        epoch: int,
        images: int,
        loss: Mapping[Level, float],
        *,
        lr: float | None = None,
        accuracy: Mapping[Level, float] = NOTHING,
    ) -> None:
        """`step` steps are done; the last one saw `images` images at learning rate `lr`.

        accuracy: on the training batches of the epoch so far, as fractions.
        """

    def evaluation(self, epoch: int, epochs: int, accuracy: Mapping[Level, float]) -> None:
        """Accuracies on the evaluation data after epoch `epoch` (from 0) of `epochs`, as fractions."""

    def note(self, text: str) -> None:
        """A line worth keeping."""


def reporter(name: str, total: int, start: int, *, stream: TextIO | None = None, every_s: float = 20.0) -> Reporter:
    """A live display when `stream` (default stderr) is a terminal, else plain lines, one every `every_s` seconds."""
    stream = stream or sys.stderr
    return (
        LiveReporter(name, total, start, stream)
        if stream.isatty()
        else PlainReporter(name, total, start, stream, every_s)
    )


def quiet(name: str, total: int, start: int) -> Reporter:
    """A reporter that shows nothing; the metrics file is written all the same."""
    return QuietReporter()


def widest_first(values: Iterable[Level]) -> list[Level]:
    """Precisions in the order in which they are shown."""
    return sorted(values, key=lambda level: -level if isinstance(level, int) else 0)


def named(level: Level) -> str:
    """'4b', or 'float'."""
    return f"{level}b" if isinstance(level, int) else level


def per_level(values: Mapping[Level, float], form: str) -> str:
    """'4b 1.20 2b 1.35', widest first; 'float' for a float network."""
    return "  ".join(f"{named(level)} {values[level]:{form}}" for level in widest_first(values))


def evaluated(epoch: int, epochs: int, accuracy: Mapping[Level, float]) -> str:
    """The line about an evaluation."""
    return f"epoch {epoch + 1}/{epochs}  accuracy {per_level(accuracy, '.2%')}"


class Rate:
    """Images a second, as an exponential mean over the last seconds."""

    def __init__(self, halflife_s: float = 5.0) -> None:
        self.halflife_s = halflife_s
        self.last = time.monotonic()
        self.images = 0.0
        self.seconds = 0.0

    def add(self, images: int) -> float:
        now = time.monotonic()
        elapsed, self.last = now - self.last, now
        decay = 0.5 ** (elapsed / self.halflife_s)
        self.images = self.images * decay + images
        self.seconds = self.seconds * decay + elapsed
        return self.images / max(self.seconds, 1e-9)


class QuietReporter:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, *_: object, **__: object) -> None:
        pass

    def evaluation(self, *_: object) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class PlainReporter:
    """Lines of text, for logs: the first step, then one every `every_s` seconds."""

    def __init__(self, name: str, total: int, start: int, stream: TextIO, every_s: float) -> None:
        self.name, self.total, self.start = name, total, start
        self.stream, self.every_s = stream, every_s
        self.rate = Rate()
        self.begun = time.monotonic()
        self.due = self.begun

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.flush()

    def step(
        self,
        step: int,
        epoch: int,
        images: int,
        loss: Mapping[Level, float],
        *,
        lr: float | None = None,
        accuracy: Mapping[Level, float] = NOTHING,
    ) -> None:
        rate = self.rate.add(images)
        now = time.monotonic()
        if now < self.due and step < self.total:
            return
        self.due = now + self.every_s
        left = (now - self.begun) / max(step - self.start, 1) * (self.total - step)
        parts = [f"step {step}/{self.total} epoch {epoch + 1}", f"loss {per_level(loss, '.3f')}"]
        if accuracy:
            parts.append(f"training accuracy {per_level(accuracy, '.1%')}")
        if lr is not None:
            parts.append(f"lr {lr:.3g}")
        self.note("  ".join([*parts, f"{rate:.0f} images/s", f"{left / 60:.1f} min left"]))

    def evaluation(self, epoch: int, epochs: int, accuracy: Mapping[Level, float]) -> None:
        self.note(evaluated(epoch, epochs, accuracy))

    def note(self, text: str) -> None:
        print(f"[{self.name}] {text}", file=self.stream, flush=True)


class _Display(Progress):
    """A progress bar with a row a precision under it; rows are made when the screen is refreshed, not every step."""

    loss: Mapping[Level, float] = NOTHING
    training: Mapping[Level, float] = NOTHING
    evaluation: Mapping[Level, float] = NOTHING

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.loss:
            yield self.levels()

    def levels(self) -> Table:
        """Loss of the last step, training accuracy of the epoch so far, accuracy of the last evaluation."""
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for column in ("precision", "loss", "training", "evaluation"):
            table.add_column(column, justify="right")
        for level in widest_first(self.loss):
            shares = [f"{by[level]:.2%}" if level in by else "-" for by in (self.training, self.evaluation)]
            table.add_row(named(level), f"{self.loss[level]:.4f}", *shares)
        return table


class LiveReporter:
    """A rich display: bar, epoch, throughput, learning rate, time left; loss and accuracies of every precision."""

    def __init__(self, name: str, total: int, start: int, stream: TextIO) -> None:
        self.rate = Rate()
        self.progress = _Display(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epoch {task.fields[epoch]}  {task.fields[rate]:.0f} images/s  {task.fields[lr]}"),
            TimeRemainingColumn(),
            console=Console(file=stream),
            refresh_per_second=4,
        )
        self.task: TaskID = self.progress.add_task(name, total=total, completed=start, epoch=1, rate=0.0, lr="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(
        self,
        step: int,
        epoch: int,
        images: int,
        loss: Mapping[Level, float],
        *,
        lr: float | None = None,
        accuracy: Mapping[Level, float] = NOTHING,
    ) -> None:
        self.progress.loss = {**self.progress.loss, **loss}  # not every step trains every precision
        self.progress.training = dict(accuracy)
        shown = "" if lr is None else f"lr {lr:.3g}"
        self.progress.update(self.task, completed=step, epoch=epoch + 1, rate=self.rate.add(images), lr=shown)

    def evaluation(self, epoch: int, epochs: int, accuracy: Mapping[Level, float]) -> None:
        self.progress.evaluation = dict(accuracy)
        self.note(evaluated(epoch, epochs, accuracy))

    def note(self, text: str) -> None:
        self.progress.console.print(text, highlight=False)
