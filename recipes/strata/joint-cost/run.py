"""Joint training at 1 to 4 bits against four dedicated runs: accuracy and training time, from one float model a seed.

A row is a method and a seed. Rows that are there already are not repeated, so the command can be given again after an
interruption, and several processes can fill one folder (`--only METHOD --seed S`). Each process writes its row and then
the table of all rows, `results.csv`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import fcntl
import hashlib
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bitstrata as bs
from bitstrata.cli.common import environment, write_json
from bitstrata.cli.loading import load_data
from bitstrata.data import Compose, Dataset, Loader, RandomCrop, RandomHorizontalFlip
from bitstrata.train import evaluate

WIDTHS = (1, 2, 3, 4)
Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """Widths that one run trains, how it samples them, and its share of the epochs."""

    widths: tuple[int, ...] = WIDTHS
    sampling: str = "all"
    share: float = 1.0


METHODS = {
    "all": Method(),
    "sandwich": Method(sampling="sandwich"),
    "pair": Method(sampling="pair"),
    "all-half": Method(share=0.5),
    **{f"dedicated-{width}": Method((width,)) for width in WIDTHS},
}

#: Fields that do not decide what is computed.
FREE = ("root", "out", "only", "seed")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="directory of CIFAR-10 in its binary layout")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "runs", help="rows and float models")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=["float", *METHODS], metavar="METHOD")
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2], metavar="S")
    parser.add_argument("--model", default="resnet20", help="network of the zoo")
    parser.add_argument("--width", type=int, default=8, help="channels of its first stage")
    parser.add_argument("--float-epochs", type=int, default=8)
    parser.add_argument("--float-lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=4, help="of quantized training")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--train-limit", type=int, help="only the first images of the training set")
    parser.add_argument("--test-limit", type=int, help="only the first images of the test set")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, one row after the other."""
    args = arguments()
    torch.set_num_threads(1)
    claim(args)
    data = (dataset(args, "train"), dataset(args, "test"))
    for seed in args.seed:
        model = float_model(args, seed, *data)
        for name in args.only:
            path = args.out / f"{name}-{seed}.json"
            if name == "float" or path.exists():
                continue
            row = run(args, name, seed, copy.deepcopy(model), data)
            write_json(path, row)
            table(args)
            shown = "  ".join(f"{bits}b {value:.2%}" for bits, value in row["accuracy"].items())
            print(f"{name:12} seed {seed}  {shown}  {row['cpu_s']:.0f} s of processor time", flush=True)
    table(args)


def claim(args: argparse.Namespace) -> None:
    """Keep what decides the results beside them. Exits where rows of other arguments lie."""
    mine = {name: value for name, value in vars(args).items() if name not in FREE}
    path = args.out / "arguments.json"
    args.out.mkdir(parents=True, exist_ok=True)
    with locked(args.out / "arguments.lock"):
        if path.exists() and (found := json.loads(path.read_text())) != mine:
            raise SystemExit(f"{path} is of other arguments, {found}; now {mine}: name another --out")
        write_json(path, mine)


def dataset(args: argparse.Namespace, split: str) -> Dataset:
    """A split of CIFAR-10, or its first images."""
    limit = args.train_limit if split == "train" else args.test_limit
    return load_data("cifar10", args.root, split, limit)


def batches(args: argparse.Namespace, data: Dataset, seed: int, *, train: bool, augmented: bool = True) -> Loader:
    """Batches made by the training process itself, so that their time counts."""
    if not train:
        return Loader(data, 500, train=False, prefetch=False)
    transform = Compose((RandomCrop(32, 4), RandomHorizontalFlip())) if augmented else None
    return Loader(data, args.batch, train=True, transform=transform, seed=seed, drop_last=True, prefetch=False)


def float_model(args: argparse.Namespace, seed: int, train: Dataset, test: Dataset) -> nn.Module:
    """The float network of a seed, trained by whichever process comes first."""
    torch.manual_seed(seed)
    model = bs.zoo.create(args.model, width=args.width)
    config = bs.TrainConfig(
        epochs=args.float_epochs, lr=args.float_lr, warmup=0.5, batch_size=args.batch, seed=seed, threads=1,
        distill=None, channels_last=True, eval_every=0,
    )  # fmt: skip
    with locked(args.out / f"float-{seed}.lock"):
        folder = args.out / f"float-{seed}"
        bs.Trainer(model, config, batches(args, train, seed, train=True), out_dir=folder).fit()
        path = args.out / f"float-{seed}.json"
        if not path.exists():
            write_json(path, {"seed": seed, "accuracy": accuracy(args, model, test)["float"], **environment()})
    return model


