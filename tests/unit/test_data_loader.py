"""The loader: every batch a function of its position, one thread that never stays behind."""

from __future__ import annotations

import threading
from itertools import islice

import pytest
import torch
from torch import Generator, Tensor

from bitstrata import data

AUGMENT = data.Compose((data.RandomCrop(6, 2), data.RandomHorizontalFlip()))


def numbered(n: int) -> data.ArrayDataset:
    """Image i is all i, so a batch tells which images it holds."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 6, 6)
    return data.ArrayDataset(
        images=images,
        labels=torch.arange(n) % 7,
        classes=tuple("abcdefg"),
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255,) * 3,
        split="train",
    )


def random_images(n: int) -> data.ArrayDataset:
    images = torch.randint(0, 256, (n, 3, 6, 6), generator=Generator().manual_seed(1), dtype=torch.uint8)
    return data.ArrayDataset(
        images=images,
        labels=torch.arange(n) % 2,
        classes=("a", "b"),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
        split="train",
    )


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("bitstrata")]


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_visits_every_image_once(prefetch: bool, drop_last: bool) -> None:
    dataset = numbered(50)
    loader = data.Loader(dataset, 8, train=True, seed=3, drop_last=drop_last, prefetch=prefetch)
    orders = []
    for epoch in range(2):
        batches = list(loader.epoch(epoch))
        assert len(batches) == len(loader) == (6 if drop_last else 7)
        assert all(images.dtype == torch.float32 and labels.dtype == torch.int64 for images, labels in batches)
        seen = torch.cat([images[:, 0, 0, 0] for images, _ in batches]).round().long()
        assert torch.equal(torch.cat([labels for _, labels in batches]), seen % 7)
        assert len(set(seen.tolist())) == len(seen) == (48 if drop_last else 50)
        orders.append(seen.tolist())
    assert orders[0] != orders[1]
    other = data.Loader(dataset, 8, train=True, seed=4, drop_last=drop_last, prefetch=prefetch)
    assert torch.cat([x[:, 0, 0, 0] for x, _ in other.epoch(0)]).round().long().tolist() != orders[0]


def test_evaluation_keeps_the_order() -> None:
    loader = data.Loader(numbered(20), 6, train=False)
    for epoch in range(2):
        seen = torch.cat([images[:, 0, 0, 0] for images, _ in loader.epoch(epoch)])
        assert seen.round().long().tolist() == list(range(20))


@pytest.mark.parametrize("start", [0, 1, 4, 6, 7])
@pytest.mark.parametrize("prefetch", [True, False])
def test_resuming_is_bit_identical(start: int, prefetch: bool) -> None:
    dataset = random_images(50)
    whole = list(data.Loader(dataset, 8, train=True, transform=AUGMENT, seed=5).epoch(2))
    torch.manual_seed(123)  # global randomness has no say
    resumed = data.Loader(dataset, 8, train=True, transform=AUGMENT, seed=5, prefetch=prefetch)
    assert same(list(resumed.epoch(2, start)), whole[start:])
    if start < len(whole):
        assert same([resumed.batch(2, start)], whole[start : start + 1])


def test_augmentation_depends_on_seed_epoch_and_step() -> None:
    drawn: set[int] = set()

    def record(batch: Tensor, generator: Generator) -> Tensor:
        drawn.add(int(torch.randint(0, 2**62, (), generator=generator)))
        return batch

    for seed in range(3):
        loader = data.Loader(numbered(24), 8, train=True, transform=record, seed=seed)
        for epoch in range(3):
            list(loader.epoch(epoch))
    assert len(drawn) == 27


def test_normalization_comes_after_the_transform() -> None:
    dataset = random_images(10)
    transform = data.CenterCrop(4)
    loader = data.Loader(dataset, 10, train=False, transform=transform)
    (images, _) = loader.batch(0, 0)
    assert torch.equal(images, data.normalize(transform(dataset.images), dataset.mean, dataset.std))


@pytest.mark.parametrize("prefetch", [True, False])
def test_exceptions_arrive_at_their_batch(prefetch: bool) -> None:
    def explode(batch: Tensor, generator: Generator) -> Tensor:
        if (batch[:, 0, 0, 0] == 17).any():
            raise RuntimeError("image 17")
        return batch

    loader = data.Loader(numbered(40), 5, train=False, transform=explode, prefetch=prefetch)
    batches = loader.epoch(0)
    assert [int(images[0, 0, 0, 0].round()) for images, _ in islice(batches, 3)] == [0, 5, 10]
    with pytest.raises(RuntimeError, match="image 17"):
        next(batches)
    assert workers() == []


def test_no_thread_stays_behind() -> None:
    loader = data.Loader(numbered(100), 5, train=True, transform=AUGMENT)
    batches = loader.epoch(0)
    assert workers() == []
    next(batches)
    assert workers() == ["bitstrata-loader_0"]
    batches.close()  # type: ignore[attr-defined]
    assert workers() == []
    for _ in loader.epoch(1):
        break
    assert workers() == []
    list(loader.epoch(2))
    assert workers() == []


def test_two_epochs_may_run_side_by_side() -> None:
    loader = data.Loader(random_images(30), 8, train=True, transform=AUGMENT, seed=1)
    apart = [list(loader.epoch(0)), list(loader.epoch(1))]
    together = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    assert same([left for left, _ in together], apart[0])
    assert same([right for _, right in together], apart[1])


def test_bad_arguments() -> None:
    loader = data.Loader(numbered(20), 6, train=True)
    for call, message in (
        (lambda: data.Loader(numbered(20), 0, train=True), "batch_size must be at least 1, got 0"),
        (lambda: data.Loader(numbered(20), 5, train=True, seed=-1), "seed must not be negative, got -1"),
        (lambda: data.Loader(numbered(20), 21, train=True, drop_last=True), "no batch of 21 in a data set of 20"),
        (lambda: loader.epoch(0, 5), r"Loader\.epoch: need epoch >= 0 and step in 0\.\.4, got \(0, 5\)"),
        (lambda: loader.epoch(-1), r"got \(-1, 0\)"),
        (lambda: loader.batch(0, 4), r"Loader\.batch: need epoch >= 0 and step in 0\.\.3, got \(0, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
