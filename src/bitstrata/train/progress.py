"""What a person sees while a network trains: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bitstrata.train.config import Level


class Reporter(Protocol):
    """Receives what happens; used as a context manager around the run."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def step(self, step: int, epoch: int, images: int, loss: Mapping[Level, float]) -> None:
        """`step` steps are done; the last one saw `images` images."""

    def note(self, text: str) -> None:
        """A line worth keeping: an evaluation, the end of an epoch."""


def reporter(name: str, total: int, start: int, *, stream: TextIO | None = None, every_s: float = 20.0) -> Reporter:
    """A live bar when `stream` (default stderr) is a terminal, else plain lines, one every `every_s` seconds."""
    stream = stream or sys.stderr
    return (
        LiveReporter(name, total, start, stream)
        if stream.isatty()
        else PlainReporter(name, total, start, stream, every_s)
    )


def per_level(values: Mapping[Level, float], form: str) -> str:
    """'4b 1.20 2b 1.35', widest first; 'float' for a float network."""
    order = sorted(values, key=lambda level: -level if isinstance(level, int) else 0)
    return "  ".join(f"{f'{level}b' if isinstance(level, int) else level} {values[level]:{form}}" for level in order)


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

    def step(self, step: int, epoch: int, images: int, loss: Mapping[Level, float]) -> None:
        rate = self.rate.add(images)
        now = time.monotonic()
        if now < self.due and step < self.total:
            return
        self.due = now + self.every_s
        left = (now - self.begun) / max(step - self.start, 1) * (self.total - step)
        self.note(
            f"step {step}/{self.total} epoch {epoch + 1}  loss {per_level(loss, '.3f')}  "
            f"{rate:.0f} images/s  {left / 60:.1f} min left"
        )

    def note(self, text: str) -> None:
        print(f"[{self.name}] {text}", file=self.stream, flush=True)


class LiveReporter:
    """A rich progress bar with throughput, losses and the time left."""

    def __init__(self, name: str, total: int, start: int, stream: TextIO) -> None:
        self.rate = Rate()
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epoch {task.fields[epoch]}  {task.fields[rate]:.0f} images/s  loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=Console(file=stream),
            refresh_per_second=4,
        )
        self.task: TaskID = self.progress.add_task(name, total=total, completed=start, epoch=1, rate=0.0, loss="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, step: int, epoch: int, images: int, loss: Mapping[Level, float]) -> None:
        self.progress.update(
            self.task, completed=step, epoch=epoch + 1, rate=self.rate.add(images), loss=per_level(loss, ".3f")
        )

    def note(self, text: str) -> None:
        self.progress.console.print(text, highlight=False)
