"""`bitstrata reproduce`: a paper's table, run again."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bitstrata.cli.common import CommandError, environment, need_training, output

if TYPE_CHECKING:
    from bitstrata.reproduce import Record, Table


@dataclass(frozen=True)
class Reproduce:
    """Run a paper's table again, or all of them: what is there already is kept, what was interrupted goes on.

    Give the command twice, in two shells, and both work on the same runs. Without a paper, lists the tables.
    """

    paper: Annotated[str | None, tyro.conf.Positional] = None
    """Folder of the paper under --recipes, such as uniq; `all` for every table."""
    table: Annotated[str | None, tyro.conf.Positional] = None
    """One table of the paper; all of them by default."""
    scale: Literal["smoke", "cpu", "paper"] = "smoke"
    """smoke: every code path in minutes. cpu: what two cores can train in hours. paper: the paper's own sizes."""
    root: Path | None = None
    """Directory that holds the data sets' files."""
    recipes: Path = Path("recipes")
    """Directory of the tables' files."""
    runs: Path = Path("runs/reproduce")
    """Directory where runs are kept; those of the scale cpu are also recorded in RECIPES/record."""
    seeds: tuple[int, ...] = ()
    """Only these of the seeds that rows name; all by default."""
    cost: bool = False
    """Measure what the runs would take, and run nothing."""
    page: bool = False
    """Write the paper's page from the results that are there, and run nothing."""

    def run(self) -> None:
        """Work through the queue; prints each run's numbers and writes results.csv."""
        need_training("reproduce", "matplotlib")
        from bitstrata import reproduce
        from bitstrata.train import keep_freed_memory

        if not self.recipes.is_dir():
            raise CommandError(f"reproduce: --recipes {self.recipes}: no such directory; tables come with the source")
        known = reproduce.tables(self.recipes)
        if self.paper is None:
            for pair in known:
                table = reproduce.load_table(self.recipes, *pair, self.scale)
                print(f"{pair[0]} {pair[1]}: {table.title} ({len(table.rows)} rows)")
            return
        chosen = [p for p in known if self.paper in ("all", p[0]) and self.table in (None, p[1])]
        if not chosen:
            listed = ", ".join(" ".join(p) for p in known)
            raise CommandError(f"reproduce: no table {self.paper} {self.table or ''}; there are: {listed}")
        if self.page:
            for paper in dict.fromkeys(p for p, _ in chosen):
                print(reproduce.write_page(self.recipes, paper))
            return
        tables = [reproduce.load_table(self.recipes, *pair, self.scale) for pair in chosen]
        keep_freed_memory()
        if self.cost:
            self._costs(tables)
            return
        queue = reproduce.Queue(
            tables, self.root, self.runs, record=self._record(), seeds=self.seeds or None, environment=environment()
        )
        queue.work(lambda text: print(text, flush=True), self._write)
        for table in tables:
            print(f"wrote {self._write(table)}", flush=True)

    def _write(self, table: Table) -> Path:
        from bitstrata import reproduce

        target = table.folder / "results.csv" if self.scale == "cpu" else self.runs / self._file(table)
        reproduce.write_results(target, reproduce.collect(table, self.runs, self._record()))
        return target

    def _record(self) -> Record:
        """Runs of the scale that is published are recorded beside the tables, those of the others nowhere."""
        from bitstrata.reproduce import Record

        return Record(self.recipes / "record" if self.scale == "cpu" else None)

    def _file(self, table: Table) -> str:
        return f"{table.paper}-{table.name}-{self.scale}.csv"

    def _costs(self, tables: list[Table]) -> None:
        from bitstrata import reproduce

        console, total = output(), 0.0
        shared: dict[str, float] = {}
        console.print("paper,table,row,seeds,hours,float_hours")
        for table in tables:
            for cost in reproduce.estimate(table, self.root):
                shared[cost.float_key] = max(shared.get(cost.float_key, 0.0), cost.float_seconds)
                total += cost.seconds
                hours = (f"{s / 3600:.3f}" for s in (cost.seconds, cost.float_seconds))
                console.print(_line(table.paper, table.name, cost.row, cost.seeds, *hours))
        floats = sum(shared.values())
        console.print(f"total,,,,{total / 3600:.3f},{floats / 3600:.3f}")


def _line(*values: object) -> str:
    """A line of a table of values separated by commas."""
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(values)
    return out.getvalue()
