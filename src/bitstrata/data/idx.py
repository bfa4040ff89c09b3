"""MNIST and Fashion-MNIST from idx files, plain or gzip-compressed.

An idx file is a big-endian header (two zero bytes, type code 8 for unsigned bytes, number of dimensions, each
dimension as uint32) and the bytes themselves in C order.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .dataset import ArrayDataset, DataError, check_labels, find_directory, read_bytes

_PREFIX = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class _Kind:
    """Where the files may lie below the root, and what the data set's images are like."""

    name: str
    places: tuple[str, ...]
    classes: tuple[str, ...]
    mean: float
    std: float


_MNIST = _Kind("mnist", (".", "raw", "MNIST/raw"), tuple(map(str, range(10))), 0.1307, 0.3081)
_FASHION_MNIST = _Kind(
    "fashion_mnist",
    (".", "raw", "FashionMNIST/raw"),
    ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    0.2860,
    0.3530,
)


def read_mnist(root: Path, split: str) -> ArrayDataset:
    """MNIST (LeCun, Cortes, Burges), images (N, 1, 28, 28); `root` holds the four idx files. Raises DataError."""
    return _read(_MNIST, root, split)


def read_fashion_mnist(root: Path, split: str) -> ArrayDataset:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017), images (N, 1, 28, 28); files as MNIST's. Raises DataError."""
    return _read(_FASHION_MNIST, root, split)


def _read(kind: _Kind, root: Path, split: str) -> ArrayDataset:
    image_path = _find(kind, root, f"{_PREFIX[split]}-images-idx3-ubyte")
    label_path = _find(kind, root, f"{_PREFIX[split]}-labels-idx1-ubyte")
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{kind.name}: {image_path} holds {len(images)} images but {label_path} {len(labels)} labels")
    check_labels(labels, len(kind.classes), label_path)
    return ArrayDataset(
        images=torch.from_numpy(images[:, None]),
        labels=torch.from_numpy(labels.astype(np.int64)),
        classes=kind.classes,
        mean=(kind.mean,),
        std=(kind.std,),
        split=split,
    )


def _find(kind: _Kind, root: Path, file: str) -> Path:
    candidates = (file, f"{file}.gz")
    directory = find_directory(root, kind.places, candidates, kind.name)
    if directory is None:
        raise DataError(
            f"{kind.name}: neither {file} nor {file}.gz in {root} (nor in its {', '.join(kind.places[1:])})"
        )
    return next(directory / candidate for candidate in candidates if (directory / candidate).is_file())


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of an idx file of unsigned bytes with that many dimensions, writable. Raises DataError."""
    data = read_bytes(path)
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: truncated or malformed gzip file of {len(data)} bytes ({error})") from error
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise DataError(f"{path}: expected an idx header of {header} bytes, found {len(data)} bytes")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", data[:header])
    if magic != 0x0800 + dimensions:
        raise DataError(f"{path}: expected magic number {0x0800 + dimensions:#010x}, found {magic:#010x}")
    expected = header + math.prod(shape)
    if len(data) != expected:
        raise DataError(f"{path}: expected {expected} bytes for shape {tuple(shape)}, found {len(data)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()
