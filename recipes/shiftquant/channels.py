"""Gradients by channel at both ends of a training in integers, and norms of activations throughout it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _cifar import SETTINGS, loader, network, train
from _study import commit
from torch import Tensor, nn

from bitstrata import data, integer_, zoo
from bitstrata.data import Loader
from bitstrata.diagnostics import (
    LayerRanges,
    NormReading,
    NormStatistics,
    gradient_ranges,
    norm_statistics,
    plot_norms,
    plot_ranges,
)

Values = dict[str, Any]
NETWORKS = ("digits_resnet", "resnet20")


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def network_and_batches(args: argparse.Namespace) -> tuple[nn.Module, Loader]:
    """ResNet-20 on CIFAR-10, or its small form on scikit-learn's digits."""
    if args.network == "resnet20":
        batches = loader(args.data, train=True, batch=args.batch, seed=args.seed)
        return network(args.setting, args.seed), batches
    digits = data.load("digits", split="train", seed=args.seed)
    batches = Loader(digits, args.batch, train=True, seed=args.seed, drop_last=True, prefetch=False)
    torch.manual_seed(args.seed)
    model, options = zoo.create("digits_resnet"), SETTINGS[args.setting]
    if options is not None:
        integer_(model, batches.batch(0, 0)[0][:4], seed=args.seed, **options)  # type: ignore[arg-type]
    return model, batches


def measure(args: argparse.Namespace) -> Values:
    """Norms of every normalization's input every `args.every` steps, and gradients at the first and the last step."""
    model, batches = network_and_batches(args)
    images, labels = batches.batch(1_000, 0)
    norms: dict[str, Values] = {}
    gradients: dict[str, Values] = {}

    def look(now: int) -> None:
        if now % args.every and now != args.steps:
            return
        norms[str(now)] = _values(norm_statistics(model, images[: args.images], training=True))
        if now in (0, args.steps):
            example = images[: args.images], labels[: args.images]
            gradients[str(now)] = _values(gradient_ranges(model, _loss, example, training=True))

    losses = train(model, batches, args.steps, args.lr, look)
    late = losses[-max(1, args.steps // 10) :]
    return {"train_loss": sum(late) / len(late), "norms": norms, "gradients": gradients}


def _values(found: dict[str, Any]) -> Values:
    return {name: _short(dataclasses.asdict(one)) for name, one in found.items()}


def _short(value: Any) -> Any:
    """Numbers with four digits."""
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_short(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def draw(found: Values, ranges: Path | None, norms: Path | None) -> None:
    """Gradients at the end; norms of the first normalization's input, over the steps."""
    if ranges:
        last = list(found["gradients"].values())[-1]
        plot_ranges({name: LayerRanges(**layer) for name, layer in last.items()}, ranges, dpi=80)
    if norms:
        series = {now: next(iter(layers.values())) for now, layers in found["norms"].items()}
        plot_norms({now: _norms(one) for now, one in series.items()}, norms, along="step", dpi=80)


def _norms(one: Values) -> NormStatistics:
    l1, l2 = (NormReading(**one[name]) for name in ("l1", "l2"))
    return NormStatistics(one["channels"], one["count"], l1, l2)


def describe(found: Values) -> str:
    """Means over layers, a line a moment."""
    lines = []
    for now, layers in found["norms"].items():
        rows = list(layers.values())
        means = [
            sum(row[norm][field] for row in rows) / len(rows) for field in ("norm", "relative") for norm in ("l1", "l2")
        ]
        lines.append(f"step {now}: norms {means[0]:.4g}, {means[1]:.4g}; relative gaps {means[2]:.3%}, {means[3]:.3%}")
    for now, layers in found["gradients"].items():
        rows = list(layers.values())
        wide, narrow = (sum(row[field] for row in rows) / len(rows) for field in ("diversity", "grouped"))
        lines.append(f"step {now}: diversity {wide:.3f}, with groups {narrow:.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default=NETWORKS[0], choices=NETWORKS)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10, for resnet20")
    parser.add_argument("--setting", default="quantized, L1 norm", choices=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=168, help="8 epochs of the digits")
    parser.add_argument("--every", type=int, default=12, help="steps between looks at norms")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=64, help="that norms and gradients are measured on")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="results; if they are there, they are only described and drawn")
    parser.add_argument("--ranges", type=Path, help="picture of gradients by channel")
    parser.add_argument("--norms", type=Path, help="picture of norms over the steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    fixed = {k: v for k, v in vars(args).items() if k not in ("data", "json", "ranges", "norms")}
    if args.json and args.json.exists():
        found = json.loads(args.json.read_text())
        if found["arguments"] != fixed:
            raise SystemExit(f"{args.json} holds results of other arguments, {found['arguments']}; now {fixed}")
    elif args.network == "resnet20" and args.data is None:
        parser.error("resnet20 needs --data, the folder with CIFAR-10")
    else:
        head = {"title": __doc__, "arguments": fixed, "torch": torch.__version__, "commit": commit()}
        found = {**head, **measure(args)}
        if args.json:
            args.json.write_text(json.dumps(found) + "\n")
    print(describe(found))
    draw(found, args.ranges, args.norms)


if __name__ == "__main__":
    main()
