"""Run directories of `train` and `quantize`, opened again: the trained network, its data, its artifact (torch side)."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

import bitstrata as bs
from bitstrata.cli import loading
from bitstrata.cli.common import CommandError, parse_floats, read_json
from bitstrata.cli.options import RunOptions
from bitstrata.cli.quantize import Quantize
from bitstrata.cli.train import Train
from bitstrata.data import Dataset
from bitstrata.train import checkpoint

FROZEN = "frozen.ckpt"
Stage = Literal["float", "joint"]


class SavedRun:
    """A run directory; `options` are those it was made with. Raises CommandError where it is none."""

    def __init__(self, path: Path, root: Path | None = None) -> None:
        """`root` replaces the data directory that the run was made with."""
        self.path = path
        if not (path / "config.json").is_file():
            raise CommandError(f"{path}: not a run directory of `bitstrata train` or `quantize` (no config.json)")
        self.options = read_options(path / "config.json")
        self.root = root or self.options.root
        self._statistics: dict[str, Any] = {}
        if isinstance(self.options, Quantize):
            for name in ("mean", "std"):
                text = getattr(self.options, name)
                self._statistics[name] = None if text is None else parse_floats(text, f"--{name}")

    @property
    def artifact(self) -> Path:
        """Where the run packs its network."""
        return self.path / "model.strata"

    def data(self, split: str = "test") -> Dataset:
        """A split as the run used it."""
        limit = self.options.train_limit if split == "train" else self.options.test_limit
        return loading.load_data(
            self.options.data, self.root, split, limit, options=self.options.data_set, **self._statistics
        )

    def model(self, dataset: Dataset, stage: Stage = "joint") -> nn.Module:
        """The network at the end of a stage (or at its last checkpoint), in evaluation mode."""
        file = self.path / f"{stage}.ckpt"
        if not file.is_file():
            raise CommandError(f"{self.path}: no {stage}.ckpt; the run has not come that far")
        model = loading.make_model(self.options.model, dataset, self.options.model_set)  # type: ignore[attr-defined]
        recipe = loading.make_recipe(self.options)
        if stage == "joint":
            bs.quantize_(model, recipe, example_of(dataset), input=loading.input_grid(recipe, dataset))
        else:
            bs.float_form_(model, recipe, example_of(dataset))
        frozen = self.path / FROZEN
        if stage == "joint" and frozen.is_file():  # ranges of a network that trained in integers
            file = frozen
        model.load_state_dict(checkpoint.load(file)["model"])
        return model.eval()


def example_of(dataset: Dataset) -> Tensor:
    """The first input as the network takes it, such as (1, C, H, W)."""
    return dataset.normalized(dataset.batch([0])[0])


def read_options(path: Path) -> RunOptions:
    """The options saved in config.json, as the command that wrote them would have them."""
    saved = read_json(path)
    kind = Quantize if "checkpoint" in saved else Train
    known = {field.name: field for field in fields(kind)}
    unknown = sorted(saved.keys() - known.keys())
    if unknown:
        raise CommandError(f"{path}: unknown options {', '.join(unknown)}; written by another version?")
    paths = {"root", "out", "checkpoint"}
    values: dict[str, Any] = {
        name: Path(value) if name in paths and value is not None else value for name, value in saved.items()
    }
    for name in ("set", "model_set", "data_set"):
        values[name] = tuple(values.get(name, ()))
    return kind(**values)
