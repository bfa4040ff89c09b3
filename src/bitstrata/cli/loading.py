"""From names and files given on the command line to data sets, networks and weights (torch side)."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitstrata import data, zoo
from bitstrata.cli.common import CommandError, choose, parse_bits
from bitstrata.cli.options import RunOptions
from bitstrata.data import ArrayDataset, Compose, Dataset, RandomCrop, RandomHorizontalFlip, Transform
from bitstrata.prepare import Pixels
from bitstrata.recipes import base as recipes
from bitstrata.train.checkpoint import load_tensors


def load_data(
    name: str,
    root: Path | None,
    split: str,
    limit: int | None = None,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Dataset:
    """A split of a data set, or its first `limit` images."""
    choose(name, data.names(), "--data")
    dataset = data.load(name, root, split, mean=mean, std=std)
    return dataset if limit is None or limit >= len(dataset) else first_images(dataset, limit)


def first_images(dataset: Dataset, count: int) -> ArrayDataset:
    """The first `count` images, in memory."""
    images, labels = dataset.batch(range(min(count, len(dataset))))
    return ArrayDataset(
        images=images,
        labels=labels,
        classes=dataset.classes,
        mean=dataset.mean,
        std=dataset.std,
        split=dataset.split,
    )


def augmentation(name: str, dataset: Dataset) -> Transform | None:
    """The customary augmentation: crop and flip for CIFAR, a one-pixel shift for digits, two pixels for MNIST."""
    size = dataset.shape[1:]
    if name in ("cifar10", "cifar100"):
        return Compose((RandomCrop(size, 4), RandomHorizontalFlip()))
    if name in ("digits", "mnist", "fashion_mnist"):
        return RandomCrop(size, 1 if name == "digits" else 2)
    return None


def make_model(name: str, dataset: Dataset, options: Sequence[str] = ()) -> nn.Module:
    """A network of the zoo with NAME=VALUE options, or PACKAGE.MODULE:FACTORY called with them."""
    fields = dict(assignment("--model-set", text) for text in options)
    if ":" in name:
        return _from_factory(name, fields)
    choose(name, zoo.names(), "--model")
    try:
        return zoo.create(name, classes=len(dataset.classes), in_channels=dataset.shape[0], **fields)
    except (TypeError, ValueError) as error:
        raise CommandError(f"--model {name}: {error}") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a float checkpoint into `model`: safetensors, or a state dict (bare, or under "state_dict" or "model").

    A "module." prefix, left by data-parallel training, is stripped. Raises CommandError naming missing, unexpected
    and misshapen entries.
    """
    state = _strip_prefix(_read_state(path))
    wanted = model.state_dict()
    problems = []
    # A counter of batches seen decides nothing at inference, and old checkpoints lack it.
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    shapes = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    if missing:
        problems.append(f"missing {_some(missing)}")
    if unexpected:
        problems.append(f"unexpected {_some(unexpected)}")
    if shapes:
        key = shapes[0]
        problems.append(
            f"{len(shapes)} of another shape, such as {key}: {tuple(state[key].shape)} in the file, "
            f"{tuple(wanted[key].shape)} in the network"
        )
    if problems:
        raise CommandError(f"{path} does not fit the network: {'; '.join(problems)}")
    model.load_state_dict({**wanted, **state})


def make_recipe(options: RunOptions) -> recipes.Recipe:
    """The recipe by name, with its fields from --bits, --a and --set. CommandError for what it does not have."""
    choose(options.recipe, recipes.names(), "--recipe")
    parameters = inspect.signature(recipes.describe(options.recipe).make).parameters
    fields: dict[str, Any] = dict(assignment("--set", text) for text in options.set)
    for name in fields:
        if name not in parameters:
            raise CommandError(
                f"--set {name}: recipe {options.recipe!r} has no field {name!r}; it has: {', '.join(parameters)}"
            )
    if options.a is not None and "a" not in parameters:
        raise CommandError(f"--a {options.a}: recipe {options.recipe!r} has no such field; see bitstrata recipes")
    if options.a is not None:
        fields["a"] = "same" if options.a == "same" else parse_bits(options.a, "--a")[0]
    if options.bits is not None:
        fields.update(_widths(options.recipe, parameters, options.bits))
    try:
        return recipes.get(options.recipe, **fields)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def _widths(recipe: str, parameters: Mapping[str, inspect.Parameter], text: str) -> dict[str, Any]:
    """--bits as the field of the recipe that holds weight widths."""
    bits = parse_bits(text)
    if "w" in parameters and not isinstance(parameters["w"].default, int):
        return {"w": bits}
    name = "bits" if "bits" in parameters else "w"
    if name not in parameters:
        raise CommandError(f"--bits {text}: recipe {recipe!r} fixes its widths by other fields; see bitstrata recipes")
    if isinstance(parameters[name].default, tuple):
        return {name: bits}
    if len(bits) != 1:
        raise CommandError(f"--bits {text}: recipe {recipe!r} trains one bit-width at a time")
    return {name: bits[0]}


def input_grid(recipe: recipes.Recipe, dataset: Dataset) -> Pixels | None:
    """uint8 pixels as input codes, where the recipe quantizes what the first layer reads."""
    if recipe.activation is None or recipe.edges == "float" or recipe.integers:
        return None
    return Pixels(mean=dataset.mean, std=dataset.std)


def assignment(option: str, text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is a JSON value where it reads as one, else text."""
    name, found, value = text.partition("=")
    if not found:
        raise CommandError(f"{option} {text}: write NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, None if value == "None" else value


def _from_factory(name: str, fields: Mapping[str, Any]) -> nn.Module:
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise CommandError(f"--model {name!r}: {error}") from error
    try:
        model = factory(**fields)
    except TypeError as error:
        raise CommandError(f"--model {name!r}: {error}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model {name!r}: returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise CommandError(f"checkpoint {path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise CommandError(f"checkpoint {path}: {error}") from error
    loaded = load_tensors(path)
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CommandError(f"checkpoint {path}: holds no state dict of tensors")
    return loaded


def _strip_prefix(state: Mapping[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    if state and all(key.startswith(prefix) for key in state):
        return {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _some(keys: list[str], limit: int = 3) -> str:
    rest = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + rest
