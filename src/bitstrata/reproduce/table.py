"""Results of a table: a row and a metric a line, the mean and spread over seeds, and the paper's own numbers."""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import ConfigError, Table
from .execute import finished
from .record import Record

DIVERGED = "diverged"
COLUMNS = ("row", "metric", "mean", "spread", "seeds", "epochs", "commit", "hardware")


@dataclass(frozen=True)
class Result:
    """One line of results.csv. spread: standard deviation of the sample, None for one seed. seeds: those that ran.

    commits, hardware: of the runs, each once.
    """

    row: str
    metric: str
    mean: float
    spread: float | None
    seeds: tuple[int, ...]
    epochs: float
    commits: tuple[str, ...] = ()
    hardware: tuple[str, ...] = ()


def collect(table: Table, runs: Path, record: Record | None = None) -> list[Result]:
    """Results of the runs that are finished, in the table's order; rows without any are left out.

    Where training diverged, the metric "diverged" gives the share of a row's seeds for which it did; others are of the
    rest.
    """
    results = []
    for row in table.rows:
        found: dict[str, dict[int, float]] = {}
        diverged: dict[int, float] = {}
        places: list[Mapping[str, Any]] = []
        for seed in row.seeds:
            done = finished(row.run(seed), runs, record or Record(None))
            if done is None:
                continue
            diverged[seed] = float(DIVERGED in done)
            places += [done["environment"]] if done.get("environment") else []
            for name, value in done["metrics"].items():
                if name.partition("@")[0] in {*row.metrics, "kept_mb"}:
                    found.setdefault(name, {})[seed] = float(value)
        if any(diverged.values()):
            found[DIVERGED] = diverged
        epochs = epochs_of(row.config)
        commits = tuple(dict.fromkeys((place["commit"] or "")[:12] for place in places))
        hardware = tuple(dict.fromkeys(f"{place['cpu']}, {place['cores']} cores" for place in places))
        for name, values in found.items():
            spread = statistics.stdev(values.values()) if len(values) > 1 else None
            mean = statistics.fmean(values.values())
            results.append(Result(row.name, name, mean, spread, tuple(values), epochs, commits, hardware))
    return results


def epochs_of(config: Mapping[str, Any]) -> float:
    """Epochs of a row's last stage: quantized training, or of the float network where nothing is quantized."""
    if config["kind"] != "train":
        return 0
    quantized = config["recipe"]["name"] != "float" and config["quantize"]
    return float(config["train" if quantized else "float"].get("epochs", 0))


def write_results(path: Path, results: list[Result]) -> None:
    """Write results.csv, whole or not at all."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for r in results:
        spread = "" if r.spread is None else f"{r.spread:.3f}"
        seeds = " ".join(map(str, r.seeds))
        places = (" ".join(r.commits), "; ".join(r.hardware))
        writer.writerow([r.row, r.metric, f"{r.mean:.3f}", spread, seeds, f"{r.epochs:g}", *places])
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(out.getvalue(), encoding="utf-8")
    os.replace(temporary, path)


def read_results(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """(row, metric) -> the line of a results.csv; {} if there is no file."""
    return _read(path, COLUMNS)


def read_paper(path: Path) -> dict[tuple[str, str], float]:
    """(row, metric) -> the paper's number, of a paper.csv (row, metric, value, note); {} if there is no file."""
    return {key: float(line["value"]) for key, line in _read(path, ("row", "metric", "value", "note")).items()}


def _read(path: Path, columns: tuple[str, ...]) -> dict[tuple[str, str], dict[str, str]]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != columns:
            raise ConfigError(f"{path}: columns must be {', '.join(columns)}, got {reader.fieldnames}")
        return {(line["row"], line["metric"]): line for line in reader}
