"""Shares of a loader for several ranks: joined, they are one loader's larger batches."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from bitstrata import data

TRANSFORMS: dict[str, data.Transform | None] = {
    "none": None,
    "crop_flip": data.Compose((data.RandomCrop(6, 2), data.RandomHorizontalFlip())),
    "resized": data.Compose((data.Resize(9), data.RandomResizedCrop(5), data.CenterCrop(4))),
    "foreign": data.Compose(
        (data.RandomCrop(6, 1), lambda x, g: x + torch.randint(0, 9, (len(x), 1, 1, 1), generator=g).to(x))
    ),
}


def pictures(n: int) -> data.ArrayDataset:
    return data.ArrayDataset(
        images=torch.randint(0, 200, (n, 3, 6, 6), generator=Generator().manual_seed(1), dtype=torch.uint8),
        labels=torch.arange(n) % 2,
        classes=("a", "b"),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
        split="train",
    )


def joined(parts: list[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.cat([images for images, _ in step]), torch.cat([labels for _, labels in step]))
        for step in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("prefetch", [True, False])
def test_shares_join_to_the_larger_batches(transform: str, ranks: int, prefetch: bool) -> None:
    def loader(size: int) -> data.Loader:
        return data.Loader(pictures(43), size, train=True, transform=TRANSFORMS[transform], seed=5, prefetch=prefetch)

    whole = loader(4 * ranks)
    shares = [loader(4).shard(rank, ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(whole)}
    for epoch, start in ((0, 0), (1, 2)):
        found = joined([list(share.epoch(epoch, start)) for share in shares])
        for (images, labels), (x, y) in zip(found, whole.epoch(epoch, start), strict=True):
            assert torch.equal(images, x)
            assert torch.equal(labels, y)
    sizes = [[len(labels) for _, labels in share.epoch(0)] for share in shares]
    assert max(last[-1] for last in sizes) - min(last[-1] for last in sizes) <= 1
    assert torch.equal(shares[-1].batch(1, 2)[0], list(shares[-1].epoch(1))[2][0])


def test_a_share_augments_its_own_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    pad = data.RandomCrop._pad
    monkeypatch.setattr(data.RandomCrop, "_pad", lambda self, x: seen.append(len(x)) or pad(self, x))
    share = data.Loader(pictures(24), 4, train=True, transform=TRANSFORMS["crop_flip"], prefetch=False).shard(1, 3)
    assert [len(labels) for _, labels in share.epoch(0)] == seen == [4, 4]


def test_every_nth_batch() -> None:
    loader = data.Loader(pictures(41), 4, train=False)
    assert len(loader) == 11
    whole = list(loader.epoch(0))
    for ranks in (1, 2, 4):
        for rank in range(ranks):
            mine = list(loader.epoch(0, rank, ranks))
            assert len(mine) == len(whole[rank::ranks])
            assert all(torch.equal(x, y) for (x, _), (y, _) in zip(mine, whole[rank::ranks], strict=True))


def test_impossible_shares() -> None:
    loader = data.Loader(pictures(13), 2, train=True)
    with pytest.raises(ValueError, match="need 0 <= rank < ranks, got rank=2, ranks=2"):
        loader.shard(2, 2)
    with pytest.raises(ValueError, match="13 images in batches of 2 on each of 3 ranks leave 1 for the last step"):
        loader.shard(0, 3)
    with pytest.raises(ValueError, match="share of rank 1 of 2 already"):
        data.Loader(pictures(12), 2, train=True).shard(1, 2).shard(0, 2)
    with pytest.raises(ValueError, match="13 images in batches of 5 on each of 3 ranks"):
        data.Loader(pictures(13), 5, train=True, drop_last=True).shard(0, 3)
    assert len(data.Loader(pictures(13), 2, train=True, drop_last=True).shard(0, 3)) == 2
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        loader.epoch(0, 0, 0)


def test_the_loader_itself_stays() -> None:
    loader = data.Loader(pictures(12), 2, train=True)
    before = loader.batch(0, 1)
    loader.shard(1, 3)
    assert len(loader) == 6
    assert torch.equal(loader.batch(0, 1)[0], before[0])
