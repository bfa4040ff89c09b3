"""Batched transforms against loops over single images that draw the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitstrata import data


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator(99)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("size", "padding", "fill"), [(8, 2, 0), ((5, 7), 0, 0), ((9, 3), 3, 17), (8, 4, (1, 2, 3))])
def test_random_crop(
    dtype: torch.dtype, size: int | tuple[int, int], padding: int, fill: int | tuple[int, ...]
) -> None:
    batch = pixels(40, 3, 8, 9, dtype=dtype)
    got = data.RandomCrop(size, padding, fill)(batch, generator())
    h, w = (size, size) if isinstance(size, int) else size
    draw = generator()
    tops = torch.randint(0, 8 + 2 * padding - h + 1, (40,), generator=draw)
    lefts = torch.randint(0, 9 + 2 * padding - w + 1, (40,), generator=draw)
    colours = (fill,) * 3 if isinstance(fill, int) else fill
    want = torch.empty(40, 3, h, w, dtype=dtype)
    for i, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
        for y in range(h):
            for x in range(w):
                row, column = top + y - padding, left + x - padding
                for c in range(3):
                    inside = 0 <= row < 8 and 0 <= column < 9
                    want[i, c, y, x] = batch[i, c, row, column] if inside else colours[c]
    assert got.dtype == dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_flip(p: float) -> None:
    batch = pixels(64, 3, 4, 5)
    before = batch.clone()
    got = data.RandomHorizontalFlip(p)(batch, generator())
    chosen = torch.rand(64, generator=generator()) < p
    want = torch.stack([image.flip(2) if flip else image for image, flip in zip(batch, chosen, strict=True)])
    assert torch.equal(got, want)
    assert torch.equal(batch, before)
    assert {0.0: chosen.sum() == 0, 1.0: chosen.sum() == 64}.get(p, 0 < chosen.sum() < 64)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_random_resized_crop(dtype: torch.dtype) -> None:
    batch = pixels(16, 3, 40, 30, dtype=dtype)
    transform = data.RandomResizedCrop((9, 11))
    got = transform(batch, generator(3))
    for image, out, (top, left, h, w) in zip(batch, got, transform.boxes(16, 40, 30, generator(3)), strict=True):
        box = image[None, :, top : top + h, left : left + w].float()
        exact = F.interpolate(box, (9, 11), mode="bilinear", antialias=True)[0]
        assert (out.float() - exact).abs().max() <= (1 if dtype == torch.uint8 else 0)
    assert got.dtype == dtype


def test_random_resized_crop_boxes() -> None:
    transform = data.RandomResizedCrop(8, scale=(0.1, 0.6), ratio=(0.5, 2.0))
    boxes = torch.tensor(transform.boxes(4000, 100, 80, generator()))
    top, left, h, w = boxes.T.double()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= 100).all()
    assert (left + w <= 80).all()
    share = h * w / 8000
    assert share.min() > 0.095
    assert share.max() < 0.61
    assert share.mean() == pytest.approx(0.35, abs=0.02)
    assert (w / h).min() > 0.45
    assert (w / h).max() < 2.2
    assert (w / h).log().mean() == pytest.approx(0, abs=0.06)
    assert len({tuple(box) for box in boxes.tolist()}) > 3500


def test_random_resized_crop_falls_back_to_the_centre() -> None:
    # A strip that no box of at least nine tenths of its area can fit with a ratio near one.
    assert data.RandomResizedCrop(4, scale=(0.9, 1.0)).boxes(2, 10, 100, generator()) == [[0, 43, 10, 13]] * 2
    assert data.RandomResizedCrop(4, scale=(0.9, 1.0)).boxes(1, 100, 10, generator()) == [[43, 0, 13, 10]]
    whole = data.RandomResizedCrop(6, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    batch = pixels(3, 1, 6, 6)
    assert torch.equal(whole(batch, generator()), batch)


def test_resize_averages_when_it_shrinks() -> None:
    checkerboard = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).mul(255).to(torch.uint8)[None, None]
    small = data.Resize(8)(checkerboard)
    assert small.dtype == torch.uint8
    assert ((small.float() - 127.5).abs() <= 1).all()
    assert data.Resize(10)(pixels(1, 3, 20, 31)).shape == (1, 3, 10, 15)
    assert data.Resize((7, 40))(pixels(1, 3, 20, 31)).shape == (1, 3, 7, 40)
    same = pixels(1, 3, 20, 31)
    assert torch.equal(data.Resize(20)(same), same)


def test_center_crop() -> None:
    batch = pixels(2, 3, 8, 9)
    assert torch.equal(data.CenterCrop((4, 5))(batch), batch[:, :, 2:6, 2:7])
    assert torch.equal(data.CenterCrop(8)(batch), batch[:, :, :, 0:8])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_normalize(dtype: torch.dtype) -> None:
    batch = pixels(2, 3, 4, 4, dtype=dtype)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.5, 3.0)
    got = data.normalize(batch, mean, std)
    want = (batch.double() / 255 - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[
        :, None, None
    ]
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 1e-6
    codes = (got.double() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]) * 255
    assert torch.equal(codes.round(), batch.double())
    if dtype == torch.float64:
        assert torch.equal(batch, pixels(2, 3, 4, 4, dtype=dtype))


def test_compose_shares_one_generator() -> None:
    batch = pixels(32, 3, 8, 8)
    crop, flip = data.RandomCrop(8, 2), data.RandomHorizontalFlip()
    draw = generator(5)
    want = flip(crop(batch, draw), draw)
    composed = data.Compose((crop, flip))
    assert torch.equal(composed(batch, generator(5)), want)
    assert not torch.equal(composed(batch, generator(6)), want)


def test_errors_name_operation_and_shape() -> None:
    batch = pixels(2, 3, 8, 9)
    for call, message in (
        (
            lambda: data.RandomCrop(13, 2)(batch, generator()),
            "RandomCrop: window 13x13 exceeds the 8x9 image padded by 2",
        ),
        (lambda: data.RandomCrop(4, 1, (1, 2))(batch, generator()), "RandomCrop: fill has 2 values for 3 channels"),
        (lambda: data.RandomCrop(0)(batch, generator()), "RandomCrop: size must be a positive side"),
        (lambda: data.CenterCrop((9, 9))(batch), "CenterCrop: window 9x9 exceeds the 8x9 image"),
        (lambda: data.Resize(4)(batch[0]), r"Resize: expected a batch \(B, C, H, W\), got shape \(3, 8, 9\)"),
        (lambda: data.RandomHorizontalFlip()(batch.int(), generator()), "RandomHorizontalFlip: .* got torch.int32"),
        (lambda: data.RandomResizedCrop(4, scale=(0.0, 1.0)), "RandomResizedCrop: scale must be 0 < low <= high"),
        (lambda: data.normalize(batch, (0.5,), (0.5,)), "normalize: 1 means and 1 deviations for 3 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
