"""Run directories as the report reads them: whatever is there and whole, and a remark about what is not."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Number = int | float
Point = tuple[float, float]

#: Options that do not make two runs different in what they are: places, display, how often files are written.
INCIDENTAL = frozenset(
    {
        "out",
        "root",
        "threads",
        "checkpoint_every",
        "log_every",
        "eval_every",
        "fresh",
        "isa",
        "quiet",
        "tensorboard",
        "seed",
        "keep",
        "on_nonfinite",
        "allow_inexact",
        "diagnose",
        "diagnose_every",
    }
)


@dataclass(frozen=True)
class Stage:
    """A part of a run: its events, in order, and `before`, the epochs of the stages before it."""

    name: str
    before: int
    events: tuple[Mapping[str, Any], ...]

    def of(self, event: str) -> list[Mapping[str, Any]]:
        """Events of one kind."""
        return [e for e in self.events if e["event"] == event]

    @property
    def epochs(self) -> int:
        """Epochs that were begun."""
        return max((int(e["epoch"]) + 1 for e in self.events), default=0)

    @property
    def epoch_steps(self) -> float:
        """Steps an epoch, as far as the events tell."""
        ends = [e["step"] / (e["epoch"] + 1) for e in self.of("epoch")]
        return ends[-1] if ends else float(max((e["step"] for e in self.events), default=1))

    def position(self, event: Mapping[str, Any]) -> float:
        """Where an event lies on the axis of epochs of the whole run."""
        return self.before + float(event["step"]) / max(self.epoch_steps, 1.0)

    def series(self, event: str, field_name: str) -> dict[str, list[Point]]:
        """Level -> (epochs of the whole run, value), of a field that is keyed by level; "a.b" is field b of field a."""
        found: dict[str, list[Point]] = {}
        for e in self.of(event):
            of_levels: Mapping[str, Any] = e
            for part in field_name.split("."):
                of_levels = of_levels.get(part, {})
            for level, value in of_levels.items():
                found.setdefault(level, []).append((self.position(e), value))
        return found


@dataclass
class Run:
    """One run directory. Everything is optional; `problems` says in words what could not be read."""

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def artifact(self) -> Path | None:
        """The packed network, if there is one."""
        path = self.path / "model.strata"
        return path if path.is_dir() else None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Result rows, narrowest precision first."""
        return sorted(self.results.get("rows", []), key=lambda row: row["bits"])

    @property
    def stages(self) -> list[Stage]:
        """Stages in the order in which they began."""
        names = list(dict.fromkeys(event["run"] for event in self.events))
        stages: list[Stage] = []
        for name in names:
            mine = tuple(event for event in self.events if event["run"] == name)
            before = stages[-1].before + stages[-1].epochs if stages else 0
            stages.append(Stage(name, before, mine))
        return stages

    @property
    def complete(self) -> bool:
        """Whether the run has come to its results."""
        return bool(self.rows)

    @property
    def state(self) -> str:
        """How far it came, in words."""
        if self.complete:
            return "complete" if "no_artifact" not in self.results else "complete, without an artifact"
        if not self.events:
            return "nothing recorded yet" if self.config else "empty"
        last = self.stages[-1]
        planned = self.config.get({"float": "float_epochs", "joint": "epochs"}.get(last.name, ""))
        of = f" of {planned}" if isinstance(planned, int) else ""
        return f"unfinished: {len(last.of('epoch'))}{of} epochs of stage {last.name} done"

    @property
    def same(self) -> str:
        """Equal for runs that differ in nothing but the seed; runs without a configuration are like no other."""
        kept = {k: v for k, v in self.config.items() if k not in INCIDENTAL}
        return json.dumps(kept, sort_keys=True) if kept else f"path {self.path}"


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    label: str
    runs: tuple[Run, ...]


