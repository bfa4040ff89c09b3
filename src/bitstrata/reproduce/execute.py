"""One run: data, float network, quantized training, measurements; every part is kept and continued where it stopped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import data, zoo
from ..data import ArrayDataset, Compose, Dataset, Loader, RandomCrop, RandomHorizontalFlip
from ..objectives import ascending_stages, top_then_finetune, warm_start_
from ..prepare import Pixels, calibrate_, float_form_, quantize_
from ..recipes import Recipe
from ..train import TrainConfig, Trainer, checkpoint, quiet
from .config import digest, recipe_of, training, warming
from .metrics import measure
from .record import Record, read_result, write_result

EVALUATION_BATCH = 500
SMALL = 32  # images a step of calibration where the training batch is smaller


class MissingDataError(ValueError):
    """The data set of a run, or the checkpoint that it starts from, cannot be read."""


class BusyError(Exception):
    """Another process is training a network that the run needs."""


class Run:
    """What a run works with: its configuration and its folder, `runs`/<digest>.

    Args:
        config: of one run, from `Row.run`.
        root: folder of the data set's files.
        runs: where runs are kept.
        record: see `Record`.
        wait: for another process that is training a network which the run needs; else BusyError.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        root: Path | None,
        runs: Path,
        *,
        record: Record | None = None,
        wait: bool = True,
    ) -> None:
        self.config = config
        self.root = root
        self.runs = runs
        self.record = record or Record(None)
        self.folder = runs / digest(config)
        self.seed = int(config["seed"])
        self.wait = wait

    def dataset(self, split: str) -> Dataset:
        """A split of the run's data set, or its first images."""
        wanted = self.config["data"]
        try:
            found = data.load(wanted["name"], self.root, split, mean=wanted.get("mean"), std=wanted.get("std"))
        except (OSError, ValueError) as error:
            raise MissingDataError(f"reproduce: data set {wanted['name']}: {error}") from error
        limit = wanted[f"{split}_limit"]
        if not limit or limit >= len(found):
            return found
        images, labels = found.batch(range(limit))
        return ArrayDataset(
            images=images, labels=labels, classes=found.classes, mean=found.mean, std=found.std, split=split
        )

    def loader(self, dataset: Dataset, batch_size: int) -> Loader:
        """Training batches, with crops and mirror images where the table says so."""
        transform = None
        if self.config["data"]["augment"]:
            height, width = dataset.shape[1:]
            crop = RandomCrop((height, width), 4 if height >= 32 else 1)
            transform = Compose((crop, RandomHorizontalFlip())) if height >= 32 else crop
        return Loader(dataset, batch_size, train=True, transform=transform, seed=self.seed, drop_last=True)

    def network(self, dataset: Dataset) -> nn.Module:
        """The network of the run's seed, in float."""
        checkpoint.seed_all(self.seed)
        wanted = self.config["model"]
        return zoo.create(
            wanted["name"], classes=len(dataset.classes), in_channels=dataset.shape[0], **wanted["options"]
        )


