"""Image folders written by the test itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from bitstrata import data


def write(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def random_pixels(seed: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(4):
        write(tmp_path / "train" / "cat" / f"{i}.png", random_pixels(i, 6, 5, 3))
        write(tmp_path / "train" / "dog" / f"{i}.PNG", random_pixels(10 + i, 6, 5, 3))
    write(tmp_path / "val" / "dog" / "0.png", random_pixels(20, 6, 5, 3))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    return tmp_path


def test_split_directories(root: Path) -> None:
    train, test = data.load("folder", root), data.load("folder", root, "test")
    assert (train.shape, train.classes, train.labels.tolist()) == ((3, 6, 5), ("cat", "dog"), [0] * 4 + [1] * 4)
    images, labels = train.batch([5, 0, 5])
    want = np.stack([random_pixels(11, 6, 5, 3), random_pixels(0, 6, 5, 3), random_pixels(11, 6, 5, 3)])
    assert np.array_equal(images.numpy(), want.transpose(0, 3, 1, 2))
    assert labels.tolist() == [1, 0, 1]
    assert (test.classes, test.labels.tolist()) == (("cat", "dog"), [1])
    assert tuple(train.batch([])[0].shape) == (0, 3, 6, 5)


def test_seeded_split(root: Path) -> None:
    parts = [
        data.load("folder", root / "train", split, test_fraction=0.25, seed=7, workers=1) for split in ("train", "test")
    ]
    assert [part.labels.tolist() for part in parts] == [[0, 0, 0, 1, 1, 1], [0, 1]]
    pixels = torch.cat([part.batch(range(len(part)))[0] for part in parts]).flatten(1).tolist()
    assert len({tuple(image) for image in pixels}) == 8


def test_sizes_and_channels(root: Path) -> None:
    write(root / "train" / "cat" / "large.png", random_pixels(30, 40, 20, 3))
    scaled = data.load("folder", root, size=(8, 6), channels=1)
    assert scaled.shape == (1, 8, 6)
    assert len(scaled.mean) == 1
    assert tuple(scaled.batch(range(9))[0].shape) == (9, 1, 8, 6)
    plain = np.full((20, 40, 3), 77, np.uint8)
    plain[:, :10] = plain[:, 30:] = 200  # cut off: size 20 keeps the middle 20 columns
    write(root / "train" / "cat" / "0.png", plain)
    assert (data.load("folder", root, size=20).batch([0])[0] == 77).all()
    write(root / "train" / "cat" / "0.png", random_pixels(0, 6, 5, 3))
    with pytest.raises(data.DataError, match=r"large\.png: image is 40x20 but the first one 6x5 .* give size="):
        data.load("folder", root).batch([4])


def test_broken_folders(root: Path) -> None:
    broken = root / "train" / "dog" / "1.PNG"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(data.DataError, match=rf"1\.PNG: not a readable image of {len(content) // 2} bytes"):
        data.load("folder", root).batch([5])
    broken.unlink()
    train = data.load("folder", root)
    (root / "train" / "dog" / "0.PNG").unlink()
    with pytest.raises(data.DataError, match=r"0\.PNG: cannot be read"):
        train.batch([4])
    write(root / "val" / "emu" / "0.png", random_pixels(0, 6, 5, 3))
    (root / "none").mkdir()
    for place, options, message in (
        (root, {"split": "test"}, "val has classes that .*train lacks: emu"),
        (root / "none", {}, "no directory train in .*none; expected .*CLASS"),
        (root / "none", {"test_fraction": 0.5}, "no image file .* in any class directory"),
        (root / "absent", {}, "absent is not a directory"),
        (root, {"channels": 2}, "channels must be 1 or 3, got 2"),
        (root, {"size": 0}, "size must be positive, got 0"),
        (root, {"workers": 0}, "workers must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load("folder", place, **options)
