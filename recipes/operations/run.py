"""What integer inference computes: operations of one image by kind, and the engine against the reference.

    python recipes/operations/run.py --root DIR --json recipes/operations/results.json

Each network is calibrated and trained for as many images as asked for (counts depend on training through zero weights
alone), lowered, packed and loaded again. A row is a network, a precision and a form of its plan: requantization as it
is derived ("multiplication"), by thresholds ("comparison"), and by thresholds and tables ("table"). For every row the
engine runs the test images on every instruction set, and every integer of every value is compared with the reference's.
Networks that were made before are not made again.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata.cli.common import environment, write_json
from bitstrata.cli.loading import load_data
from bitstrata.data import Loader
from bitstrata_runtime.artifact import Artifact
from bitstrata_runtime.info import describe
from bitstrata_runtime.operations import Operations, count
from bitstrata_runtime.plan import Conv, Plan
from bitstrata_runtime.reference import OracleExecutor, ReferenceExecutor

FORMS: dict[str, tuple[Callable[[Plan], Plan], ...]] = {
    "multiplication": (),
    "comparison": (lambda plan: runtime.as_thresholds(plan, 255),),
    "table": (lambda plan: runtime.as_thresholds(plan, 255), runtime.as_tables),
}
CHUNK = 50  # images that are compared at a time
BATCH = 128


@dataclass(frozen=True)
class Network:
    """A network of the zoo, how it is quantized, and the forms of it that are counted."""

    recipe: Callable[[], bs.Recipe]
    model: str = "resnet20"
    options: dict[str, Any] = field(default_factory=dict)
    forms: tuple[str, ...] = ("multiplication", "comparison")


NETWORKS = {
    "int8": Network(bs.recipes.int8, forms=("multiplication",)),
    "sat-4": Network(lambda: bs.recipes.sat(4)),
    "sat-2": Network(lambda: bs.recipes.sat(2)),
    "maqd-3-2": Network(lambda: bs.recipes.maqd(3, 2), forms=tuple(FORMS)),
    "maqd-3-2-vgg": Network(lambda: bs.recipes.maqd(3, 2), "maqd_vgg", {"width": 16}, tuple(FORMS)),
    "strata-1-to-4": Network(lambda: bs.recipes.strata(w=(1, 2, 3, 4))),
}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="directory of CIFAR-10 in its binary layout")
    parser.add_argument("--out", type=Path, default=Path("runs/operations"), help="folder for the artifacts")
    parser.add_argument("--json", type=Path, help="write the rows to this file, and a table beside it as .csv")
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--images", type=int, default=1000, help="test images to compare")
    parser.add_argument("--by-definition", type=int, default=10, help="of these, images for the slow reference")
    parser.add_argument("--train-limit", type=int, default=2560, help="images of the one epoch; 0: calibrate only")
    parser.add_argument("--isas", nargs="+", help="instruction sets; default all that this machine has")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Train what is missing, count and compare, print a table, write the files."""
    args = arguments(given)
    torch.set_num_threads(1)
    test = load_data("cifar10", args.root, "test", args.images)
    images = test.batch(range(len(test)))[0].numpy()
    rows = []
    for name in args.only:
        artifact = args.out / f"{name}.strata"
        if not artifact.exists():
            make(name, artifact, args)
        for row in measured(name, artifact, images, args):
            rows.append(row)
            print(*(f"{key}={value:,}" if isinstance(value, int) else f"{key}={value}" for key, value in row.items()))
    if args.json is not None:
        write(args.json, rows, args)


