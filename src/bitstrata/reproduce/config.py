"""From a folder of TOML files to runs.

    recipes/<paper>/<table>/base.toml   what all rows have in common, and what each scale changes
    recipes/<paper>/<table>/<row>.toml  what a row changes

Later wins: base, the scale in base, the row, the scale in the row. A key that nothing reads is an error.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ..recipes import base as recipes
from ..train import TrainConfig

SCALES = ("smoke", "cpu", "paper")
SCHEMES = ("joint", "ascending", "top_then_finetune")
KINDS = ("train", "memory")
STARTS = ("float", "scratch", "checkpoint")
TEXTS = ("title", "source", "row")
TOP = {*TEXTS, "scale", "seeds", "metrics", "kind", "scheme", "order", "calibration_batches", "data", "model", "float"}
TOP |= {"recipe", "train", "warm_start", "quantize", "start", "checkpoint"}
DATA = {"name", "augment", "train_limit", "test_limit", "mean", "std"}
CHECKPOINT = {"file", "sha256"}
NAMED = {"name", "options"}
TRAIN = {f.name for f in fields(TrainConfig)} - {"seed"}
#: Fields of the training configuration that change neither weights nor accuracies.
SILENT = ("checkpoint_every", "log_every", "eval_every")
#: Fields of a recipe that are texts, or count as training.
UNREAD = ("name", "description", "objective", "schedule")


class ConfigError(ValueError):
    """A table's files cannot be read as runs."""


@dataclass(frozen=True)
class Row:
    """A row of a table: its name in results.csv, and its configuration at the scale that was asked for."""

    name: str
    config: Mapping[str, Any]

    @property
    def seeds(self) -> tuple[int, ...]:
        """One run for each."""
        return tuple(self.config["seeds"])

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is measured, see `metrics`."""
        return tuple(self.config["metrics"])

    def run(self, seed: int) -> dict[str, Any]:
        """The configuration of one run: all that decides its result, and nothing else."""
        kept = {k: v for k, v in self.config.items() if k not in {*TEXTS, "seeds", "order", "scale"}}
        return {**kept, "seed": seed}


@dataclass(frozen=True)
class Table:
    """A table of a paper at one scale; `folder` holds its files."""

    paper: str
    name: str
    folder: Path
    scale: str
    title: str
    source: str
    rows: tuple[Row, ...]
    order: int


def tables(root: Path) -> tuple[tuple[str, str], ...]:
    """(paper, table) of every table under a folder of recipes, the most telling first (`order` in base.toml)."""
    found = [(_read(file).get("order", 99), file.parent.parent.name, file.parent.name) for file in _bases(root)]
    return tuple((paper, name) for _, paper, name in sorted(found))


def load_table(root: Path, paper: str, name: str, scale: str) -> Table:
    """Read a table's files.

    Args:
        root: folder of the papers' folders.
        scale: "smoke", "cpu" or "paper".

    Raises:
        ConfigError: no such table, a file that is not TOML, unknown keys, an unknown recipe field, or two rows of one
            name.
    """
    if scale not in SCALES:
        raise ConfigError(f"reproduce: scale must be one of {', '.join(SCALES)}, got {scale!r}")
    folder = root / paper / name
    if not (folder / "base.toml").is_file():
        known = ", ".join(" ".join(pair) for pair in tables(root)) or f"none under {root}"
        raise ConfigError(f"reproduce: no table {paper} {name}; there are: {known}")
    base = _read(folder / "base.toml")
    rows = []
    for file in sorted(folder.glob("*.toml")):
        if file.name != "base.toml":
            own = _read(file)
            config = _merge(_scaled(base, scale, folder / "base.toml"), _scaled(own, scale, file))
            rows.append(Row(str(own.get("row", file.stem)), _checked(config, file)))
    names = [row.name for row in rows]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice or not rows:
        raise ConfigError(f"{folder}: " + (f"two rows are named {twice[0]!r}" if twice else "no rows"))
    return Table(
        paper, name, folder, scale, str(base.get("title", name)), str(base.get("source", "")), tuple(rows),
        int(base.get("order", 99)),
    )  # fmt: skip


def digest(config: Mapping[str, Any]) -> str:
    """16 hex digits of SHA-256 over what decides a run's result: runs that several tables ask for are the same run.

    Recipe and training count as they are after all changes, without fields at their defaults: an option that is spelled
    out, or that this recipe does not read, makes no other run. What is measured is no part of it, nor is what only
    decides how often something is written.
    """
    kept = {k: v for k, v in config.items() if k != "metrics"}
    if config.get("recipe", {}).get("name", "float") != "float":
        recipe = recipe_of(config)
        kept["train"] = _decisive(training(recipe, config["train"]))
        kept["recipe"] = {k: v for k, v in _decisive(recipe).items() if k not in UNREAD}
    if "warm_start" in config:
        kept["warm_start"] = digest(warming(config))
    for part in ("train", "float"):
        if isinstance(kept.get(part), Mapping):
            kept[part] = {k: v for k, v in kept[part].items() if k not in SILENT}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def warming(config: Mapping[str, Any]) -> dict[str, Any]:
    """The run whose network a run with `warm_start` starts from."""
    return {k: v for k, v in merge(config, config["warm_start"]).items() if k != "warm_start"}


def _decisive(value: Any) -> Any:
    """A dataclass as JSON values, without fields at their defaults: one that is added later names no run anew."""
    if is_dataclass(value):
        given = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
        return {name: _decisive(found) for name, found in given.items()}
    if isinstance(value, Mapping):
        return {str(key): _decisive(found) for key, found in value.items()}
    if isinstance(value, (tuple, list)):
        return [_decisive(found) for found in value]
    return value


def merge(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `changes`; tables are merged, everything else is replaced."""
    return _merge(config, changes)


