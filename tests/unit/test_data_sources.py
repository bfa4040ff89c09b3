"""The array data sets, from tiny files in their published layouts, and what is said about broken ones."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bitstrata import data
from bitstrata.data.dataset import stratified_split

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]


def records(n: int, classes: int = 10, seed: int = 0) -> tuple[NDArray[np.uint8], list[int]]:
    random = np.random.RandomState(seed)
    return random.randint(0, 256, (n, 3072)).astype(np.uint8), random.randint(0, classes, n).tolist()


def write_cifar10(root: Path, layout: str, n: int = 3) -> tuple[NDArray[np.uint8], list[int]]:
    """Returns the training images (5 * n, 3072) and labels; the test batch repeats the first file."""
    directory = root / f"cifar-10-batches-{layout}"
    directory.mkdir()
    parts = [records(n, seed=i) for i in range(5)]
    for name, (images, labels) in zip([*TRAIN, "test_batch"], [*parts, parts[0]], strict=True):
        if layout == "bin":
            (directory / f"{name}.bin").write_bytes(np.insert(images, 0, labels, axis=1).astype(np.uint8).tobytes())
        else:
            content = {b"batch_label": b"x", b"labels": labels, b"data": images, b"filenames": [b"a.png"] * n}
            (directory / name).write_bytes(pickle.dumps(content, protocol=2))
    names = [f"class {i}" for i in range(10)]
    if layout == "bin":
        (directory / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    else:
        (directory / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return np.concatenate([images for images, _ in parts]), [label for _, labels in parts for label in labels]


@pytest.mark.parametrize("layout", ["bin", "py"])
@pytest.mark.parametrize("inside", [True, False])
def test_cifar10_layouts(tmp_path: Path, layout: str, inside: bool) -> None:
    images, labels = write_cifar10(tmp_path, layout)
    root = tmp_path / f"cifar-10-batches-{layout}" if inside else tmp_path
    train = data.load("cifar10", root, allow_partial=True)
    assert isinstance(train, data.ArrayDataset)
    assert (len(train), train.shape, train.split, train.classes[3]) == (15, (3, 32, 32), "train", "class 3")
    assert np.array_equal(train.images.numpy().reshape(15, 3072), images)
    assert train.labels.tolist() == labels
    test = data.load("cifar10", str(root), "test", allow_partial=True)
    got, got_labels = test.batch([2, 0])
    assert got.dtype == torch.uint8
    assert np.array_equal(got.numpy().reshape(2, 3072), images[[2, 0]])
    assert got_labels.tolist() == [labels[2], labels[0]]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    images, labels = records(2)
    content = {"data": images, "labels": labels}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol=protocol))
    test = data.load("cifar10", tmp_path, "test", allow_partial=True)
    assert np.array_equal(test.batch([0, 1])[0].numpy().reshape(2, 3072), images)
    assert test.classes == tuple("0123456789")


@pytest.mark.parametrize(("level", "column", "classes"), [("coarse", 0, 20), ("fine", 1, 100)])
@pytest.mark.parametrize("layout", ["binary", "python"])
def test_cifar100(tmp_path: Path, layout: str, level: str, column: int, classes: int) -> None:
    images, _ = records(4)
    labels = np.array([[0, 1], [19, 99], [3, 50], [7, 7]], np.uint8)
    directory = tmp_path / f"cifar-100-{layout}"
    directory.mkdir()
    if layout == "binary":
        (directory / "test.bin").write_bytes(np.concatenate([labels, images], 1).tobytes())
        (directory / f"{level}_label_names.txt").write_text("\n".join(f"c{i}" for i in range(classes)))
    else:
        content = {b"data": images, b"coarse_labels": labels[:, 0].tolist(), b"fine_labels": labels[:, 1].tolist()}
        (directory / "test").write_bytes(pickle.dumps(content, protocol=2))
        meta = {f"{level}_label_names".encode(): [f"c{i}".encode() for i in range(classes)]}
        (directory / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    test = data.load("cifar100", tmp_path, "test", labels=level, allow_partial=True)
    assert test.labels.tolist() == labels[:, column].tolist()
    assert (len(test.classes), test.classes[-1]) == (classes, f"c{classes - 1}")
    assert np.array_equal(test.batch([0, 1, 2, 3])[0].numpy().reshape(4, 3072), images)


def test_cifar_sizes_are_checked(tmp_path: Path) -> None:
    write_cifar10(tmp_path, "bin")
    file = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    with pytest.raises(data.DataError, match=r"test_batch\.bin: expected 30730000 bytes \(10000 .* found 9219"):
        data.load("cifar10", tmp_path, "test")
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(data.DataError, match=r"test_batch\.bin: expected a positive multiple of 3073 .* found 9218"):
        data.load("cifar10", tmp_path, "test", allow_partial=True)
    file.write_bytes(content[:3073] + b"\x0a" + content[3074:])
    with pytest.raises(data.DataError, match=r"test_batch\.bin: record 1 has label 10, expected 0\.\.9"):
        data.load("cifar10", tmp_path, "test", allow_partial=True)
    (file.parent / "data_batch_4.bin").unlink()
    with pytest.raises(data.DataError, match=r"data_batch_4\.bin: cannot be read"):
        data.load("cifar10", tmp_path, allow_partial=True)
    (file.parent / "batches.meta.txt").write_text("a\nb\n")
    file.write_bytes(content)
    with pytest.raises(data.DataError, match=r"batches\.meta\.txt: expected 10 class names, found 2"):
        data.load("cifar10", tmp_path, "test", allow_partial=True)


class Command:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("exit 1",)


IMAGES, LABELS = records(2)
BAD_PICKLES = {
    "code": ({"data": Command(), "labels": LABELS}, r"refers to (posix|nt)\.system; only numpy arrays"),
    "getattr": ({"data": getattr, "labels": LABELS}, r"refers to (__builtin__|builtins)\.getattr; only numpy arrays"),
    "list": ([IMAGES, LABELS], "expected a pickled dict, found list"),
    "no labels": ({"data": IMAGES}, "no entry 'labels'; found"),
    "shape": ({"data": IMAGES[:, :-1], "labels": LABELS}, r"found uint8 \(2, 3071\)"),
    "type": ({"data": IMAGES.astype(np.int32), "labels": LABELS}, r"found int32 \(2, 3072\)"),
    "no array": ({"data": [1, 2], "labels": LABELS}, "found list"),
    "count": ({"data": IMAGES, "labels": LABELS[:1]}, r"2 images but labels of shape \(1,\)"),
    "strings": ({"data": IMAGES, "labels": ["a", "b"]}, "'labels' must be a list of integers"),
    "range": ({"data": IMAGES, "labels": [3, -1]}, r"record 1 has label -1, expected 0\.\.9"),
}


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_bad_pickles(tmp_path: Path, case: str) -> None:
    content, message = BAD_PICKLES[case]
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(data.DataError, match=rf"test_batch: .*{message}"):
        data.load("cifar10", tmp_path, "test", allow_partial=True)


def test_truncated_and_short_pickles(tmp_path: Path) -> None:
    content = pickle.dumps({"data": IMAGES, "labels": LABELS}, protocol=2)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(data.DataError, match="test_batch: expected 10000 records, found 2"):
        data.load("cifar10", tmp_path, "test")
    (tmp_path / "test_batch").write_bytes(content[:1000])
    with pytest.raises(data.DataError, match="test_batch: truncated or malformed pickle of 1000 bytes"):
        data.load("cifar10", tmp_path, "test", allow_partial=True)


def idx(array: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def digits_files(tmp_path: Path) -> tuple[Path, NDArray[np.uint8]]:
    images = np.arange(5 * 6 * 4, dtype=np.uint8).reshape(5, 6, 4)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([1, 2, 3, 9, 0], np.uint8)))
    return tmp_path, images


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(digits_files: tuple[Path, NDArray[np.uint8]], name: str, packed: bool) -> None:
    root, images = digits_files
    if packed:
        for file in list(root.iterdir()):
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    test = data.load(name, root, "test")
    assert (test.shape, len(test.classes), len(test)) == ((1, 6, 4), 10, 5)
    got, labels = test.batch(torch.tensor([4, 0]))
    assert np.array_equal(got.numpy(), images[[4, 0]][:, None])
    assert labels.tolist() == [0, 1]


def test_bad_idx_files(digits_files: tuple[Path, NDArray[np.uint8]]) -> None:
    root, images = digits_files
    image_file, label_file = root / "t10k-images-idx3-ubyte", root / "t10k-labels-idx1-ubyte"

    def check(file: Path, content: bytes, message: str) -> None:
        before = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(data.DataError, match=message):
            data.load("mnist", root, "test")
        file.write_bytes(before)

    good = idx(images)
    check(image_file, good[:-1], r"images-idx3-ubyte: expected 136 bytes for shape \(5, 6, 4\), found 135")
    check(image_file, good + b"x", "expected 136 bytes .* found 137")
    check(image_file, good[:15], "expected an idx header of 16 bytes, found 15 bytes")
    check(image_file, label_file.read_bytes() + bytes(16), "expected magic number 0x00000803, found 0x00000801")
    check(image_file, idx(images[:4]), "holds 4 images but .*labels-idx1-ubyte 5 labels")
    check(label_file, idx(np.array([1, 2, 10, 0, 0], np.uint8)), "labels-idx1-ubyte: record 2 has label 10")
    image_file.unlink()
    packed = root / "t10k-images-idx3-ubyte.gz"
    packed.write_bytes(gzip.compress(good))
    check(packed, packed.read_bytes()[:-9], r"idx3-ubyte\.gz: truncated or malformed gzip file")
    check(packed, good, r"idx3-ubyte\.gz: truncated or malformed gzip file")
    packed.unlink()
    with pytest.raises(data.DataError, match=r"neither t10k-images-idx3-ubyte nor t10k-images-idx3-ubyte\.gz"):
        data.load("mnist", root, "test")


def test_digits() -> None:
    train, test = data.load("digits"), data.load("digits", split="test")
    assert isinstance(train, data.ArrayDataset)
    assert isinstance(test, data.ArrayDataset)
    assert (len(train), len(test), train.shape) == (1347, 450, (1, 8, 8))
    assert train.mean == test.mean
    pixels = train.images.double() / 255
    assert train.mean[0] == pytest.approx(pixels.mean().item(), rel=1e-12)
    assert train.std[0] == pytest.approx(pixels.std(unbiased=False).item(), rel=1e-12)
    from sklearn.datasets import load_digits

    published = load_digits().images
    both = torch.cat([train.images, test.images]).flatten(1)
    want = torch.from_numpy(np.floor(published * 255 / 16 + 0.5)).to(torch.uint8).flatten(1)
    assert sorted(both.tolist()) == sorted(want.tolist())
    shares = torch.bincount(test.labels).double() / (torch.bincount(train.labels) + torch.bincount(test.labels))
    assert (shares - 0.25).abs().max() < 0.004
    other = data.load("digits", split="test", seed=1, test_fraction=0.5)
    assert abs(len(other) - 898) <= 5


def test_stratified_split_is_fixed() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2], np.int64)
    train, test = (stratified_split(labels, 0.5, 3, split) for split in ("train", "test"))
    assert sorted([*train, *test]) == list(range(11))
    assert labels[test].tolist() == [0, 0, 1, 1, 1]
    assert test.tolist() == [1, 3, 5, 6, 9]
    with pytest.raises(ValueError, match=r"test_fraction must lie between 0 and 1, got 1\.0"):
        stratified_split(labels, 1.0, 0, "train")


def test_load_explains_itself(tmp_path: Path) -> None:
    assert data.names() == ("digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "folder")
    assert all(data.get(name).description for name in data.names())
    for call, message in (
        (lambda: data.load("cifar01", tmp_path), "unknown data set 'cifar01', did you mean 'cifar10'"),
        (lambda: data.load("cifar10"), "cifar10: needs root=, a directory that holds cifar-10-batches-bin"),
        (lambda: data.load("cifar10", tmp_path), r"neither data_batch_1\.bin, .* nor data_batch_1, .* found"),
        (lambda: data.load("cifar10", tmp_path / "no"), "no is not a directory"),
        (lambda: data.load("cifar10", tmp_path, "val"), "split must be 'train' or 'test', got 'val'"),
        (lambda: data.load("digits", tmp_path), "digits: takes no root"),
        (lambda: data.load("digits", sed=1), "digits: unknown option 'sed', did you mean 'seed'"),
        (lambda: data.load("digits", mean=(0.5, 0.5)), "one number for each of 1 channels, got 2 and 1"),
        (lambda: data.load("digits", std=[0.0]), "std must be positive"),
        (lambda: data.load("cifar100", tmp_path, labels="all"), "must be 'fine' or 'coarse', got 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert data.load("digits", mean=[0.5], std=[2]).std == (2.0,)


def test_array_dataset_is_checked() -> None:
    good = {"labels": torch.tensor([0, 1]), "classes": ("a", "b"), "mean": (0.5,), "std": (1.0,), "split": "train"}
    images = torch.zeros(2, 1, 3, 3, dtype=torch.uint8)
    assert len(data.ArrayDataset(images=images, **good)) == 2
    for changes, message in (
        ({"images": images.float()}, "images must be uint8"),
        ({"images": images[:1]}, "1 images but 2 labels"),
        ({"labels": torch.tensor([0, 2])}, "record 1 has label 2"),
        ({"labels": torch.tensor([0, 1], dtype=torch.int32)}, "labels must be int64"),
    ):
        with pytest.raises(data.DataError, match=message):
            data.ArrayDataset(**{"images": images, **good, **changes})


def test_missing_optional_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"the digits data set needs sklearn\.datasets: .*bitstrata\[train\]"):
        data.load("digits")
