"""What a data set offers: labels, class names, channel statistics and whole batches of uint8 images."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .transforms import normalize

Indices = Tensor | NDArray[np.integer[Any]] | Sequence[int]


class DataError(ValueError):
    """A data set's files are absent, truncated, malformed or inconsistent; the message names file and cause."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset(abc.ABC):
    """Labelled images, read a batch at a time.

    labels: int64 (N,), each in [0, len(classes)).
    classes: class names; the label is the index.
    mean, std: one number a channel, of pixel / 255.
    split: "train" or "test".

    Raises DataError where these disagree with each other.
    """

    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    split: str

    def __post_init__(self) -> None:
        channels = self.shape[0]
        if len(self.mean) != channels or len(self.std) != channels:
            raise DataError(
                f"data set: mean and std need one number for each of {channels} channels, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) <= 0:
            raise DataError(f"data set: std must be positive, got {self.std}")
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise DataError(
                f"data set: labels must be int64 of shape (N,), got {self.labels.dtype} {tuple(self.labels.shape)}"
            )
        check_labels(self.labels.numpy(), len(self.classes), "labels")

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of every image; other inputs than images may have (C, L) or (F,)."""

    @abc.abstractmethod
    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, C, H, W) and labels int64 (B,) at `indices`, in their order; IndexError beyond the end."""

    def normalized(self, images: Tensor) -> Tensor:
        """What a network takes: (pixel / 255 - mean) / std a channel, float32 (B, C, H, W)."""
        return normalize(images, self.mean, self.std)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayDataset(Dataset):
    """A data set held in memory: images uint8 (N, C, H, W)."""

    images: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(
                f"data set: images must be uint8 of shape (N, C, H, W), "
                f"got {self.images.dtype} {tuple(self.images.shape)}"
            )
        if len(self.images) != len(self.labels):
            raise DataError(f"data set: {len(self.images)} images but {len(self.labels)} labels")
        super().__post_init__()

    @property
    def shape(self) -> tuple[int, int, int]:
        _, c, h, w = self.images.shape
        return c, h, w

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        index = as_index(indices)
        return self.images[index], self.labels[index]


def as_index(indices: Indices) -> Tensor:
    """`indices` as an int64 tensor; an empty sequence is allowed."""
    return torch.as_tensor(indices, dtype=torch.int64)


def check_labels(labels: NDArray[np.integer[Any]], classes: int, what: object) -> None:
    """Raises DataError naming `what` if a label lies outside [0, classes)."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(f"{what}: record {at} has label {int(labels[at])}, expected 0..{classes - 1}")


def channel_statistics(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of pixel / 255 a channel, images (N, C, H, W), in float64."""
    pixels = images.astype(np.float64) / 255
    return tuple(pixels.mean((0, 2, 3)).tolist()), tuple(pixels.std((0, 2, 3)).tolist())


def stratified_split(labels: NDArray[np.int64], test_fraction: float, seed: int, split: str) -> NDArray[np.int64]:
    """Ascending indices of one part of a seeded split that keeps class shares: round(test_fraction * n) a class.

    Every class keeps at least one sample in the training part. RandomState's stream is frozen, unlike that of
    numpy's newer generators, so the split is the same under every release.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    random = np.random.RandomState(seed)
    parts = []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        cut = min(round(test_fraction * len(members)), len(members) - 1)
        parts.append(members[:cut] if split == "test" else members[cut:])
    return np.sort(np.concatenate(parts))


def require(module: str, purpose: str) -> Any:
    """Imports an optional dependency, or raises an ImportError that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module}: pip install 'bitstrata[train]'") from error


def find_directory(root: Path, candidates: Iterable[str], marker_files: Sequence[str], name: str) -> Path | None:
    """First of root/candidate that holds one of `marker_files`; None if there is none; DataError if root is absent."""
    if not root.is_dir():
        raise DataError(f"{name}: {root} is not a directory")
    places = [root / candidate for candidate in candidates]
    return next((place for place in places if any((place / file).is_file() for file in marker_files)), None)


def read_bytes(path: Path) -> bytes:
    """The file's bytes, or DataError naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