def make(name: str, artifact: Path, args: argparse.Namespace) -> None:
    """At most one epoch of quantized training from random weights, then `artifact`, whole or not at all."""
    network, begun = NETWORKS[name], time.process_time()
    torch.manual_seed(args.seed)
    model = bs.zoo.create(network.model, classes=10, **network.options)
    recipe = network.recipe()
    train = load_data("cifar10", args.root, "train", max(args.train_limit, 2 * BATCH))
    loader = Loader(train, BATCH, train=True, seed=args.seed, drop_last=True, prefetch=False)
    examples = [loader.batch(0, step)[0] for step in range(2)]
    bs.quantize_(model, recipe, examples[0][:1], input=bs.Pixels(train.mean, train.std))
    bs.calibrate_(model, examples)
    if args.train_limit:
        config = bs.TrainConfig.from_recipe(
            recipe, epochs=1, batch_size=BATCH, lr=0.02, seed=args.seed, threads=1, warmup=0
        )
        bs.Trainer(model, config, loader, name=name).fit()
    artifact.parent.mkdir(parents=True, exist_ok=True)
    bs.pack(bs.lower(model.eval(), examples[0][:1]), artifact)
    print(f"{name}: made in {time.process_time() - begun:.0f} s of processor time", file=sys.stderr, flush=True)


def measured(name: str, path: Path, images: NDArray[np.uint8], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one artifact: every precision in every form."""
    artifact = Artifact.open(path)
    sizes = {row.name: row.total for row in describe(artifact.manifest).precisions}
    for precision in artifact.precisions:
        found = compare(path, precision, NETWORKS[name].forms, images, args)
        for form, compared in found.items():
            plan = runtime.load(path, bits=precision, executor="oracle", passes=FORMS[form]).plan
            total = sum(count(plan).values(), Operations())
            row = {"network": name, "bits": precision, "requantization": form, **asdict(total)}
            yield {**row, "bytes": sizes[str(precision)], "nonzero_weights": nonzero(plan), **compared}


def nonzero(plan: Plan) -> float:
    """Share of integer weights that are not zero."""
    weights = [op.codes.astype(np.int64) * op.mul + op.add for op in plan.ops if isinstance(op, Conv)]
    return round(sum(np.count_nonzero(w) for w in weights) / sum(w.size for w in weights), 4)


def compare(
    path: Path, bits: int, forms: Sequence[str], images: NDArray[np.uint8], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Form -> integers of the engine that differ from the reference's on the plan without passes, over all values.

    The reference's convolutions are exact matrix products, and by definition for the first images.
    """
    isas = tuple(args.isas or runtime.available_isas())
    if not isas:
        sys.exit("operations: the engine is not built here, so there is nothing to compare")
    engines = {
        form: [runtime.load(path, bits=bits, executor="engine", isa=isa, passes=FORMS[form]) for isa in isas]
        for form in forms
    }
    plan = runtime.load(path, bits=bits, executor="oracle").plan
    oracle, definition = OracleExecutor(plan), ReferenceExecutor(plan)
    result = {form: {"isas": ",".join(isas), "images": len(images), "compared": 0, "mismatches": 0} for form in forms}
    for begin in range(0, len(images), CHUNK):
        batch = images[begin : begin + CHUNK]
        codes = engines[forms[0]][0].encode(batch)
        expected = oracle.run_all(codes)
        first = max(0, min(len(batch), args.by_definition - begin))
        if first and differing(definition.run_all(codes[:first]), {k: v[:first] for k, v in expected.items()}):
            sys.exit(f"operations: {path}: the two forms of the reference differ")
        for form in forms:
            for engine in engines[form]:
                found = engine.run_all(batch)
                result[form]["compared"] += sum(array.size for array in found.values())
                result[form]["mismatches"] += differing(found, expected)
    return result


def differing(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> int:
    """How many integers differ; all values must be there."""
    if found.keys() != expected.keys():
        sys.exit(f"operations: values differ in name: {sorted(found.keys() ^ expected.keys())}")
    wrong = [name for name in expected if not np.array_equal(found[name], expected[name])]
    return sum(int((found[name] != expected[name]).sum()) for name in wrong)


def write(path: Path, rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """The JSON file with machine and versions, and the table."""
    chosen = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    for name in ("root", "out", "json"):  # where files lay decides nothing
        chosen.pop(name)
    write_json(path, {"arguments": chosen, **environment(), "rows": list(rows)})
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
