"""Where the time of training goes, measured as it runs: two clock readings a part."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

#: What an epoch consists of. "backward" is all of a step's loss and gradients but for the network's forward passes;
#: "diagnosis" is what callbacks take.
PARTS = ("data", "forward", "backward", "optimizer", "evaluation", "checkpoint", "logging", "diagnosis")


class Clock:
    """Adds up seconds of wall time by part; a part inside another interrupts it, so no second counts twice.

    The clock is the host's. On a device that works asynchronously, the wait for its results counts where the host
    waits: with "logging", which reads the losses.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[str] = []
        self._begun = self._last = time.perf_counter()

    def __call__(self, part: str) -> _Part:
        """A context whose seconds belong to `part`. KeyError for a name that is none of PARTS."""
        return _Part(self, part)

    def each(self, part: str, items: Iterable[T]) -> Iterator[T]:
        """The items; waiting for each of them belongs to `part`."""
        iterator = iter(items)
        while True:
            with self(part):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    @contextmanager
    def forward_of(self, model: nn.Module) -> Iterator[None]:
        """While this is open, the model's forward passes inside "backward" count as "forward"."""
        handles = (
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def lap(self) -> tuple[float, dict[str, float]]:
        """Wall seconds since the last lap and the seconds of each part; both start again at zero."""
        now = time.perf_counter()
        self._add(now)
        wall, seconds = now - self._begun, self.seconds
        self._begun, self.seconds = now, dict.fromkeys(PARTS, 0.0)
        return wall, seconds

    def enter(self, part: str) -> int:
        """Begin `part`; returns what `leave` needs."""
        self._add(time.perf_counter())
        self._open.append(part)
        return len(self._open)

    def leave(self, depth: int) -> None:
        """End the part that `enter` gave `depth` for, with whatever an exception left open inside it."""
        self._add(time.perf_counter())
        del self._open[depth - 1 :]

    def _add(self, now: float) -> None:
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now

    def _before_forward(self, *_: Any) -> None:
        if self._open and self._open[-1] == "backward":
            self.enter("forward")

    def _after_forward(self, *_: Any) -> None:
        if self._open and self._open[-1] == "forward":
            self.leave(len(self._open))


class _Part:
    """The context that `Clock.__call__` returns."""

    __slots__ = ("clock", "depth", "part")

    def __init__(self, clock: Clock, part: str) -> None:
        if part not in clock.seconds:
            raise KeyError(f"Clock: no part {part!r}; there are: {', '.join(PARTS)}")
        self.clock, self.part, self.depth = clock, part, 0

    def __enter__(self) -> None:
        self.depth = self.clock.enter(self.part)

    def __exit__(self, *_: object) -> None:
        self.clock.leave(self.depth)
