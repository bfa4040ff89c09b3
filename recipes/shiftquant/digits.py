"""Integer training on scikit-learn's 8x8 digits: ShiftQuant and int8 against float32, several seeds, same epochs."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitstrata import data, integer_, saved_memory, zoo

SETTINGS: dict[str, dict[str, Any] | None] = {
    "fp32": None,
    "shift 4/4/4, L1 quantized": {},
    "shift 4/4/4, L2 quantized": {"norm": "l2_quantized"},
    "shift 4/4/4, 1 group, L1 quantized": {"groups": 1},
    "shift 4/4/4, batch norm in float": {"norm": "batch"},
    "shift 4/4/4, 1 group, batch norm in float": {"groups": 1, "norm": "batch"},
    "int8_naive": {"method": "int8_naive"},
    "int8_sr": {"method": "int8_sr"},
}


def loaded(split: str, seed: int) -> tuple[Tensor, Tensor]:
    """Normalized images (N, 1, 8, 8) and labels; the split is drawn from the seed."""
    part = data.load("digits", split=split, seed=seed)
    images, labels = part.batch(range(len(part)))
    return (images.float() / 255 - part.mean[0]) / part.std[0], labels


def built(model: str, options: dict[str, Any] | None, seed: int, example: Tensor) -> nn.Module:
    torch.manual_seed(seed)
    net = zoo.create(model)
    return net if options is None else integer_(net, example, seed=seed, **options)


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    with torch.no_grad():
        right = sum(int((net(x[i : i + 64]).argmax(1) == y[i : i + 64]).sum()) for i in range(0, len(x), 64))
    return 100 * right / len(x)


def trained(net: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace, seed: int) -> float:
    """SGD with momentum and a cosine schedule; the last epoch's mean loss."""
    steps = args.epochs * (len(x) // args.batch)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order, losses = torch.Generator().manual_seed(seed), [float("nan")]
    for _ in range(args.epochs):
        net.train()
        losses = []
        for rows in torch.randperm(len(x), generator=order).split(args.batch)[: len(x) // args.batch]:
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return statistics.mean(losses)


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All seeds of one setting."""
    row: dict[str, Any] = {"setting": name, "options": SETTINGS[name], "accuracy": [], "loss": []}
    begin, seeds = time.perf_counter(), args.seeds
    for seed in seeds:
        (x, y), test = loaded("train", seed), loaded("test", seed)
        net = built(args.model, SETTINGS[name], seed, x[:2])
        if seed == seeds[0]:
            memory = saved_memory(net, x[: args.batch])
            kept, plain = (sum(getattr(m, f) for m in memory.layers.values()) for f in ("kept", "float32"))
            row |= {"layers_keep": kept, "layers_float32": plain, "model_keeps": memory.total}
            net = built(args.model, SETTINGS[name], seed, x[:2])  # the measurement moved running statistics
        row["loss"].append(round(trained(net, x, y, args, seed), 4))
        row["accuracy"].append(round(accuracy(net, *test), 2))
    row["mean"] = round(statistics.mean(row["accuracy"]), 2)
    row["spread"] = round(statistics.stdev(row["accuracy"]), 2) if len(seeds) > 1 else 0.0
    row["seconds"] = round(time.perf_counter() - begin, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits_resnet", choices=("digits_resnet", "digits_cnn"))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    for name, default in (("--epochs", 8), ("--batch", 64)):
        parser.add_argument(name, type=int, default=default)
    for name, default in (("--lr", 0.05), ("--weight-decay", 1e-4)):
        parser.add_argument(name, type=float, default=default)
    parser.add_argument("--json", type=Path, help="write results here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.settings:
        rows.append(measured(name, args))
        print(f"{name:44} {rows[-1]['mean']:6.2f} +- {rows[-1]['spread']:.2f}  {rows[-1]['seconds']} s", flush=True)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else f"model name:{platform.processor()}"
    cpu = info.split("model name", 1)[1].split(":", 1)[1].split("\n", 1)[0].strip()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    where = {"cpu": cpu, "threads": 1, "versions": versions | {"scikit-learn": sklearn.__version__}}
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "settings")}
        args.json.write_text(json.dumps({**where, "arguments": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
