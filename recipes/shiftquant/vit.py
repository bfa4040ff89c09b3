"""Integer training of a vision transformer on CIFAR-10, from scratch."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from _study import Metrics, Options, Study, converted, main, optimizer_for, settings, step

from bitstrata import data, zoo


def run(options: Options, seed: int, args: argparse.Namespace) -> Metrics:
    """Accuracy on the first `--images` test images, and the mean loss of the last tenth of the steps."""
    train, test = (data.load("cifar10", args.data, split=split) for split in ("train", "test"))
    augmented = data.Compose((data.RandomCrop(32, 4), data.RandomHorizontalFlip()))
    torch.manual_seed(seed)
    model = zoo.create("vit_cifar", width=args.width, depth=args.depth, heads=args.heads, patch=args.patch)
    converted(model, data.normalize(train.batch(range(8))[0], train.mean, train.std), options, seed, args)
    optimizer, schedule = optimizer_for(model, args.lr, 0.05, args.steps)
    loader = data.Loader(train, args.batch, train=True, transform=augmented, seed=seed)
    model.train()
    losses: list[float] = []
    epoch = 0
    while len(losses) < args.steps:
        for images, labels in loader.epoch(epoch):
            loss = F.cross_entropy(model(images), labels)
            losses.append(step(model, loss, optimizer, schedule))
            if len(losses) == args.steps:
                break
        epoch += 1
    late = losses[-max(1, args.steps // 10) :]
    model.eval()
    right = 0
    for rows in torch.arange(args.images).split(args.batch):
        images, labels = test.batch(rows)
        with torch.no_grad():
            right += int((model(data.normalize(images, train.mean, train.std)).argmax(1) == labels).sum())
    return {"accuracy": round(100 * right / args.images, 2), "loss": round(sum(late) / len(late), 4)}


if __name__ == "__main__":
    arguments = {
        "data": str, "width": 192, "depth": 6, "heads": 3, "patch": 8, "steps": 200, "batch": 32, "lr": 4e-4,
        "images": 2_000,
    }  # fmt: skip
    main(Study(__doc__.splitlines()[0], settings(6, 4), run, arguments))
