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

from .config import ConfigError, Table, digest
from .execute import finished

COLUMNS = ("row", "metric", "mean", "spread", "seeds", "epochs", "commit", "hardware")


@dataclass(frozen=True)
class Result:
    """One line of results.csv. spread: standard deviation of the sample, None for one seed. seeds: those that ran."""

    row: str
    metric: str
    mean: float
    spread: float | None
    seeds: tuple[int, ...]
    epochs: float


def collect(table: Table, runs: Path) -> list[Result]:
    """Results of the runs that are finished, in the table's order; rows without any are left out."""
    results = []
    for row in table.rows:
        found: dict[str, dict[int, float]] = {}
        for seed in row.seeds:
            done = finished(runs / digest(row.run(seed)))
            for name, value in (done or {"metrics": {}})["metrics"].items():
                if name.partition("@")[0] in {*row.metrics, "kept_mb"}:
                    found.setdefault(name, {})[seed] = float(value)
        epochs = epochs_of(row.config)
        for name, values in found.items():
            spread = statistics.stdev(values.values()) if len(values) > 1 else None
            results.append(Result(row.name, name, statistics.fmean(values.values()), spread, tuple(values), epochs))
    return results


def epochs_of(config: Mapping[str, Any]) -> float:
    """Epochs of a row's last stage: quantized training, or of the float network where nothing is quantized."""
    if config["kind"] != "train":
        return 0
    quantized = config["recipe"]["name"] != "float" and config["quantize"]
    return float(config["train" if quantized else "float"].get("epochs", 0))


def write_results(path: Path, results: list[Result], environment: Mapping[str, Any]) -> None:
    """Write results.csv, whole or not at all. environment: needs "commit", "cpu" and "cores"."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    hardware = f"{environment['cpu']}, {environment['cores']} cores"
    for r in results:
        spread = "" if r.spread is None else f"{r.spread:.3f}"
        seeds = " ".join(map(str, r.seeds))
        commit = (environment["commit"] or "")[:12]
        writer.writerow([r.row, r.metric, f"{r.mean:.3f}", spread, seeds, f"{r.epochs:g}", commit, hardware])
    temporary = path.with_name(path.name + ".tmp")
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
