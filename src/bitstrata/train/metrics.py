"""The metrics file: JSON lines, one an event, cut back on resume so that no step appears twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

#: What a repeated run does not repeat: events of this name, and these fields of the others.
TIMES, RATES = "time", frozenset({"images_per_s", "ms"})


class EventSink(Protocol):
    """Another reader of events, such as `TensorBoardLog`."""

    def write(self, event: str, **fields: Any) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """Appends events to a file shared by the stages of a run; each line carries the stage's name under "run".

    Lines: {"run", "event", "step", "epoch", ...}. Losses and accuracies are objects keyed by precision ("float" for a
    float network); accuracies are fractions. Events:

    =========  =========================================================================================================
    step       "lr", "loss" of one step, every `log_every` steps
    epoch      "loss", "accuracy" on the training batches, "images_per_s"
    eval       "accuracy" on the evaluation data
    grids      "layers": layer -> precision -> step sizes (`snapshot.steps`), at the end of an epoch
    time       "wall" seconds since the line before, "seconds" of each part (`timing.PARTS`) and the training "steps"
               they are of. A checkpoint that is written after the line counts in the next one.
    diagnosis  of `bitstrata.diagnostics.Live`, which has its fields: "layers", "whole", "since", "ms"
    =========  =========================================================================================================
    """

    def __init__(self, path: Path | None, run: str) -> None:
        """`path` None discards everything, for training without files."""
        self.path = path
        self.run = run
        self._sinks: list[EventSink] = []

    @contextmanager
    def also(self, sink: EventSink) -> Iterator[None]:
        """Pass events on to `sink` too while this is open, then close it."""
        self._sinks.append(sink)
        try:
            yield
        finally:
            self._sinks.remove(sink)
            sink.close()

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. Values must be JSON values; NaN is refused rather than written as invalid JSON.

        Raises ValueError for such values, and OSError naming the file.
        """
        for sink in self._sinks:
            sink.write(event, **fields)
        if self.path is None:
            return
        line = json.dumps({"run": self.run, "event": event, **fields}, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:  # its own message lacks the file where the disk is full
            raise OSError(
                error.errno, f"{error.strerror}: metrics file cannot be written, checkpoints are intact", str(self.path)
            ) from error

    def position(self) -> int:
        """Bytes of the file now, on disk; a checkpoint stores this number."""
        if self.path is None or not self.path.exists():
            return 0
        with self.path.open("rb") as stream:
            os.fsync(stream.fileno())
            return os.fstat(stream.fileno()).st_size

    def cut(self, position: int) -> None:
        """Drop this stage's lines after `position` bytes: events of steps that the resumed run will do again.

        Lines of later stages stay: a finished stage that is opened again must not take them away.
        """
        if self.path is None or position == self.position():
            return
        if position > self.position():
            raise ValueError(
                f"metrics file {self.path}: {self.position()} bytes, but the checkpoint was taken at {position}; "
                "put the file back or start the run anew"
            )
        self._keep_others(self.path, position)

    def drop_run(self) -> None:
        """Drop all of this stage's lines, for a stage that starts over."""
        if self.path is not None and self.path.exists():
            self._keep_others(self.path, 0)

    def _keep_others(self, path: Path, position: int) -> None:
        """After `position`, keep whole lines of other stages only; a crash may have left the last line incomplete."""
        content = path.read_bytes()
        lines = [line for line in content[position:].splitlines(keepends=True) if line.endswith(b"\n")]
        kept = content[:position] + b"".join(line for line in lines if json.loads(line)["run"] != self.run)
        if kept != content:
            temporary = path.with_name(path.name + ".tmp")
            with temporary.open("wb") as stream:
                stream.write(kept)
                stream.flush()
                os.fsync(stream.fileno())  # a rename that reaches the disk before the content would lose the record
            os.replace(temporary, path)


def read(path: Path, run: str | None = None) -> list[dict[str, Any]]:
    """All events of a metrics file, or those of one stage."""
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [event for event in events if run is None or event["run"] == run]


def reproducible(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events without measured times: what an interrupted run and an uninterrupted one have in common."""
    return [{k: v for k, v in event.items() if k not in RATES} for event in events if event["event"] != TIMES]
