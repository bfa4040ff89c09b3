"""Short trainings of ResNet-20 on CIFAR-10, whose networks the studies of loss surfaces and of gradients look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitstrata import data, integer_, zoo
from bitstrata.data import Compose, Loader, RandomCrop, RandomHorizontalFlip
from bitstrata.fused import FuseError, fuse

Options = dict[str, object] | None
SETTINGS: dict[str, Options] = {
    "float": None,
    "quantized, L2 norm": {"w": 4, "a": 4, "g": 4, "norm": "l2_quantized"},
    "quantized, float norm": {"w": 4, "a": 4, "g": 4, "norm": "batch"},
    "quantized, L1 norm": {"w": 4, "a": 4, "g": 4, "norm": "l1_quantized"},
}


def network(setting: str, seed: int) -> nn.Module:
    """ResNet-20 as the setting has it; the initial weights of a seed are the same for all."""
    torch.manual_seed(seed)
    model = zoo.create("resnet20")
    options = SETTINGS[setting]
    return model if options is None else integer_(model, torch.randn(4, 3, 32, 32), seed=seed, **options)  # type: ignore[arg-type]


def fastest(model: nn.Module) -> nn.Module:
    """The network in its fused form, which gives the same results, or itself where there is none."""
    try:
        return fuse(model)
    except FuseError:
        return model


def loader(root: Path, *, train: bool, batch: int, seed: int = 0) -> Loader:
    """CIFAR-10; training images are cropped at random after padding by 4, and mirrored."""
    dataset = data.load("cifar10", root, "train" if train else "test")
    changes = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip()]) if train else None
    return Loader(dataset, batch, train=train, transform=changes, seed=seed, drop_last=train, prefetch=False)


def train(
    model: nn.Module,
    batches: Loader,
    steps: int,
    rate: float,
    at_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """SGD (momentum 0.9, weight decay 1e-4, the rate falling as a cosine); losses. `at_step` sees the model before
    each step and after the last."""
    fused = fastest(model).train()
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in range(steps):
        at_step(step)
        images, labels = batches.batch(step // len(batches), step % len(batches))
        loss = F.cross_entropy(fused(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    at_step(steps)
    return losses


def accuracy(model: nn.Module, batches: Loader, count: int) -> float:
    """Of the first `count` batches, in evaluation mode, in percent."""
    model.eval()
    hits: list[Tensor] = []
    with torch.no_grad():
        for step in range(min(count, len(batches))):
            images, labels = batches.batch(0, step)
            hits.append(model(images).argmax(1) == labels)
    return 100 * float(torch.cat(hits).float().mean())
