"""The network and the data of these examples: small enough for seconds on one core."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bitstrata as bs


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    """A residual network on images (N, 1, 8, 8); nothing in it knows of quantization."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.fc = nn.Linear(width * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(self.blocks(self.stem(x)), 4).flatten(1))


def datasets(quick: bool) -> tuple[TensorDataset, TensorDataset]:
    """Training and test set: images float32 (N, 1, 8, 8) in [0, 1], and labels."""
    train, test = (bs.data.load("digits", split=split) for split in ("train", "test"))
    count = 640 if quick else len(train)
    (images, labels), (test_images, test_labels) = train.batch(range(count)), test.batch(range(len(test)))
    return TensorDataset(images / 255, labels), TensorDataset(test_images / 255, test_labels)


def loaders(quick: bool, batch_size: int = 32) -> tuple[DataLoader, DataLoader]:
    """Batches of both sets."""
    train, test = datasets(quick)
    return DataLoader(train, batch_size, shuffle=True, drop_last=True), DataLoader(test, 256)


def pretrained(train: DataLoader, epochs: int) -> Net:
    """A float network: quantization starts from one that is trained."""
    model = Net().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    for _ in range(epochs):
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracies(model: nn.Module, test: DataLoader) -> dict[int, float]:
    """Share of right answers at every precision of a quantized model."""
    model.eval()
    found = {}
    for bits in bs.precisions(model):
        with bs.precision(model, bits):
            found[bits] = sum(int((model(x).argmax(1) == y).sum()) for x, y in test) / len(test.dataset)
    return found
