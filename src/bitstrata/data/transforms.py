"""Augmentation of whole batches, determined by an explicit generator.

A transform maps a batch (B, C, H, W), uint8 or floating point in pixel units 0..255, to a batch of the same dtype;
uint8 in, uint8 out keeps every pixel one of the 256 input codes of the integer program. Random transforms draw from
the given generator only, in an order that depends on the batch size alone, so equal generators give equal batches.
One whose `takes_part` is true takes a third argument: the batch is then a `Part` of a larger one, and gets what it
would get there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Transform = Callable[[Tensor, Generator], Tensor]


class Part(NamedTuple):
    """Images `start` and following, as many as a batch has, of `total` that are augmented together."""

    start: int
    total: int

    @classmethod
    def of(cls, batch: Tensor, part: Part | None) -> Part:
        """The given part, or the whole batch."""
        return part or cls(0, len(batch))

    def rows(self, batch: Tensor) -> slice:
        """Where the batch's own draws are among those for all."""
        return slice(self.start, self.start + len(batch))


@dataclass(frozen=True)
class Compose:
    """Applies `transforms` from first to last."""

    transforms: Sequence[Transform]

    @property
    def takes_part(self) -> bool:
        """Whether all of them do."""
        return all(getattr(transform, "takes_part", False) for transform in self.transforms)

    def __call__(self, batch: Tensor, generator: Generator, part: Part | None = None) -> Tensor:
        for transform in self.transforms:
            batch = transform(batch, generator) if part is None else transform(batch, generator, part)  # type: ignore[call-arg]
        return batch


@dataclass(frozen=True)
class RandomCrop:
    """A window of `size` (side, or (H, W)) at a uniform place of the image padded by `padding` pixels of `fill`.

    fill: one pixel value, or one a channel. Raises ValueError if the padded image is smaller than the window.
    """

    size: int | tuple[int, int]
    padding: int = 0
    fill: float | tuple[float, ...] = 0
    takes_part: ClassVar[bool] = True

    def __call__(self, batch: Tensor, generator: Generator, part: Part | None = None) -> Tensor:
        n, _, *shape = _checked("RandomCrop", batch).shape
        size = _pair("RandomCrop", self.size)
        places = [s + 2 * self.padding - k + 1 for s, k in zip(shape, size, strict=True)]
        if min(places) < 1:
            raise ValueError(
                f"RandomCrop: window {size[0]}x{size[1]} exceeds the {shape[0]}x{shape[1]} image "
                f"padded by {self.padding}"
            )
        part = Part.of(batch, part)
        draws = [torch.randint(0, count, (part.total,), generator=generator) for count in places]
        top, left = (draw[part.rows(batch)] for draw in draws)
        # All windows as a strided view, of which indexing copies one an image.
        windows = self._pad(batch).unfold(2, size[0], 1).unfold(3, size[1], 1)
        return windows[torch.arange(n), :, top, left]

    def _pad(self, batch: Tensor) -> Tensor:
        p = self.padding
        if isinstance(self.fill, int | float) or p == 0:
            return F.pad(batch, (p, p, p, p), value=self.fill if isinstance(self.fill, int | float) else 0)
        if len(self.fill) != batch.shape[1]:
            raise ValueError(f"RandomCrop: fill has {len(self.fill)} values for {batch.shape[1]} channels")
        n, c, h, w = batch.shape
        out = batch.new_tensor(self.fill).view(1, c, 1, 1).repeat(n, 1, h + 2 * p, w + 2 * p)
        out[:, :, p : p + h, p : p + w] = batch
        return out


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Mirrors each image left to right with probability `p`."""

    p: float = 0.5
    takes_part: ClassVar[bool] = True

    def __call__(self, batch: Tensor, generator: Generator, part: Part | None = None) -> Tensor:
        part = Part.of(_checked("RandomHorizontalFlip", batch), part)
        chosen = torch.rand(part.total, generator=generator)[part.rows(batch)] < self.p
        out = batch.clone()
        out[chosen] = batch[chosen].flip(3)
        return out


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box of random area and aspect ratio, scaled to `size` (side, or (H, W)): bilinear, antialiased.

    The area is uniform in `scale` (shares of the image's), the logarithm of width / height uniform in log `ratio`
    (Szegedy et al., Going Deeper with Convolutions, 2015, section 6). Of ten draws the first box that fits counts;
    if none does, the largest centred box within `ratio`. Boxes differ in size, so each image is scaled by a call of
    its own: that costs less than batched resampling matrices, and aliases nowhere, as sampling a grid would.
    """

    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    takes_part: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"RandomResizedCrop: {name} must be 0 < low <= high, got {(low, high)}")

    def __call__(self, batch: Tensor, generator: Generator, part: Part | None = None) -> Tensor:
        n, c, h, w = _checked("RandomResizedCrop", batch).shape
        part = Part.of(batch, part)
        size = _pair("RandomResizedCrop", self.size)
        out = batch.new_empty((n, c, *size))
        boxes = self.boxes(part.total, h, w, generator)
        for i, (top, left, height, width) in enumerate(boxes[part.rows(batch)]):
            out[i] = _resample(batch[i : i + 1, :, top : top + height, left : left + width], size)[0]
        return out

    def boxes(self, n: int, h: int, w: int, generator: Generator) -> list[list[int]]:
        """Draws n boxes [top, left, height, width] in an h x w image."""
        area, aspect, y, x = torch.rand((4, n, 10), generator=generator, dtype=torch.float64)
        area = h * w * (self.scale[0] + (self.scale[1] - self.scale[0]) * area)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = (low + (high - low) * aspect).exp()
        width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (width >= 1) & (width <= w) & (height >= 1) & (height <= h)
        top, left = (y * (h - height + 1)).floor(), (x * (w - width + 1)).floor()
        first = fits.to(torch.uint8).argmax(1, keepdim=True)
        drawn = torch.stack([part.gather(1, first).squeeze(1) for part in (top, left, height, width)], 1)
        fallback = torch.tensor(self._centred(h, w), dtype=torch.float64)
        return torch.where(fits.any(1, keepdim=True), drawn, fallback).long().tolist()

    def _centred(self, h: int, w: int) -> tuple[int, int, int, int]:
        width = min(w, max(1, round(h * self.ratio[1])))
        height = min(h, max(1, round(w / self.ratio[0])))
        return (h - height) // 2, (w - width) // 2, height, width