def execute(
    config: Mapping[str, Any],
    root: Path | None,
    runs: Path,
    *,
    record: Record | None = None,
    wait: bool = True,
    environment: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Run what is missing of a run and give its metrics, name -> value; a finished run is read, not made again.

    A run whose training diverges is finished, without metrics; its result says where it happened.

    record: finished runs and float networks that outlast `runs`. environment: JSON values to keep with the result.

    Raises:
        MissingDataError: the data set is not there.
        CheckpointError: the folder holds a checkpoint that cannot be continued.
        BusyError: with wait=False, if another process is training a network that the run needs.
    """
    run = Run(config, root, runs, record=record, wait=wait)
    wanted = list(config["metrics"])
    done = finished(config, runs, run.record)
    if done is not None and set(wanted) <= set(done["measured"]):
        return dict(done["metrics"])
    begun = time.monotonic()
    train, test = run.dataset("train"), run.dataset("test")
    values: dict[str, float] = {}
    diverged = ""
    if config["kind"] == "memory":
        from .memory import kept_memory

        values = kept_memory(run, train)
    else:
        try:
            model = trained(run, train)
        except FloatingPointError as error:
            diverged = str(error)
        else:
            values = measure(wanted, model, Loader(test, EVALUATION_BATCH, train=False))
    run.folder.mkdir(parents=True, exist_ok=True)
    took = time.monotonic() - begun
    result: dict[str, Any] = {"config": dict(config), "measured": wanted, "metrics": values, "seconds": took}
    if diverged:
        result["diverged"] = diverged
    result["environment"] = dict(environment or {})
    write_result(run.folder / "result.json", result)
    run.record.keep_result(run.folder.name, result)
    return values


def finished(config: Mapping[str, Any], runs: Path, record: Record) -> dict[str, Any] | None:
    """What a finished run wrote, None for one that is not finished."""
    name = digest(config)
    return read_result(runs / name / "result.json") or record.result(name)


def trained(run: Run, train: Dataset) -> nn.Module:
    """The run's network after training, in evaluation mode; its float network comes from `float_network`."""
    config = run.config
    recipe = None if config["recipe"]["name"] == "float" else recipe_of(config)
    if recipe is None or not config["quantize"]:
        return float_network(run, train, recipe).eval()
    example = Loader(train, 2, train=False).batch(0, 0)[0]
    model = run.network(train) if config["start"] == "scratch" else float_network(run, train, recipe)
    prepared(run, model, recipe, train, example)
    if "warm_start" in config:
        before = Run(warming(config), run.root, run.runs, record=run.record, wait=run.wait)
        warm_start_(model, trained(before, train).state_dict())
        calibrate_(model, calibration(run, train, training(recipe, config["train"]).batch_size))
    settings = training(recipe, {"seed": run.seed, **config["train"]})
    fit(run, model, settings, train)
    return model.eval()


def prepared(run: Run, model: nn.Module, recipe: Recipe, train: Dataset, example: Tensor) -> None:
    """Quantize in place, with uint8 pixels as input codes where the recipe quantizes the input, and calibrate."""
    pixels = recipe.activation is not None and recipe.edges != "float" and not recipe.integers
    quantize_(model, recipe, example, input=Pixels(train.mean, train.std) if pixels else None)
    if not recipe.integers:
        calibrate_(model, calibration(run, train, training(recipe, run.config["train"]).batch_size))


def calibration(run: Run, train: Dataset, batch_size: int) -> list[Tensor]:
    """Training batches without augmentation."""
    plain = Loader(train, max(batch_size, SMALL), train=True, seed=run.seed, prefetch=False)
    return [plain.batch(0, step)[0] for step in range(min(run.config["calibration_batches"], len(plain)))]


def fit(run: Run, model: nn.Module, settings: TrainConfig, train: Dataset) -> None:
    """Train by the table's scheme; each stage keeps a checkpoint of its own."""
    loader = run.loader(train, settings.batch_size)
    scheme = run.config["scheme"]
    run.folder.mkdir(parents=True, exist_ok=True)
    if scheme == "joint":
        Trainer(model, settings, loader, None, run.folder, name="train", reporter=quiet).fit()
        return
    stages = (ascending_stages if scheme == "ascending" else top_then_finetune)(model)
    for stage in stages:
        of_stage = {**asdict(settings), "precisions": (stage.precision,), "distill": None}
        name = f"train-{stage.precision}"
        Trainer(model, TrainConfig(**of_stage), loader, None, run.folder, name=name, reporter=quiet).fit()


def untrained(run: Run, train: Dataset, recipe: Recipe | None) -> nn.Module:
    """The float network in the recipe's float form, as its training begins."""
    model = run.network(train)
    if recipe is not None:
        float_form_(model, recipe, Loader(train, 2, train=False).batch(0, 0)[0])
    return model


def float_network(run: Run, train: Dataset, recipe: Recipe | None) -> nn.Module:
    """The float network that the run starts from, in the recipe's float form, trained once for all that share it.

    Runs share it when data, network, training and float form are the same.
    """
    config = run.config
    model = untrained(run, train, recipe)
    if config["start"] == "checkpoint":
        if str(model) != str(run.network(train)):
            raise MissingDataError("reproduce: the recipe starts from a float network of its own form, no checkpoint's")
        load_checkpoint_(model, run)
        return model
    settings = TrainConfig(**{**config["float"], "seed": run.seed, "distill": None})
    form = hashlib.sha256(str(model).encode()).hexdigest()
    same = {"float": settings.to_dict(), "data": config["data"], "model": config["model"], "form": form}
    name = f"float-{digest({**same, 'seed': run.seed})}"
    if run.record.load_float_(name, model):
        return model
    folder = run.runs / name
    folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder, wait=run.wait) as lock:
        if not lock.held:
            raise BusyError(str(folder))
        loader = run.loader(train, settings.batch_size)
        Trainer(model, settings, loader, None, folder, name="float", reporter=quiet).fit()
        run.record.keep_float(name, model)
    return model


def load_checkpoint_(model: nn.Module, run: Run) -> None:
    """Load the float network that the table names, a safetensors file under the run's root.

    Raises:
        MissingDataError: no such file, another file of that name, or weights of another network.
    """
    given = run.config["checkpoint"]
    file = (run.root or Path()) / given["file"]
    if not file.is_file():
        raise MissingDataError(f"reproduce: checkpoint {file}: no such file")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != given["sha256"]:
        raise MissingDataError(
            f"reproduce: checkpoint {file}: its SHA-256 is {found}, the table wants {given['sha256']}"
        )
    state = load_file(file)
    absent = [key for key in model.state_dict() if key not in state and not key.endswith("num_batches_tracked")]
    try:
        if absent:
            raise ValueError(f"no {absent[0]}")
        model.load_state_dict({**model.state_dict(), **state})
    except (RuntimeError, ValueError) as error:
        raise MissingDataError(f"reproduce: checkpoint {file} does not fit the network: {error}") from error


class FolderLock:
    """Holds a folder: of processes that need the same part, one makes it and the others wait for it.

    The lock belongs to the process, so that one that is killed leaves none behind.
    """

    def __init__(self, folder: Path, *, wait: bool = True) -> None:
        self.file = folder / "lock"
        self.wait = wait
        self.held = False

    def __enter__(self) -> FolderLock:
        import fcntl

        self.handle = self.file.open("w")
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | (0 if self.wait else fcntl.LOCK_NB))
            self.held = True
        except BlockingIOError:
            self.handle.close()
        return self

    def __exit__(self, *_: object) -> None:
        if self.held:
            self.handle.close()  # closing gives the lock back


def torch_threads(config: Mapping[str, Any]) -> None:
    """Weights repeat bit for bit only with the threads that the configuration names."""
    torch.set_num_threads(int(config["train"].get("threads", 1)))
