"""Loss surfaces of ResNet-20 on CIFAR-10 around trained weights: float, and quantized with three normalizations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _cifar import SETTINGS, accuracy, loader, network, train
from _study import commit


def trained(setting: str, args: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The network after training, and what is known of it; from the folder of states where it is there already."""
    model = network(setting, args.seed)
    name = f"{setting}-{args.steps}-{args.batch}-{args.lr}-{args.seed}".replace(" ", "_").replace(",", "")
    path = args.states / f"{name}.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        model.load_state_dict(kept["model"])
        return model, kept["facts"]
    losses = train(model, loader(args.data, train=True, batch=args.batch, seed=args.seed), args.steps, args.lr)
    late = losses[-max(1, args.steps // 10) :]
    facts = {
        "train_loss": round(sum(late) / len(late), 4),
        "test_accuracy": round(accuracy(model, loader(args.data, train=False, batch=100), 10), 2),
    }
    args.states.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "facts": facts}, path)
    return model, facts


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10")
    parser.add_argument("--states", type=Path, default=Path("runs/landscape"), help="folder of trained states")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=780, help="of training; 390 are an epoch")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-train", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    for setting in args.settings:
        model, facts = trained(setting, args)
        print(setting, json.dumps(facts), commit(), flush=True)


if __name__ == "__main__":
    main()
