"""Integer training of a small causal Transformer on characters."""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from _study import Metrics, Options, Study, converted, main, optimizer_for, settings, step

from bitstrata import data, zoo


def run(options: Options, seed: int, args: argparse.Namespace) -> Metrics:
    """Bits a character on the validation part and, over the last tenth of the steps, in training."""
    text = data.read_characters(args.data)
    torch.manual_seed(seed)
    model = zoo.TransformerLM(
        len(text.vocabulary), context=args.context, width=args.width, depth=args.depth, heads=args.heads
    )
    random = torch.Generator().manual_seed(seed)
    example, _ = text.windows("train", 4, args.context, random)
    converted(model, example, options, seed, args)
    optimizer, schedule = optimizer_for(model, args.lr, 0.01, args.steps)
    model.train()
    losses = []
    for _ in range(args.steps):
        inputs, targets = text.windows("train", args.batch, args.context, random)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        losses.append(step(model, loss, optimizer, schedule))
    late = losses[-max(1, args.steps // 10) :]
    model.eval()
    inputs, targets = (part[: args.windows] for part in text.spans("valid", args.context))
    total = 0.0
    for rows in torch.arange(len(inputs)).split(args.batch):
        with torch.no_grad():
            logits = model(inputs[rows]).flatten(0, 1)
        total += float(F.cross_entropy(logits, targets[rows].flatten(), reduction="sum"))
    return {
        "bits": round(total / targets.numel() / math.log(2), 4),
        "train_bits": round(sum(late) / len(late) / math.log(2), 4),
    }


if __name__ == "__main__":
    arguments = {
        "data": str, "context": 64, "width": 64, "depth": 2, "heads": 4, "steps": 1_000, "batch": 16, "lr": 1e-2,
        "windows": 480,
    }  # fmt: skip
    main(Study(__doc__.splitlines()[0], settings(6, 4), run, arguments))
