"""A user's own data: any sequence of (input, label) pairs, such as a torch Dataset, or two arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .dataset import ArrayDataset, DataError, Dataset, Indices, as_index

# Beyond this, reading everything into memory is no service: such data need a Dataset that reads a batch at a time.
LIMIT_BYTES = 4 << 30
_EXACT = 1e-4  # how far pixel / 255 may lie from a whole number of 255ths, in pixels


@dataclass(frozen=True, kw_only=True, eq=False)
class FloatDataset(Dataset):
    """Inputs that are no pixels: float32 (N, F), (N, C, L) or (N, C, H, W), as the network takes them.

    A network's first layer learns an 8-bit grid for them. `mean` and `std` are 0 and 1 a channel and mean nothing.
    """

    inputs: Tensor

    def __post_init__(self) -> None:
        if self.inputs.dtype != torch.float32 or not 2 <= self.inputs.ndim <= 4:
            raise DataError(
                "data set: inputs must be float32 of shape (N, F), (N, C, L) or (N, C, H, W), got "
                f"{self.inputs.dtype} {tuple(self.inputs.shape)}"
            )
        if len(self.inputs) != len(self.labels):
            raise DataError(f"data set: {len(self.inputs)} inputs but {len(self.labels)} labels")
        super().__post_init__()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.inputs.shape[1:])

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        index = as_index(indices)
        return self.inputs[index], self.labels[index]

    def normalized(self, images: Tensor) -> Tensor:
        return images


def from_pairs(
    pairs: Any,
    split: str = "train",
    *,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ArrayDataset | FloatDataset:
    """A data set in memory from a user's own (input, label) pairs, each read once.

    Inputs may be tensors, numpy arrays or PIL images. uint8 (C, H, W) or (H, W), and floats in [0, 1] that are whole
    255ths, as torchvision's ToTensor gives them, are pixels, which an integer program reads as they are. Other floats
    (normalized images, time series (C, L), features (F,)) stay floats.

    Args:
        pairs: anything with a length whose item i is (input, label), or a tuple of two arrays: inputs and labels.
        split: "train" or "test".
        classes: class names; by default the attribute `classes` of `pairs`, else 0 to the largest label.
        mean, std: of pixel / 255 a channel; by default 0 and 1, so that a network reads pixel / 255.

    Raises:
        TypeError: `pairs` or an item has another form.
        DataError: no items; inputs of several shapes or of a shape or dtype that no network here takes; labels that are
            no class numbers; an item that changes from one reading to the next; more than 4 GiB.
    """
    inputs, labels = _arrays(pairs) if _two_arrays(pairs) else _read(pairs)
    names = _classes(labels, classes if classes is not None else getattr(pairs, "classes", None))
    pixels = _pixels(inputs)
    if pixels is None:
        if mean is not None or std is not None:
            raise DataError("data set: mean and std are for pixels; these inputs are floats, which are not normalized")
        channels = inputs.shape[1]
        return FloatDataset(
            inputs=inputs.contiguous(), labels=labels, classes=names, mean=(0.0,) * channels, std=(1.0,) * channels,
            split=split,
        )  # fmt: skip
    channels = pixels.shape[1]
    return ArrayDataset(
        images=pixels,
        labels=labels,
        classes=names,
        mean=(0.0,) * channels if mean is None else tuple(map(float, mean)),
        std=(1.0,) * channels if std is None else tuple(map(float, std)),
        split=split,
    )


def _two_arrays(pairs: Any) -> bool:
    return isinstance(pairs, tuple | list) and len(pairs) == 2 and all(hasattr(part, "shape") for part in pairs)


def _arrays(pairs: Any) -> tuple[Tensor, Tensor]:
    inputs, labels = (torch.as_tensor(part) for part in pairs)
    if inputs.ndim == 0 or labels.ndim != 1 or len(inputs) != len(labels):
        raise DataError(
            f"data set: two arrays must be inputs (N, ...) and labels (N,), got shapes {tuple(inputs.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if not len(inputs):
        raise DataError("data set: no items")
    _check_input(inputs[0], 0)
    return _with_channel(_number_type(inputs)), _labels(labels.tolist(), labels.dtype)


def _read(pairs: Any) -> tuple[Tensor, Tensor]:
    if not hasattr(pairs, "__len__") or not hasattr(pairs, "__getitem__"):
        raise TypeError(
            "data set: expected pairs (input, label) with a length, such as a torch Dataset, or a tuple of two arrays, "
            f"got {type(pairs).__name__}"
        )
    count = len(pairs)
    if count == 0:
        raise DataError("data set: no items")
    first, _ = _pair(pairs[0], 0)
    if not torch.equal(first, _pair(pairs[0], 0)[0]):
        raise DataError(
            "data set: item 0 is another at each reading; give inputs without random augmentation (--augment, or a "
            "loop of your own, augments batches)"
        )
    if count * first.numel() * first.element_size() > LIMIT_BYTES:
        raise DataError(
            f"data set: {count} items of shape {tuple(first.shape)} are more than {LIMIT_BYTES >> 30} GiB; give a "
            "bitstrata.data.Dataset, which reads a batch at a time (FolderDataset reads image files)"
        )
    inputs = torch.empty((count, *first.shape), dtype=first.dtype)
    labels: list[Any] = []
    for i, (value, label) in _items(pairs, count):
        if value.shape != first.shape or value.dtype != first.dtype:
            raise DataError(
                f"data set: item {i} is {value.dtype} {tuple(value.shape)}, but item 0 {first.dtype} "
                f"{tuple(first.shape)}; all must have one shape and dtype"
            )
        inputs[i] = value
        labels.append(label)
    return _with_channel(_number_type(inputs)), _labels(labels)


def _items(pairs: Any, count: int) -> Iterator[tuple[int, tuple[Tensor, Any]]]:
    for i in range(count):
        yield i, _pair(pairs[i], i)


def _pair(item: Any, index: int) -> tuple[Tensor, Any]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        what = f"{len(item)} values" if isinstance(item, tuple | list) else type(item).__name__
        raise TypeError(f"data set: item {index} must be a pair (input, label), got {what}")
    value, label = item
    if not isinstance(value, Tensor):
        image = hasattr(value, "getbands")  # a PIL image: (H, W) or (H, W, bands)
        array = np.array(value)
        if array.dtype == object or array.dtype.kind not in "biuf":
            raise DataError(
                f"data set: the input of item {index} is a {type(value).__name__} that is no array of numbers"
            )
        value = torch.from_numpy(array.transpose(2, 0, 1).copy() if image and array.ndim == 3 else array)
    _check_input(value, index)
    return value, label


def _check_input(value: Tensor, index: int) -> None:
    shape = tuple(value.shape)
    what = f"data set: the input of item {index} is {value.dtype} of shape {shape}"
    if value.dtype != torch.uint8 and not value.is_floating_point():
        raise DataError(f"{what}; expected uint8 pixels or floats")
    if not 1 <= len(shape) <= 3 or 0 in shape:
        raise DataError(f"{what}; expected (C, H, W) or (H, W) images, (C, L) series, or (F,) features")
    if len(shape) == 3 and shape[0] > 4 >= shape[2]:
        raise DataError(f"{what}, which looks like (H, W, C); networks take (C, H, W): transpose it to channels first")
    if value.dtype == torch.uint8 and len(shape) == 1:
        raise DataError(f"{what}; pixels need (C, H, W) or (H, W); convert features to float32")


def _number_type(inputs: Tensor) -> Tensor:
    """uint8 as it is, every kind of float as float32; DataError where one is not finite."""
    if inputs.dtype == torch.uint8:
        return inputs
    inputs = inputs.to(torch.float32)
    wrong = (~torch.isfinite(inputs)).flatten(1).any(1).nonzero().flatten()
    if len(wrong):
        raise DataError(f"data set: {len(wrong)} inputs hold NaN or infinity, the first is item {int(wrong[0])}")
    return inputs


def _with_channel(inputs: Tensor) -> Tensor:
    """(N, H, W) of pixels as (N, 1, H, W)."""
    return inputs.unsqueeze(1) if inputs.dtype == torch.uint8 and inputs.ndim == 3 else inputs


def _pixels(inputs: Tensor) -> Tensor | None:
    """uint8 images (N, C, H, W), if that is what the inputs are."""
    if inputs.dtype == torch.uint8:
        return inputs
    if inputs.ndim != 4 or float(inputs.min()) < 0 or float(inputs.max()) > 1:
        return None
    scaled = inputs * 255
    whole = scaled.round()
    # An image of zeros and ones only is as much a mask as it is pixels; it has whole 255ths either way.
    return whole.to(torch.uint8) if float((scaled - whole).abs().max()) < _EXACT else None


def _labels(labels: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
    for i, label in enumerate(labels):
        value = label.item() if hasattr(label, "item") and getattr(label, "ndim", 0) == 0 else label
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            shown = f"{label!r}" if dtype is None else f"{label!r} ({dtype})"
            raise DataError(f"data set: the label of item {i} is {shown}; expected a class number, an integer from 0")
        if value < 0:
            raise DataError(f"data set: the label of item {i} is {value}; class numbers start at 0")
    return torch.tensor([int(label) for label in labels], dtype=torch.int64)


def _classes(labels: Tensor, names: Sequence[str] | None) -> tuple[str, ...]:
    largest = int(labels.max())
    if names is None:
        return tuple(str(i) for i in range(largest + 1))
    if largest >= len(names):
        raise DataError(f"data set: label {largest} but {len(names)} class names, of labels 0..{len(names) - 1}")
    return tuple(str(name) for name in names)
