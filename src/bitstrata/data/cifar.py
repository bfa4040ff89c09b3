"""CIFAR-10 and CIFAR-100 from their two published layouts: binary records, or pickled batches.

Both hold 32x32 RGB images as 3072 planar bytes (Krizhevsky, Learning Multiple Layers of Features from Tiny Images,
2009). A pickle is read with an unpickler that can build plain containers and numpy arrays, and nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .dataset import ArrayDataset, DataError, check_labels, find_directory, read_bytes

_PIXELS = 3 * 32 * 32
_Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (n, 3072), labels (n,)


@dataclass(frozen=True)
class _Kind:
    """File names, record counts and statistics of one of the two data sets."""

    name: str
    classes: int
    label_bytes: int  # of a binary record
    label_at: int  # which of them is the label
    key: str  # of the labels in a pickled batch
    meta_key: str  # of the class names in the pickled meta file
    binary_directory: str
    binary_files: dict[str, tuple[str, ...]]
    binary_meta: str
    python_directory: str
    python_files: dict[str, tuple[str, ...]]
    python_meta: str
    records: dict[str, int]  # a file
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_CIFAR10 = _Kind(
    name="cifar10",
    classes=10,
    label_bytes=1,
    label_at=0,
    key="labels",
    meta_key="label_names",
    binary_directory="cifar-10-batches-bin",
    binary_files={split: tuple(f"{file}.bin" for file in files) for split, files in _BATCHES.items()},
    binary_meta="batches.meta.txt",
    python_directory="cifar-10-batches-py",
    python_files=_BATCHES,
    python_meta="batches.meta",
    records={"train": 10_000, "test": 10_000},
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)


def _cifar100(level: str) -> _Kind:
    return _Kind(
        name="cifar100",
        classes=100 if level == "fine" else 20,
        label_bytes=2,
        label_at=1 if level == "fine" else 0,
        key=f"{level}_labels",
        meta_key=f"{level}_label_names",
        binary_directory="cifar-100-binary",
        binary_files={"train": ("train.bin",), "test": ("test.bin",)},
        binary_meta=f"{level}_label_names.txt",
        python_directory="cifar-100-python",
        python_files={"train": ("train",), "test": ("test",)},
        python_meta="meta",
        records={"train": 50_000, "test": 10_000},
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    )


def read_cifar10(root: Path, split: str, *, allow_partial: bool = False) -> ArrayDataset:
    """CIFAR-10, images (N, 3, 32, 32). `root` is the unpacked directory or the one above it.

    A file that does not hold its published 10,000 records is an error; `allow_partial` accepts any whole number of
    them. Raises DataError.
    """
    return _read(_CIFAR10, root, split, allow_partial)


def read_cifar100(root: Path, split: str, *, labels: str = "fine", allow_partial: bool = False) -> ArrayDataset:
    """CIFAR-100, images (N, 3, 32, 32), with its 100 "fine" or 20 "coarse" `labels`; otherwise as `read_cifar10`."""
    if labels not in ("fine", "coarse"):
        raise ValueError(f"cifar100: labels must be 'fine' or 'coarse', got {labels!r}")
    return _read(_cifar100(labels), root, split, allow_partial)


def _read(kind: _Kind, root: Path, split: str, allow_partial: bool) -> ArrayDataset:
    binary = find_directory(root, (".", kind.binary_directory), kind.binary_files[split], kind.name)
    python = find_directory(root, (".", kind.python_directory), kind.python_files[split], kind.name)
    read_file: Callable[[_Kind, Path, int | None], _Arrays]
    if binary is not None:
        directory, files, read_file, read_names = binary, kind.binary_files[split], _read_binary, _binary_names
    elif python is not None:
        directory, files, read_file, read_names = python, kind.python_files[split], _read_pickle, _pickle_names
    else:
        raise DataError(
            f"{kind.name}: neither {', '.join(kind.binary_files[split])} (in {root} or its {kind.binary_directory}/) "
            f"nor {', '.join(kind.python_files[split])} (in {root} or its {kind.python_directory}/) found"
        )
    records = None if allow_partial else kind.records[split]
    parts = [read_file(kind, directory / file, records) for file in files]
    images = np.concatenate([images for images, _ in parts]).reshape(-1, 3, 32, 32)
    return ArrayDataset(
        images=torch.from_numpy(images),
        labels=torch.from_numpy(np.concatenate([labels for _, labels in parts])),
        classes=read_names(kind, directory),
        mean=kind.mean,
        std=kind.std,
        split=split,
    )


def _read_binary(kind: _Kind, path: Path, records: int | None) -> _Arrays:
    data = read_bytes(path)
    size = kind.label_bytes + _PIXELS
    if records is not None and len(data) != records * size:
        raise DataError(f"{path}: expected {records * size} bytes ({records} records of {size}), found {len(data)}")
    if not data or len(data) % size:
        raise DataError(f"{path}: expected a positive multiple of {size} bytes (one record), found {len(data)}")
    table = np.frombuffer(data, np.uint8).reshape(-1, size)
    labels = table[:, kind.label_at].astype(np.int64)
    check_labels(labels, kind.classes, path)
    return table[:, kind.label_bytes :], labels


def _binary_names(kind: _Kind, directory: Path) -> tuple[str, ...]:
    path = directory / kind.binary_meta
    if not path.is_file():
        return _numbered(kind)
    try:
        lines = read_bytes(path).decode().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    return _checked_names(kind, path, [line.strip() for line in lines if line.strip()])


def _read_pickle(kind: _Kind, path: Path, records: int | None) -> _Arrays:
    content = _unpickle(path)
    data, labels = _entry(content, path, "data"), _entry(content, path, kind.key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS:
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{path}: 'data' must be a uint8 array of shape (n, {_PIXELS}), found {found}")
    try:
        numbers = np.asarray(labels, np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: {kind.key!r} must be a list of integers ({error})") from error
    if numbers.shape != (len(data),) or not len(data):
        raise DataError(f"{path}: {len(data)} images but labels of shape {numbers.shape}")
    if records is not None and len(data) != records:
        raise DataError(f"{path}: expected {records} records, found {len(data)}")
    check_labels(numbers, kind.classes, path)
    return data, numbers


def _pickle_names(kind: _Kind, directory: Path) -> tuple[str, ...]:
    path = directory / kind.python_meta
    if not path.is_file():
        return _numbered(kind)
    found = _entry(_unpickle(path), path, kind.meta_key)
    if not isinstance(found, list) or not all(isinstance(name, str | bytes) for name in found):
        raise DataError(f"{path}: {kind.meta_key!r} must be a list of strings")
    return _checked_names(kind, path, [name.decode() if isinstance(name, bytes) else name for name in found])


def _numbered(kind: _Kind) -> tuple[str, ...]:
    return tuple(str(label) for label in range(kind.classes))


def _checked_names(kind: _Kind, path: Path, found: list[str]) -> tuple[str, ...]:
    if len(found) != kind.classes:
        raise DataError(f"{path}: expected {kind.classes} class names, found {len(found)}")
    return tuple(found)


def _entry(content: dict[Any, Any], path: Path, key: str) -> Any:
    for candidate in (key.encode(), key):  # batches pickled by Python 2 have byte keys
        if candidate in content:
            return content[candidate]
    raise DataError(f"{path}: no entry {key!r}; found {sorted(map(str, content))}")


def _unpickle(path: Path) -> dict[Any, Any]:
    data = read_bytes(path)
    try:
        content = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # a malformed pickle may raise anything at all
        raise DataError(f"{path}: truncated or malformed pickle of {len(data)} bytes ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a pickled dict, found {type(content).__name__}")
    return content


def _latin1(text: Any, codec: Any) -> bytes:
    """The sole use a pickled array has for `_codecs.encode`: bytes written by protocols 0 to 2 of Python 3."""
    if codec not in ("latin1", b"latin1"):
        raise DataError(f"the pickle asks for codec {codec!r}; only latin1 is allowed")
    return (text if isinstance(text, str) else bytes(text).decode("latin1")).encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds plain containers and numpy arrays; any other global in the stream is refused before it is imported."""

    _ALLOWED: dict[tuple[str, str], Any] = {  # noqa: RUF012  (a constant)
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # numpy tells its own reconstructors, whose module moved between releases.
        **{(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0] for core in ("core", "_core")},
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise DataError(f"the pickle refers to {module}.{name}; only numpy arrays are allowed") from None
