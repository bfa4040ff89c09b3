"""Image folders, one directory a class, decoded on access."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .dataset import DataError, Dataset, Indices, as_index, read_bytes, require, stratified_split

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_MODES = {1: "L", 3: "RGB"}
# The training set's of ILSVRC-2012, customary for photographs.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderDataset(Dataset):
    """Images of one size, decoded by `workers` threads as a batch is asked for.

    With `size` (H, W), each image is scaled (bilinear, antialiased) just to cover it and cropped at the centre;
    without, every file must have the size of the first. Raises DataError for a file that is no image.
    """

    paths: tuple[Path, ...]
    image_shape: tuple[int, int, int]
    resize: bool
    workers: int = 4

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.image_shape

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        index = as_index(indices)
        paths = [self.paths[i] for i in index.tolist()]
        # A pool a batch costs tens of microseconds and leaves no thread behind.
        with ThreadPoolExecutor(self.workers, thread_name_prefix="bitstrata-decode") as pool:
            images = list(pool.map(self._decode, paths))
        stacked = np.stack(images) if images else np.empty((0, *self.shape), np.uint8)
        return torch.from_numpy(stacked), self.labels[index]

    def _decode(self, path: Path) -> NDArray[np.uint8]:
        channels, height, width = self.image_shape
        pixels = _open(path, channels, (height, width) if self.resize else None)
        if pixels.shape != self.image_shape:
            raise DataError(
                f"{path}: image is {pixels.shape[1]}x{pixels.shape[2]} but the first one {height}x{width} (height x "
                "width); give size= to bring all to one size"
            )
        return pixels


def read_folder(
    root: Path,
    split: str,
    *,
    size: int | tuple[int, int] | None = None,
    channels: int = 3,
    test_fraction: float | None = None,
    seed: int = 0,
    workers: int = 4,
) -> FolderDataset:
    """Image files under root/split/class/, or under root/class/ with a seeded, stratified `test_fraction`.

    The test part may be called "val". Class names are the training part's directory names, sorted; files are sorted
    by name, and only those with an image suffix (.png, .jpg, ...) count. `size` is (H, W) or a side, `channels` 3
    (RGB) or 1 (grey). Raises DataError, and ImportError without Pillow.
    """
    if channels not in _MODES:
        raise ValueError(f"folder: channels must be 1 or 3, got {channels}")
    if workers < 1:
        raise ValueError(f"folder: workers must be at least 1, got {workers}")
    if not root.is_dir():
        raise DataError(f"folder: {root} is not a directory")
    wanted = (size, size) if isinstance(size, int) else size
    if wanted is not None and min(wanted) < 1:
        raise ValueError(f"folder: size must be positive, got {size}")
    classes, paths, labels = _list(root, split, test_fraction, seed)
    shape = (channels, *(wanted or _open(paths[0], channels, None).shape[1:]))
    return FolderDataset(
        labels=torch.from_numpy(labels),
        classes=classes,
        mean=_MEAN if channels == 3 else (sum(_MEAN) / 3,),
        std=_STD if channels == 3 else (sum(_STD) / 3,),
        split=split,
        paths=tuple(paths),
        image_shape=shape,
        resize=wanted is not None,
        workers=workers,
    )


def _list(
    root: Path, split: str, test_fraction: float | None, seed: int
) -> tuple[tuple[str, ...], Sequence[Path], NDArray[np.int64]]:
    if test_fraction is not None:
        classes = _directories(root)
        paths, labels = _members(root, classes)
        chosen = stratified_split(labels, test_fraction, seed, split)
        return classes, [paths[i] for i in chosen], labels[chosen]
    names = ("test", "val") if split == "test" else ("train",)
    part = next((root / name for name in names if (root / name).is_dir()), None)
    if part is None:
        raise DataError(
            f"folder: no directory {' or '.join(names)} in {root}; expected {root}/{split}/CLASS/*.png (or .jpg ...), "
            f"or {root}/CLASS/*.png with test_fraction="
        )
    # Labels must not shift when the test part lacks a class.
    classes = _directories(root / "train" if (root / "train").is_dir() else part)
    unknown = sorted(set(_directories(part)) - set(classes))
    if unknown:
        raise DataError(f"folder: {part} has classes that {root / 'train'} lacks: {', '.join(unknown)}")
    paths, labels = _members(part, classes)
    return classes, paths, labels


def _directories(root: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _members(root: Path, classes: Sequence[str]) -> tuple[list[Path], NDArray[np.int64]]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if (root / name).is_dir():
            found = sorted(path for path in (root / name).iterdir() if path.suffix.lower() in SUFFIXES)
            paths += found
            labels += [label] * len(found)
    if not paths:
        raise DataError(f"folder: no image file ({', '.join(SUFFIXES)}) in any class directory of {root}")
    return paths, np.asarray(labels, np.int64)


def _open(path: Path, channels: int, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Pixels uint8 (C, H, W), scaled and cropped to `size` if one is given."""
    pillow: Any = require("PIL.Image", "reading image folders")
    data = read_bytes(path)
    try:
        with pillow.open(io.BytesIO(data)) as file:
            image = file.convert(_MODES[channels])
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{path}: not a readable image of {len(data)} bytes ({error})") from error
    if size is not None:
        image = require("PIL.ImageOps", "reading image folders").fit(image, size[::-1], pillow.Resampling.BILINEAR)
    pixels = np.asarray(image, np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)
