"""From names and files given on the command line to data sets, networks and weights (torch side)."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bitstrata import data, zoo
from bitstrata.cli import factories
from bitstrata.cli.common import CommandError, choose, parse_bits
from bitstrata.cli.options import RunOptions
from bitstrata.data import ArrayDataset, Compose, Dataset, FloatDataset, RandomCrop, RandomHorizontalFlip, Transform
from bitstrata.prepare import Pixels
from bitstrata.recipes import base as recipes


def load_data(
    name: str,
    root: Path | None,
    split: str,
    limit: int | None = None,
    *,
    options: Sequence[str] = (),
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Dataset:
    """A split of a data set with NAME=VALUE options, by name or PACKAGE.MODULE:FUNCTION, or its first `limit` images.

    mean, std: one number a channel, of pixel / 255, in place of the data set's own.
    """
    fields = dict(assignment("--data-set", text) for text in options)
    if ":" in name:
        dataset = with_statistics(factories.dataset(name, split, root, fields), mean, std)
    else:
        choose(name, data.names(), "--data")
        dataset = data.load(name, root, split, mean=mean, std=std, **fields)
    return dataset if limit is None or limit >= len(dataset) else first_images(dataset, limit)


def with_statistics(dataset: Dataset, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Dataset:
    """The data set with other means and deviations of pixel / 255, where they are given."""
    if mean is None and std is None:
        return dataset
    if isinstance(dataset, FloatDataset):
        raise CommandError("--mean and --std are for pixels; these data are floats, which are not normalized")
    return dataclasses.replace(
        dataset, mean=dataset.mean if mean is None else mean, std=dataset.std if std is None else std
    )


def first_images(dataset: Dataset, count: int) -> Dataset:
    """The first `count` images (or other inputs), in memory."""
    images, labels = dataset.batch(range(min(count, len(dataset))))
    if isinstance(dataset, FloatDataset):
        return dataclasses.replace(dataset, inputs=images, labels=labels)
    return ArrayDataset(
        images=images,
        labels=labels,
        classes=dataset.classes,
        mean=dataset.mean,
        std=dataset.std,
        split=dataset.split,
    )


def augmentation(name: str, dataset: Dataset, kind: str = "auto") -> Transform | None:
    """The augmentation of training images.

    auto: the customary one: crop and flip for CIFAR, a one-pixel shift for digits, two pixels for MNIST, none for other
    data. crop: a shift by up to an eighth of the image. flip: left and right exchanged at random.
    """
    if kind == "auto":
        kind = {"cifar10": "crop-flip", "cifar100": "crop-flip"}.get(name, "none")
        if name in ("digits", "mnist", "fashion_mnist"):
            return RandomCrop(_size(dataset), 1 if name == "digits" else 2)
    if kind == "none":
        return None
    if isinstance(dataset, FloatDataset):
        raise CommandError(f"--augment {kind}: these data are no images; augment them in a loop of your own")
    height, width = _size(dataset)
    parts: list[Transform] = []
    if "crop" in kind:
        parts.append(RandomCrop((height, width), max(1, max(height, width) // 8)))
    if "flip" in kind:
        parts.append(RandomHorizontalFlip())
    return Compose(parts)


def _size(dataset: Dataset) -> tuple[int, int]:
    _, height, width = dataset.shape
    return height, width


def make_model(name: str, dataset: Dataset, options: Sequence[str] = ()) -> nn.Module:
    """A network of the zoo with NAME=VALUE options, or PACKAGE.MODULE:FACTORY called with them."""
    fields = dict(assignment("--model-set", text) for text in options)
    if ":" in name:
        return factories.network(name, fields)
    choose(name, zoo.names(), "--model")
    try:
        return zoo.create(name, classes=len(dataset.classes), in_channels=dataset.shape[0], **fields)
    except (TypeError, ValueError) as error:
        raise CommandError(f"--model {name}: {error}") from error


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
    if recipe.activation is None or recipe.edges == "float" or recipe.integers or isinstance(dataset, FloatDataset):
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
