"""Integer training of a temporal graph network that predicts links of made-up interactions."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from _study import Metrics, Options, Study, converted, main, settings
from torch import Tensor

from bitstrata import data, zoo


def predicted(
    model: zoo.TemporalGraphNetwork, log: data.Interactions, rows: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    others = log.other_items(len(rows), random)
    positive, negative = model(log.users[rows], log.item_nodes[rows], others, log.times[rows])
    return positive, negative


def observed(model: zoo.TemporalGraphNetwork, log: data.Interactions, rows: Tensor) -> None:
    model.observe(log.users[rows], log.item_nodes[rows], log.times[rows], log.features[rows])


def run(options: Options, seed: int, args: argparse.Namespace) -> Metrics:
    """The last epoch's area under the ROC curve and average precision on the last 15 % of interactions."""
    if args.data:
        log = data.read_jodie(args.data)
    else:
        log = data.synthetic_interactions(args.interactions, seed=seed)
    torch.manual_seed(seed)
    model = zoo.TemporalGraphNetwork(log.nodes, log.features.shape[1], memory=args.memory, width=args.memory)
    batches = list(torch.arange(len(log)).split(args.batch))
    for rows in batches[:2]:  # the example that integer_ runs shall meet memories and neighbours
        observed(model, log, rows)
    rows = batches[2]
    example = (log.users[rows], log.item_nodes[rows], log.item_nodes[rows].flip(0), log.times[rows])
    converted(model, example, options, seed, args)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    end_train, end_valid, _ = log.ends()
    random = torch.Generator().manual_seed(seed)
    positive: list[Tensor] = []
    negative: list[Tensor] = []
    for epoch in range(args.epochs):
        model.reset()
        model.train()
        for rows in torch.arange(end_train).split(args.batch):
            true, false = predicted(model, log, rows, random)
            loss = F.softplus(-true).mean() + F.softplus(false).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            observed(model, log, rows)
        if epoch < args.epochs - 1:
            continue
        model.eval()
        others = torch.Generator().manual_seed(1_000 + seed)  # the same for all settings
        for rows in torch.arange(end_train, len(log)).split(args.batch):
            with torch.no_grad():
                true, false = predicted(model, log, rows, others)
            tested = rows >= end_valid
            positive.append(true[tested])
            negative.append(false[tested])
            observed(model, log, rows)
    area, precision = data.ranking(torch.cat(positive), torch.cat(negative))
    return {"auc": round(100 * area, 3), "ap": round(100 * precision, 3)}


if __name__ == "__main__":
    arguments = {"data": "", "interactions": 10_000, "epochs": 5, "batch": 100, "memory": 64, "lr": 2e-3}
    note = "synthetic: interactions are drawn by synthetic_interactions(seed), unless --data names a table"
    main(Study(__doc__.splitlines()[0], settings(8, 4), run, arguments, note))
