"""A user's own data: torch Datasets, arrays, images and series, and what is wrong with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset as TorchDataset

from bitstrata import data
from bitstrata.data import DataError, FloatDataset, from_pairs

PIXELS = np.random.RandomState(0).randint(0, 256, (5, 3, 6, 4)).astype(np.uint8)
LABELS = [0, 2, 1, 1, 0]


class Own(TorchDataset):  # type: ignore[type-arg]
    """What users write."""

    def __init__(self, inputs: Any, labels: Any = LABELS) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], self.labels[index]


@pytest.mark.parametrize(
    "inputs",
    [
        PIXELS,
        list(torch.from_numpy(PIXELS)),
        [Image.fromarray(p.transpose(1, 2, 0)) for p in PIXELS],
        torch.from_numpy(PIXELS).float() / 255,  # torchvision's ToTensor
        (PIXELS / 255).astype(np.float64),
    ],
    ids=["uint8 arrays", "uint8 tensors", "PIL", "ToTensor", "float64"],
)
def test_pixels_in_every_form(inputs: Any) -> None:
    found = from_pairs(Own(inputs), "test")
    assert isinstance(found, data.ArrayDataset)
    assert np.array_equal(found.images.numpy(), PIXELS)
    assert (found.labels.tolist(), found.classes, found.shape, found.split) == (
        LABELS,
        ("0", "1", "2"),
        (3, 6, 4),
        "test",
    )
    images, _ = data.Loader(found, 5, train=False).batch(0, 0)
    assert torch.equal(images, torch.from_numpy(PIXELS).float() / 255)  # what a network trained on ToTensor reads


def test_two_arrays_grey_images_and_names() -> None:
    found = from_pairs((PIXELS[:, 0], np.array(LABELS)), classes=("a", "b", "c", "d"), mean=(0.4,), std=(0.2,))
    assert isinstance(found, data.ArrayDataset)
    assert (found.shape, found.classes, found.mean, found.std) == ((1, 6, 4), ("a", "b", "c", "d"), (0.4,), (0.2,))


@pytest.mark.parametrize("shape", [(7,), (3, 9), (3, 6, 4)])
def test_floats_stay_as_they_are(shape: tuple[int, ...]) -> None:
    inputs = torch.randn(5, *shape, dtype=torch.float64)
    found = from_pairs((inputs, torch.tensor(LABELS)))
    assert isinstance(found, FloatDataset)
    assert found.shape == shape
    batch, labels = data.Loader(found, 5, train=False).batch(0, 0)
    assert torch.equal(batch, inputs.float())
    assert labels.tolist() == LABELS


WRONG: dict[str, tuple[Any, str]] = {
    "no pairs": (5, r"expected pairs \(input, label\) with a length, such as a torch Dataset, .* got int"),
    "no items": (Own([], []), "no items"),
    "no pair": ([1, 2], r"item 0 must be a pair \(input, label\), got int"),
    "three values": ([(1, 2, 3)], r"item 0 must be a pair \(input, label\), got 3 values"),
    "channels last": (Own(PIXELS.transpose(0, 2, 3, 1)), r"shape \(6, 4, 3\), which looks like \(H, W, C\).*transpose"),
    "int64": (Own(PIXELS.astype(np.int64)), r"item 0 is torch\.int64 of shape .*; expected uint8 pixels or floats"),
    "scalar": (Own(np.zeros(5, np.float32)), r"of shape \(\); expected \(C, H, W\) or \(H, W\) images"),
    "objects": (Own([{"a": 1}] * 5), "input of item 0 is a dict that is no array of numbers"),
    "two sizes": (
        Own([PIXELS[0], PIXELS[0, :, :3]] * 2, LABELS[:4]),
        r"item 1 is .*\(3, 3, 4\), but item 0 .*\(3, 6, 4\)",
    ),
    "nan": (
        Own([np.full((2, 3), v, np.float32) for v in (0, np.nan, 1, 1, 1)]),
        "1 inputs hold NaN .* first is item 1",
    ),
    "float label": (Own(PIXELS, [0.5] * 5), r"label of item 0 is 0\.5; expected a class number"),
    "one-hot": (Own(PIXELS, np.eye(5)), r"label of item 0 is array\(.*expected a class number"),
    "text label": (Own(PIXELS, list("abcde")), "label of item 0 is 'a'; expected a class number"),
    "negative": (Own(PIXELS, [0, -1, 0, 0, 0]), "label of item 1 is -1; class numbers start at 0"),
    "lengths": ((PIXELS, np.zeros(4, np.int64)), r"inputs \(N, \.\.\.\) and labels \(N,\), got shapes .* and \(4,\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    pairs, message = WRONG[name]
    with pytest.raises((DataError, TypeError), match=message):
        from_pairs(pairs)


def test_random_augmentation_is_refused() -> None:
    class Random(Own):
        def __getitem__(self, index: int) -> Any:
            return torch.rand(3, 6, 4), 0

    with pytest.raises(DataError, match="item 0 is another at each reading; give inputs without random augmentation"):
        from_pairs(Random(PIXELS))


def test_names_and_statistics_are_checked() -> None:
    with pytest.raises(DataError, match=r"label 2 but 2 class names, of labels 0\.\.1"):
        from_pairs((PIXELS, LABELS_ARRAY), classes=("a", "b"))
    with pytest.raises(DataError, match="these inputs are floats, which are not normalized"):
        from_pairs((np.random.randn(5, 3).astype(np.float32), LABELS_ARRAY), mean=(0.5,) * 3)


LABELS_ARRAY = np.array(LABELS)