def read(path: str | os.PathLike[str]) -> Run:
    """Read a run directory. Raises OSError if it is none or may not be read; what is in it may be in any state."""
    directory = Path(path)
    if not directory.exists():
        raise FileNotFoundError(f"report: {directory} does not exist")
    if not directory.is_dir():
        raise NotADirectoryError(f"report: {directory} is not a directory; give the directory of a run")
    try:
        list(directory.iterdir())
    except PermissionError as error:
        raise PermissionError(f"report: {directory} may not be read") from error
    run = Run(directory, directory.resolve().name)
    run.config = _object(directory / "config.json", run.problems)
    run.results = _results(directory / "results.json", run.problems)
    run.events = _events(directory / "metrics.jsonl", run.problems)
    for file in sorted(directory.glob("*.layers.json")):
        found = _object(file, run.problems)
        if found:
            run.layers[file.name.removesuffix(".layers.json")] = found
    return run


def read_all(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Read several; names that would be the same are made longer. Raises ValueError if there are none."""
    runs = [read(path) for path in dict.fromkeys(Path(path) for path in paths)]
    if not runs:
        raise ValueError("report: name at least one run directory")
    for run in runs:
        parts = run.path.resolve().parts
        length = 1
        while length < len(parts) and any(
            r is not run and r.path.resolve().parts[-length:] == parts[-length:] for r in runs
        ):
            length += 1
        run.name = "/".join(parts[-length:])
    return runs


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by what they are, in the order given."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.same, []).append(run)
    return [Group(_label(members), tuple(members)) for members in found.values()]


def _label(runs: Sequence[Run]) -> str:
    """A run's name, or what the names have in common."""
    if len(runs) == 1:
        return runs[0].name
    letters = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*(run.name for run in runs), strict=False))
    prefix = "".join(column[0] for column in letters).rstrip("-_. /").removesuffix("seed").rstrip("-_. /")
    what = "seeds" if len({run.config.get("seed") for run in runs}) == len(runs) else "runs"
    return f"{prefix}, {len(runs)} {what}" if prefix else f"{runs[0].name} and {len(runs) - 1} more {what}"


def side_file(run: Run, name: str) -> dict[str, Any] | None:
    """An object that another command has left in the run's directory; None if it is not there or not whole."""
    return _object(run.path / name, []) or None


def is_number(value: object) -> bool:
    """A finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    value = _json(path, problems)
    if value is not None and not isinstance(value, dict):
        problems.append(f"{path.name} is not an object, but {type(value).__name__}")
    return value if isinstance(value, dict) else {}


def _results(path: Path, problems: list[str]) -> dict[str, Any]:
    """results.json, with those rows only that are rows; the demo's file is a list of them."""
    value = _json(path, problems)
    if value is None:
        return {}
    found = {"rows": value} if isinstance(value, list) else value
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list):
        problems.append(f"{path.name} has no rows of results")
        return {}
    kept = [row for row in rows if isinstance(row, dict) and is_number(row.get("bits"))]
    if len(kept) < len(rows):
        problems.append(f"{path.name}: {len(rows) - len(kept)} of {len(rows)} rows are not results")
    return {**found, "rows": kept}


def _json(path: Path, problems: list[str]) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return None


def _events(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Whole, well-formed lines of metrics.jsonl; others are counted."""
    if not path.is_file():
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return []
    events = [event for line in lines if (event := _event(line)) is not None]
    if len(events) < len(lines):
        problems.append(
            f"{path.name}: {len(lines) - len(events)} of {len(lines)} lines cannot be read and are left out"
        )
    return events


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not all(isinstance(event.get(key), str) for key in ("run", "event")):
        return None
    if not all(is_number(event.get(key)) and event[key] >= 0 for key in ("step", "epoch")):
        return None
    for key in ("loss", "accuracy", "seconds"):
        values = event.get(key, {})
        if not isinstance(values, dict) or not all(is_number(value) for value in values.values()):
            return None
    return event if event["event"] != "diagnosis" or _diagnosed(event) else None


def _diagnosed(event: dict[str, Any]) -> bool:
    """Whether a `diagnosis` event has the tables of numbers that it should have, of two and of three levels."""
    return _numbers(event.get("whole"), 2) and _numbers(event.get("layers"), 3) and _numbers(event.get("ms", {}), 1)


def _numbers(value: object, depth: int) -> bool:
    if depth == 0:
        return is_number(value)
    return isinstance(value, dict) and all(_numbers(part, depth - 1) for part in value.values())