def _bases(root: Path) -> list[Path]:
    return sorted(root.glob("*/*/base.toml"))


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not TOML ({error})") from error


def _scaled(config: Mapping[str, Any], scale: str, file: Path) -> dict[str, Any]:
    scales = config.get("scale", {})
    unknown = sorted(set(scales) - set(SCALES))
    if unknown:
        raise ConfigError(f"{file}: scale {unknown[0]!r} is unknown; there are: {', '.join(SCALES)}")
    plain = {k: v for k, v in config.items() if k != "scale"}
    return _merge(plain, scales.get(scale, {}))


def _merge(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _checked(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The configuration with defaults filled in, so that a run's digest does not depend on what was spelled out."""
    _known(config, TOP, "", file)
    full: dict[str, Any] = {
        "kind": "train", "scheme": "joint", "quantize": True, "start": "float", "metrics": ["accuracy"], "seeds": [0],
        "calibration_batches": 4, "data": {}, "model": {}, "recipe": {}, "float": {}, "train": {}, **config,
    }  # fmt: skip
    for name, choices in (("kind", KINDS), ("scheme", SCHEMES), ("start", STARTS)):
        if full[name] not in choices:
            raise ConfigError(f"{file}: {name}={full[name]!r} must be one of {', '.join(choices)}")
    full["data"] = {"name": "cifar10", "augment": True, "train_limit": 0, "test_limit": 0, **full["data"]}
    full["model"] = {"name": "resnet20", "options": {}, **full["model"]}
    full["recipe"] = {"name": "float", "options": {}, "norm": "", **full["recipe"]}
    with_recipe = {*NAMED, "norm"}
    allowed = {"data": DATA, "model": NAMED, "recipe": with_recipe, "float": TRAIN, "train": TRAIN}
    for part, allowed_keys in allowed.items():
        _known(full[part], allowed_keys, f"{part}.", file)
    if full["start"] == "checkpoint":
        given = full.get("checkpoint", {})
        _known(given, CHECKPOINT, "checkpoint.", file)
        if set(given) != CHECKPOINT:
            raise ConfigError(f"{file}: start='checkpoint' needs checkpoint.file, under --root, and checkpoint.sha256")
    else:
        full.pop("checkpoint", None)
    if "warm_start" in full:
        _known(full["warm_start"], {"recipe", "train", "scheme"}, "warm_start.", file)
    _check_values(full, file)
    return full


def _check_values(config: dict[str, Any], file: Path) -> None:
    """Whatever would fail in the middle of a queue fails here."""
    seeds = config["seeds"]
    if not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{file}: seeds must be different whole numbers from 0, got {seeds}")
    try:
        TrainConfig(**config["float"])
        stages = [config, *([merge(config, config["warm_start"])] if "warm_start" in config else [])]
        for stage in stages:
            if stage["recipe"]["name"] != "float":
                training(recipe_of(stage), stage["train"])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from error


def recipe_of(config: Mapping[str, Any]) -> recipes.Recipe:
    """The recipe of a run, with recipe.norm in the place of its own normalization; lists become tuples.

    ValueError for what a recipe does not have.
    """
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in config["recipe"]["options"].items()}
    for key, value in options.items():
        if isinstance(value, Mapping):  # keys of TOML tables are text, widths are numbers
            options[key] = {int(k) if k.lstrip("-").isdigit() else k: v for k, v in value.items()}
        if value == "None":
            options[key] = None
    made = recipes.get(config["recipe"]["name"], **options)
    norm = config["recipe"]["norm"]
    return replace(made, norm=norm) if norm else made


def training(recipe: recipes.Recipe, changes: Mapping[str, Any]) -> TrainConfig:
    """The recipe's objective and schedule with a table's changes; "None" in TOML is None."""
    return TrainConfig.from_recipe(recipe, **{k: None if v == "None" else v for k, v in changes.items()})


def _known(config: Mapping[str, Any], allowed: set[str], prefix: str, file: Path) -> None:
    unknown = sorted(set(config) - allowed)
    if unknown:
        raise ConfigError(
            f"{file}: {prefix}{unknown[0]} is unknown; there are: {', '.join(prefix + k for k in sorted(allowed))}"
        )
