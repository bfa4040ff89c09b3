"""Integer training of ResNet-20 on CIFAR-10: widths, groups and normalizations."""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from _study import Metrics, Options, Study, converted, main, settings
from torch import nn

import bitstrata
from bitstrata import data, zoo

FOUR = {"w": 4, "a": 4, "g": 4}
SETTINGS = {
    **settings(4),
    "unsigned": {**FOUR, "unsigned_nonneg": True},
    "clipped": {**FOUR, "unsigned_nonneg": True, "clip_ratio": 0.5},
    "unsigned 8/4/4": {**FOUR, "unsigned_nonneg": True, "w": 8},
    "unsigned 4/8/4": {**FOUR, "unsigned_nonneg": True, "a": 8},
    "unsigned 4/4/8": {**FOUR, "unsigned_nonneg": True, "g": 8},
    "groups 1": {**FOUR, "groups": 1},
    "groups 2": {**FOUR, "groups": 2},
    "groups 6": {**FOUR, "groups": 6},
    "quantized l2": {**FOUR, "norm": "l2_quantized"},
    "float l1": {**FOUR, "norm": "l1"},
    "float l2": {**FOUR, "norm": "batch"},
}


def run(options: Options, seed: int, args: argparse.Namespace) -> Metrics:
    """Accuracy on the test images and the mean loss of the last hundred steps."""
    train, test = (data.load("cifar10", args.data, split=split) for split in ("train", "test"))
    augmented = data.Compose((data.RandomCrop(32, 4), data.RandomHorizontalFlip()))
    torch.manual_seed(seed)
    model = zoo.create("resnet20", shortcut="B").to(memory_format=torch.channels_last)
    example = data.normalize(train.batch(range(128))[0], train.mean, train.std)
    converted(model, example, options, seed, args)
    stepped = _fused(model)
    loader = data.Loader(train, args.batch, train=True, transform=augmented, seed=seed)
    total = args.epochs * (len(train) // args.batch)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * s / total))
    )
    losses: list[float] = []
    for epoch in range(args.epochs):
        stepped.train()
        for images, labels in loader.epoch(epoch):
            if len(losses) == total:
                break
            loss = F.cross_entropy(stepped(images.contiguous(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    model.eval()
    right = 0
    for rows in torch.arange(len(test)).split(500):
        images, labels = test.batch(rows)
        with torch.no_grad():
            right += int((model(data.normalize(images, train.mean, train.std)).argmax(1) == labels).sum())
    return {"accuracy": 100 * right / len(test), "loss": round(sum(losses[-100:]) / len(losses[-100:]), 4)}


def _fused(model: nn.Module) -> nn.Module:
    """The fused step where the network has one: the same results in less time."""
    try:
        return bitstrata.fuse(model)
    except bitstrata.FuseError:
        return model


if __name__ == "__main__":
    main(Study(__doc__.splitlines()[0], SETTINGS, run, {"data": str, "epochs": 3, "batch": 128, "lr": 0.1}))
