"""What a table costs, measured: a few steps of every row, times the steps that it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..data import Loader
from ..train import TrainConfig, Trainer
from .config import Row, Table, digest, recipe_of, training
from .execute import Run, prepared, torch_threads, untrained

STEPS = 4  # timed, after one that warms up


@dataclass(frozen=True)
class Cost:
    """Processor seconds of a row's runs (all seeds): its own training, and the float networks that it needs.

    float_key: rows of one float_key share their float networks, so these count once; empty where there is none.
    """

    row: str
    seeds: int
    seconds: float
    float_seconds: float
    float_key: str


def estimate(table: Table, root: Path | None) -> list[Cost]:
    """The cost of each row; nothing is kept. Raises MissingDataError."""
    with TemporaryDirectory() as folder:
        return [_row(row, root, Path(folder)) for row in table.rows]


def _row(row: Row, root: Path | None, folder: Path) -> Cost:
    config = row.run(row.seeds[0])
    torch_threads(config)
    if config["kind"] != "train":
        return Cost(row.name, len(row.seeds), 1.0 * len(row.seeds), 0.0, "")
    run = Run(config, root, folder)
    data = run.dataset("train")
    recipe = None if config["recipe"]["name"] == "float" else recipe_of(config)
    full = TrainConfig(**{**config["float"], "distill": None})
    quantizes = recipe is not None and config["quantize"]
    float_s, key = 0.0, ""
    if config["start"] == "float" or (config["start"] == "scratch" and not quantizes):  # others train no float network
        model = untrained(run, data, recipe)
        key = digest({k: config[k] for k in ("data", "model", "float")} | {"form": str(model)})
        float_s = _step_seconds(run, model, full, data) * full.epochs * (len(data) // full.batch_size)
    seconds = 0.0
    if recipe is not None and quantizes:
        short = Run({**config, "float": {**config["float"], "epochs": 1}}, root, folder)
        settings = training(recipe, config["train"])
        quantized = run.network(data)
        prepared(short, quantized, recipe, data, Loader(data, 2, train=False).batch(0, 0)[0])
        seconds = _step_seconds(run, quantized, settings, data) * settings.epochs * (len(data) // settings.batch_size)
    return Cost(row.name, len(row.seeds), seconds * len(row.seeds), float_s * len(row.seeds), key)


def _step_seconds(run: Run, model: Any, settings: TrainConfig, data: Any) -> float:
    """Processor seconds of a training step, the least of a few."""
    loader = run.loader(data, settings.batch_size)
    trainer = Trainer(model, settings, loader, None, None)
    model.train()
    times = []
    for number, (images, labels) in enumerate(loader.epoch(0)):
        begun = time.thread_time()
        trainer._step(images, labels)
        times.append(time.thread_time() - begun)
        if number == STEPS:
            break
    return min(times[1:] or times)
