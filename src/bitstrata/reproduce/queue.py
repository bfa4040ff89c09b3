"""Many runs: in order, resumable, and shared by processes that are started side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Row, Table, digest
from .execute import BusyError, FolderLock, execute, finished, torch_threads
from .record import Record

PAUSE_S = 2.0  # between looks at runs that another process has in hand


@dataclass(frozen=True)
class Job:
    """One run of one row."""

    table: Table
    row: Row
    seed: int

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration."""
        return self.row.run(self.seed)


class Queue:
    """Runs of tables. Any number of processes may work on the same queue: each run is made by one of them.

    An interrupted run goes on from its checkpoint; a finished one is not repeated, in whatever table it was asked for.

    Args:
        tables: in the order in which their runs are made; first seeds of all tables come before second seeds.
        root: folder of the data sets' files.
        runs: where runs are kept.
        record: finished runs and float networks that outlast `runs`.
        seeds: only these; None for all that the rows name.
        environment: JSON values kept with each result: "commit", "cpu" and "cores" get into results.csv.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        root: Path | None,
        runs: Path,
        *,
        record: Record | None = None,
        seeds: Container[int] | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        self.root = root
        self.runs = runs
        self.record = record or Record(None)
        self.environment = dict(environment or {})
        self.jobs = [job for job in _by_seed(tables) if seeds is None or job.seed in seeds]

    def missing(self) -> list[Job]:
        """Jobs that have no result yet."""
        return [job for job in self.jobs if not self._done(job)]

    def work(self, note: Callable[[str], None] = print, after: Callable[[Table], object] = lambda table: None) -> None:
        """Make all missing runs; returns when none is missing, whoever made it. after: called with a run's table.

        Raises:
            MissingDataError, CheckpointError: of the run in hand, which stays missing.
        """
        while missing := self.missing():
            made = 0
            for job in missing:
                if self._try(job, note):
                    made += 1
                    after(job.table)
            if not made:
                time.sleep(PAUSE_S)

    def _try(self, job: Job, note: Callable[[str], None]) -> bool:
        """Make one run unless another process has it in hand or has just made it."""
        folder = self.runs / digest(job.config)
        folder.mkdir(parents=True, exist_ok=True)
        with FolderLock(folder, wait=False) as lock:
            if not lock.held or self._done(job):
                return False
            torch_threads(job.config)
            begun = time.monotonic()
            try:
                values = execute(
                    job.config, self.root, self.runs, record=self.record, wait=False, environment=self.environment
                )
            except BusyError:
                return False
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items()) or self._diverged(job)
            note(
                f"{job.table.paper} {job.table.name}: {job.row.name}, seed {job.seed}: {shown} "
                f"({time.monotonic() - begun:.0f} s)"
            )
        return True

    def _diverged(self, job: Job) -> str:
        done = finished(job.config, self.runs, self.record) or {}
        return f"diverged: {done.get('diverged', 'without metrics')}"

    def _done(self, job: Job) -> bool:
        done = finished(job.config, self.runs, self.record)
        return done is not None and set(job.row.metrics) <= set(done["measured"])


def _by_seed(tables: Sequence[Table]) -> Iterator[Job]:
    for seed in sorted({s for table in tables for row in table.rows for s in row.seeds}):
        yield from (Job(table, row, seed) for table in tables for row in table.rows if seed in row.seeds)
