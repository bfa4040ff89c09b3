"""Loss surfaces of ResNet-20 on CIFAR-10 around trained weights: float, and quantized with three normalizations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _cifar import SETTINGS, accuracy, fastest, loader, network, train
from _study import commit
from torch import Tensor, nn

from bitstrata.diagnostics import Landscape, loss_landscape, plot_landscape

HEIGHTS = (0.5, 1.0, 2.0)
FIXED = ("steps", "batch", "lr", "seed", "points", "radius", "images", "mode")


def trained(setting: str, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
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


def surface(model: nn.Module, args: argparse.Namespace) -> Landscape:
    """On the first training images of a seeded order, without augmentation."""
    batches = loader(args.data, train=True, batch=args.images, seed=args.seed)
    batches.transform = None
    network = fastest(model) if args.mode == "train" else model
    return loss_landscape(
        network, _loss, [batches.batch(0, 0)], points=args.points, radius=args.radius, seed=args.seed,
        training=args.mode == "train",
    )  # fmt: skip


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def measures(found: Landscape) -> dict[str, Any]:
    """Numbers of a surface: where it lies, how much of it is within a height of the centre, how rough it is."""
    finite = found.loss[np.isfinite(found.loss)]
    half = found.loss[(np.hypot(*np.meshgrid(found.x, found.x)) <= found.x[-1] / 2)]
    return {
        "center": round(found.center, 4),
        "lowest": round(float(finite.min()), 4),
        "highest": round(float(finite.max()), 4),
        "mean_rise_within_half_radius": round(float(half.mean()) - found.center, 4),
        "share_within": {str(height): round(found.share_within(height), 4) for height in HEIGHTS},
        "local_minima": found.local_minima(),
        "roughness": round(roughness(found), 5),
        "not_finite": int(found.loss.size - finite.size),
    }


def roughness(found: Landscape) -> float:
    """Root mean square of third differences along both axes: 0 for quadratics, whatever their steepness."""
    thirds = [np.diff(found.loss, 3, axis).reshape(-1) for axis in (0, 1)]
    return float(np.sqrt(np.mean(np.concatenate(thirds) ** 2)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10")
    parser.add_argument("--states", type=Path, default=Path("runs/landscape"), help="folder of trained states")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=780, help="of training; 390 are an epoch")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", type=int, default=21)
    parser.add_argument("--radius", type=float, default=1.0)
    parser.add_argument("--images", type=int, default=128, help="that the loss is taken on")
    parser.add_argument("--mode", choices=("train", "eval"), default="train", help="whose statistics normalize")
    parser.add_argument("--json", type=Path, help="results; surfaces that are there already are not computed again")
    parser.add_argument("--picture", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    fixed = {name: getattr(args, name) for name in FIXED}
    head = {"title": __doc__.splitlines()[0], "arguments": fixed, "torch": torch.__version__}
    rows: dict[str, Any] = {}
    if args.json and args.json.exists():
        earlier = json.loads(args.json.read_text())
        if earlier["arguments"] != fixed:
            raise SystemExit(f"{args.json} holds surfaces of other arguments, {earlier['arguments']}; now {fixed}")
        rows = earlier["surfaces"]
    for setting in args.settings:
        if setting not in rows:
            model, facts = trained(setting, args)
            found = surface(model, args)
            rows[setting] = {
                **facts, **measures(found), "commit": commit(), "axis": np.round(found.x, 6).tolist(),
                "loss": np.round(found.loss, 4).tolist(),
            }  # fmt: skip
        print(setting, json.dumps({k: v for k, v in rows[setting].items() if k not in ("axis", "loss")}), flush=True)
        if args.json:
            args.json.write_text(json.dumps({**head, "surfaces": rows}) + "\n")
    if args.picture:
        surfaces = {name: rows[name] for name in SETTINGS if name in rows}
        axes = {name: np.array(row["axis"]) for name, row in surfaces.items()}
        drawn = {n: Landscape(axes[n], axes[n], np.array(row["loss"], dtype=float)) for n, row in surfaces.items()}
        plot_landscape(drawn, args.picture, dpi=90)


if __name__ == "__main__":
    main()
