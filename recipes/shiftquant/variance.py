"""What quantizing gradients adds to them at some steps of training: one step a tensor, a channel, and groups."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _cifar import loader, network, train
from _study import commit, optimizer_for, step
from torch import Tensor, nn

from bitstrata import data, integer_, zoo
from bitstrata.diagnostics import GradientVariance, gradient_variance

Sample = Callable[[int, nn.Module, Any], None]
GROUPS = (1, 2, 3, 4, 6, 8)


def resnet20(args: argparse.Namespace, sample: Sample) -> None:
    """ResNet-20 on CIFAR-10 at 4/4/4 with quantized L1 norms."""
    model = network("quantized, L1 norm", args.seed)
    batches = loader(args.data, train=True, batch=128, seed=args.seed)
    images, labels = batches.batch(1_000, 0)
    train(model, batches, args.steps, 0.1, lambda now: sample(now, model, (images[:64], labels[:64])))


def transformer(args: argparse.Namespace, sample: Sample) -> None:
    """A causal Transformer (2 blocks of width 64) on characters at 6/6/6."""
    text = data.read_characters(args.text)
    torch.manual_seed(args.seed)
    model = zoo.TransformerLM(len(text.vocabulary), context=64, width=64, depth=2, heads=4)
    random = torch.Generator().manual_seed(args.seed)
    held = text.windows("train", 16, 64, random)
    integer_(model, held[0][:4], w=6, a=6, g=6, seed=args.seed)
    optimizer, schedule = optimizer_for(model, 1e-2, 0.01, args.steps)
    model.train()
    for now in range(args.steps):
        sample(now, model, held)
        step(model, _loss(model, text.windows("train", 16, 64, random)), optimizer, schedule)
    sample(args.steps, model, held)


NETWORKS = {"resnet20": (resnet20, 4), "transformer": (transformer, 6)}


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def table(found: GradientVariance) -> dict[str, Any]:
    """Means over layers relative to one step a tensor, the spread of ranges, and the shares of each layer."""
    shares = {name: {_label(k): v for k, v in layer.relative().items()} for name, layer in found.layers.items()}
    rows = {
        name: {k: round(shares[name][k], 4) for k in ("channel", "shift 4", "optimal 4")}
        | {"spread": round(layer.spread, 2)}
        for name, layer in found.layers.items()
    }
    excess = [row["shift 4"] / row["channel"] for row in shares.values() if row["channel"] > 0]
    return {
        "variance": {_label(k): round(v, 5) for k, v in found.mean_relative().items()},
        "bound": {_label(k): round(v, 5) for k, v in found.mean_relative(bound=True).items()},
        "median_spread": round(statistics.median(layer.spread for layer in found.layers.values()), 2),
        "shift_4_by_channel_median": round(statistics.median(excess), 3),
        "layers": rows,
    }


def _label(key: tuple[str, int]) -> str:
    kind, number = key
    return kind if kind in ("tensor", "channel", "powers") else f"{kind} {number}"


def plot(networks: dict[str, Any], path: Path) -> None:
    """Left in each panel few groups, right many; a colour a step of training."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(networks), figsize=(4.6 * len(networks), 3.6), squeeze=False, layout="constrained"
    )
    for axes, (name, run) in zip(panels[0], networks.items(), strict=True):
        for i, (now, row) in enumerate(run["steps"].items()):
            shares, color = row["variance"], f"C{i}"
            axes.plot(
                GROUPS, [shares[f"shift {n}"] for n in GROUPS], color=color, marker="o", ms=4, label=f"step {now}"
            )
            axes.plot(GROUPS, [shares[f"optimal {n}"] for n in GROUPS], color=color, linestyle=":", marker=".", ms=4)
            axes.axhline(shares["channel"], color=color, linestyle="--", linewidth=0.9)
        axes.set_title(f"{name}, {run['bits']} bits", fontsize=10)
        axes.set_xlabel("groups: ShiftQuant —, optimal ···; a step a channel - -", fontsize=8)
        axes.set_ylabel("variance / variance per tensor", fontsize=8)
        axes.set_ylim(0, 1.04)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10, for resnet20")
    parser.add_argument("--text", type=Path, help="a text, plain or .gz, for transformer")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--at", nargs="+", type=int, help="steps to look at; default: the first, the middle, the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="results; networks that are there already do not run again")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    for name, given in (("resnet20", args.data), ("transformer", args.text)):
        if name in args.networks and given is None:
            parser.error(f"{name} needs {'--data' if name == 'resnet20' else '--text'}")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    at = args.at or sorted({0, args.steps // 2, args.steps})
    networks = json.loads(args.json.read_text())["networks"] if args.json and args.json.exists() else {}
    for name in args.networks:
        if name in networks:
            continue
        run, bits = NETWORKS[name]
        steps: dict[str, Any] = {}

        def sample(
            now: int, model: nn.Module, batch: Any, *, name: str = name, bits: int = bits, steps: Any = steps
        ) -> None:
            if now in at:
                found = gradient_variance(model, _loss, batch, bits=bits, groups=GROUPS, training=True)
                steps[str(now)] = table(found)
                print(name, now, json.dumps(steps[str(now)]["variance"]), flush=True)

        run(args, sample)
        networks[name] = {"bits": bits, "seed": args.seed, "trained": args.steps, "commit": commit(), "steps": steps}
        if args.json:
            head = {"title": __doc__.splitlines()[0], "torch": torch.__version__}
            args.json.write_text(json.dumps({**head, "networks": networks}) + "\n")
    if args.picture:
        plot(networks, args.picture)


if __name__ == "__main__":
    main()