def run(args: argparse.Namespace, name: str, seed: int, model: nn.Module, data: tuple[Dataset, Dataset]) -> Row:
    """One method, from the float network of its seed: accuracies after the last epoch, and what training took."""
    method = METHODS[name]
    train, test = data
    plain = batches(args, train, seed, train=True, augmented=False)
    examples = [plain.batch(0, step)[0] for step in range(min(4, len(plain)))]
    recipe = bs.recipes.strata(w=method.widths)
    bs.quantize_(model, recipe, examples[0][:1], input=bs.Pixels(train.mean, train.std))
    bs.calibrate_(model, examples)
    config = bs.TrainConfig.from_recipe(
        recipe, epochs=max(1, round(args.epochs * method.share)), batch_size=args.batch, lr=args.lr,
        sampling=method.sampling, seed=seed, threads=1, channels_last=True,
    )  # fmt: skip
    trainer = bs.Trainer(model, config, batches(args, train, seed, train=True), name=f"{name}-{seed}")
    wall, processor = time.perf_counter(), time.process_time()
    trainer.fit()
    took = {"cpu_s": round(time.process_time() - processor, 1), "wall_s": round(time.perf_counter() - wall, 1)}
    found = {str(bits): value for bits, value in accuracy(args, model, test).items()}
    return {
        "method": name, "seed": seed, "epochs": config.epochs, "steps": trainer.position.step, "accuracy": found,
        **took, "weights": digest(model), **environment(),
    }  # fmt: skip


def accuracy(args: argparse.Namespace, model: nn.Module, test: Dataset) -> dict[int | str, float]:
    """Of the fake-quantized network, in float32, on the test set."""
    return evaluate(copy.deepcopy(model), batches(args, test, 0, train=False).epoch(0), channels_last=True)


def digest(model: nn.Module) -> str:
    """SHA-256 of all tensors: two runs of a row agree in every bit if this does."""
    total = hashlib.sha256()
    for key, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            total.update(key.encode())
            total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()


def table(args: argparse.Namespace) -> None:
    """`results.csv`: a method a line, means and sample deviations over its seeds."""
    with locked(args.out / "table.lock"):
        found = [json.loads(path.read_text()) for path in sorted(args.out.glob("*-*.json"))]
        rows = {name: [row for row in found if row.get("method") == name] for name in METHODS}
        four = dedicated_seconds(rows)
        lines = [line(args, name, rows[name], four) for name in METHODS if rows[name]]
        if not lines:
            return
        partial = args.out / "results.csv.partial"
        with partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        partial.replace(args.out / "results.csv")


def dedicated_seconds(rows: dict[str, list[Row]]) -> dict[int, float]:
    """Seed -> processor time of its four dedicated runs, where all four are there."""
    parts = [{row["seed"]: row["cpu_s"] for row in rows[f"dedicated-{width}"]} for width in WIDTHS]
    return {seed: sum(part[seed] for part in parts) for seed in parts[0] if all(seed in part for part in parts)}


def line(args: argparse.Namespace, name: str, rows: list[Row], dedicated: dict[int, float]) -> Row:
    """One line of the table. `of_dedicated`: processor time as a share of the seed's four dedicated runs."""
    shares = [row["cpu_s"] / dedicated[row["seed"]] for row in rows if row["seed"] in dedicated]
    result: Row = {"method": name, "model": f"{args.model} width {args.width}"}
    for width in WIDTHS:
        values = [100 * row["accuracy"][str(width)] for row in rows if str(width) in row["accuracy"]]
        result |= {f"bits{width}_mean": mean(values, 2), f"bits{width}_spread": spread(values, 2)}
    for field in ("cpu_s", "wall_s"):
        values = [row[field] for row in rows]
        result |= {f"{field}_mean": mean(values, 1), f"{field}_spread": spread(values, 1)}
    result |= {"of_dedicated_mean": mean(shares, 3), "of_dedicated_spread": spread(shares, 3)}
    result |= {field: rows[0][field] for field in ("epochs", "steps")}
    result["seeds"] = " ".join(str(row["seed"]) for row in rows)
    result["commit"] = " ".join(sorted({str(row["commit"])[:12] for row in rows}))
    return result | {"cpu": rows[0]["cpu"], "torch": rows[0]["versions"]["torch"], "threads": 1}


def mean(values: list[float], digits: int) -> float | str:
    """Empty where there is nothing."""
    return round(statistics.mean(values), digits) if values else ""


def spread(values: list[float], digits: int) -> float | str:
    """Sample deviation; empty with fewer than two values."""
    return round(statistics.stdev(values), digits) if len(values) > 1 else ""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among processes."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
