"""Stopping on request: SIGTERM, or Ctrl-C once, ends a run after the step in progress, with everything saved."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ContextDecorator
from types import FrameType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class TrainingStopped(SystemExit):
    """A run has stopped on request and can go on; left alone, it ends the process with exit code 0.

    message: what was saved and how to continue; written to stderr, as a SystemExit is silent.
    """

    def __init__(self, message: str) -> None:
        super().__init__(0)
        self.message = message
        print(message, file=sys.stderr, flush=True)

    def __str__(self) -> str:
        return self.message


class StopEvaluationError(Exception):
    """Leaves an evaluation that a stop has been asked for."""


class _Handlers(ContextDecorator):
    """Puts a handler in the place of those of some signals, and those back after it; the main thread alone may."""

    def __init__(self, signals: tuple[signal.Signals, ...]) -> None:
        self.signals = signals
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.handle) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            # None: a handler that was not set from Python, and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.before = {}

    def handle(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StopRequest(_Handlers):
    """While entered, SIGTERM and the first SIGINT are remembered; a second SIGINT is a KeyboardInterrupt at once.

    requested: name of the signal that came, or "".
    """

    def __init__(self) -> None:
        super().__init__((signal.SIGTERM, signal.SIGINT))
        self.requested = ""

    def handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def watching(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, and StopEvaluationError in the place of the next one when a stop has been asked for."""
        for batch in batches:
            if self.requested:
                raise StopEvaluationError
            yield batch


class StopsAtOnce(_Handlers):
    """While entered, SIGTERM raises TrainingStopped: for work that is short and repeats, such as between stages."""

    def __init__(self, message: str) -> None:
        super().__init__((signal.SIGTERM,))
        self.message = message

    def handle(self, number: int, frame: FrameType | None) -> None:
        raise TrainingStopped(f"{signal.Signals(number).name}: {self.message}")