@dataclass(frozen=True)
class Resize:
    """Bilinear, antialiased. `size` is (H, W), or the length of the shorter side, which keeps the aspect ratio."""

    size: int | tuple[int, int]
    takes_part: ClassVar[bool] = True

    def __call__(self, batch: Tensor, generator: Generator | None = None, part: Part | None = None) -> Tensor:
        h, w = _checked("Resize", batch).shape[2:]
        if isinstance(self.size, int):
            short = min(h, w)
            return _resample(batch, _pair("Resize", (max(1, h * self.size // short), max(1, w * self.size // short))))
        return _resample(batch, _pair("Resize", self.size))


@dataclass(frozen=True)
class CenterCrop:
    """The central window of `size` (side, or (H, W)); ValueError if the image is smaller."""

    size: int | tuple[int, int]
    takes_part: ClassVar[bool] = True

    def __call__(self, batch: Tensor, generator: Generator | None = None, part: Part | None = None) -> Tensor:
        h, w = _checked("CenterCrop", batch).shape[2:]
        height, width = _pair("CenterCrop", self.size)
        if height > h or width > w:
            raise ValueError(f"CenterCrop: window {height}x{width} exceeds the {h}x{w} image")
        top, left = (h - height) // 2, (w - width) // 2
        return batch[:, :, top : top + height, left : left + width]


def normalize(batch: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixel / 255 - mean) / std a channel: uint8 or floating (B, C, H, W) in 0..255 to contiguous float32."""
    channels = _checked("normalize", batch).shape[1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"normalize: {len(mean)} means and {len(std)} deviations for {channels} channels")
    shift, scale = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return batch.to(torch.float32).contiguous().div(255).sub_(shift).div_(scale)


def _resample(batch: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(batch.shape[2:]) == size:
        return batch
    return F.interpolate(batch, size, mode="bilinear", antialias=True)


def _checked(name: str, batch: Tensor) -> Tensor:
    if batch.ndim != 4:
        raise ValueError(f"{name}: expected a batch (B, C, H, W), got shape {tuple(batch.shape)}")
    if batch.dtype != torch.uint8 and not batch.is_floating_point():
        raise ValueError(f"{name}: expected uint8 or floating point pixels, got {batch.dtype}")
    return batch


def _pair(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name}: size must be a positive side or (height, width), got {size}")
    return pair
