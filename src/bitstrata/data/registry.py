"""The data sets by name."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .cifar import read_cifar10, read_cifar100
from .dataset import DataError, Dataset
from .digits import read_digits
from .folder import read_folder
from .idx import read_fashion_mnist, read_mnist

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Source:
    """One data set: `read(root, split, **options)`, or `read(split, **options)` where `files` is None.

    files: what `root` must hold, for people; None if the data need no root.
    """

    name: str
    description: str
    files: str | None
    read: Callable[..., Dataset]

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword options that `load` passes on."""
        parameters = inspect.signature(self.read).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


_IDX = "{train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte, plain or .gz"
_SOURCES = {
    source.name: source
    for source in (
        Source("digits", "handwritten digits, 1,797 of 1x8x8, 10 classes, from scikit-learn", None, read_digits),
        Source(
            "cifar10",
            "photographs, 50,000 + 10,000 of 3x32x32, 10 classes",
            "cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin or "
            "cifar-10-batches-py/{data_batch_1..5,test_batch}, or those files themselves",
            read_cifar10,
        ),
        Source(
            "cifar100",
            "photographs, 50,000 + 10,000 of 3x32x32, 100 fine or 20 coarse classes",
            "cifar-100-binary/{train,test}.bin or cifar-100-python/{train,test}, or those files themselves",
            read_cifar100,
        ),
        Source("mnist", "handwritten digits, 60,000 + 10,000 of 1x28x28, 10 classes", _IDX, read_mnist),
        Source("fashion_mnist", "clothes, 60,000 + 10,000 of 1x28x28, 10 classes", _IDX, read_fashion_mnist),
        Source(
            "folder",
            "your own image files, one directory a class",
            "SPLIT/CLASS/*.png (or .jpg ...), or CLASS/*.png with test_fraction=",
            read_folder,
        ),
    )
}


def names() -> tuple[str, ...]:
    """Names that `load` knows."""
    return tuple(_SOURCES)


def get(name: str) -> Source:
    """The record of one data set; ValueError with a suggestion if there is none."""
    if name not in _SOURCES:
        raise ValueError(f"unknown data set {name!r}{_suggest(name, names())}; known: {', '.join(names())}")
    return _SOURCES[name]


def load(
    name: str,
    root: str | PathLike[str] | None = None,
    split: str = "train",
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> Dataset:
    """One split, "train" or "test", of a data set.

    root: directory with the data set's files (`get(name).files` says which); not for "digits".
    mean, std: one number a channel, of pixel / 255, in place of the data set's own.
    options: `get(name).options`; their meaning is in the docstring of `get(name).read`.

    Raises ValueError for unknown names and options, DataError (a ValueError) for absent or malformed files.
    """
    source = get(name)
    if split not in SPLITS:
        raise ValueError(f"{name}: split must be 'train' or 'test', got {split!r}")
    for option in options:
        if option not in source.options:
            known = ("mean", "std", *source.options)
            raise ValueError(f"{name}: unknown option {option!r}{_suggest(option, known)}; known: {', '.join(known)}")
    if source.files is None:
        if root is not None:
            raise ValueError(f"{name}: takes no root, got {str(root)!r}")
        dataset = source.read(split, **options)
    elif root is None:
        raise DataError(f"{name}: needs root=, a directory that holds {source.files}")
    else:
        dataset = source.read(Path(root), split, **options)
    return dataclasses.replace(
        dataset,
        mean=dataset.mean if mean is None else tuple(map(float, mean)),
        std=dataset.std if std is None else tuple(map(float, std)),
    )


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f", did you mean {close[0]!r}?" if close else ""
