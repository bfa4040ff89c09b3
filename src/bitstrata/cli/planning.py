"""What `bitstrata plan` does (torch side)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata.cli import measure
from bitstrata.cli.common import CommandError, environment, output, write_json
from bitstrata.cli.options import provenance
from bitstrata.cli.saved import SavedRun, example_of
from bitstrata.data import Dataset, Loader
from bitstrata.prepare.precision import quantized_layers

if TYPE_CHECKING:
    from bitstrata.cli.plan import Plan

UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "kb": 10**3, "mb": 10**6}
POINTS = 8


@dataclass(frozen=True)
class Sizes:
    """Weights of a network: `free`, of layers that have a choice of width; `fixed_bits`, what the others take."""

    free: int
    fixed_bits: int
    widths: tuple[int, ...]

    @classmethod
    def of(cls, model: Any) -> Sizes:
        """CommandError for a network without a choice."""
        layers = quantized_layers(model).values()
        choice = [layer for layer in layers if len(set(layer.weight_quant.bits.values())) > 1]
        if not choice:
            raise CommandError("plan: the run has one bit-width only; train it with --bits 1,2,3,4, for example")
        fixed = sum(layer.weight.numel() * layer.weight_quant.width for layer in layers if layer not in choice)
        widths = tuple(sorted(set(choice[0].weight_quant.bits.values())))
        return cls(sum(layer.weight.numel() for layer in choice), fixed, widths)

    def budget(self, text: str) -> int:
        """Bits for the layers that have a choice. CommandError for what is no budget, or too small for any plan."""
        found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", text.strip())
        unit = found.group(2).lower() if found else None
        if found is None or (unit != "bits" and unit not in UNITS):
            raise CommandError(f"--budget {text}: write 2.6bits, or bytes such as 150000 or 150KiB")
        number = float(found.group(1))
        bits = number * self.free if unit == "bits" else number * UNITS[unit or ""] * 8 - self.fixed_bits
        if bits < self.free * self.widths[0]:
            least = (self.free * self.widths[0] + self.fixed_bits + 7) // 8
            raise CommandError(
                f"--budget {text}: the narrowest plan has {self.widths[0]} bits a weight, {least} bytes in all"
            )
        return int(bits)

    def curve(self) -> list[str]:
        """Budgets from the narrowest width to the widest."""
        low, high = self.widths[0], self.widths[-1]
        return [f"{low + (high - low) * i / (POINTS - 1):.3g}bits" for i in range(POINTS)]


def plan(options: Plan) -> None:
    """`bitstrata plan`."""
    run = SavedRun(options.run_dir, options.root)
    train, test = run.data("train"), run.data("test")
    model = run.model(test)
    sizes = Sizes.of(model)
    budgets = [(text, sizes.budget(text)) for text in (options.budget or sizes.curve())]
    program = bs.lower(model, example_of(test))
    rows: list[dict[str, Any]] = []
    for text, budget in budgets:
        name = f"plan-{text.lower().replace(' ', '')}"
        chosen = bs.mixed_precision_map(model, budget)
        program = bs.add_plan(program, model, name, chosen, calibration(train, options))
        rows.append({"name": name, "budget": text, "widths": chosen})
    bs.pack(program, run.artifact, provenance(run.options), overwrite=run.artifact.exists())
    table = output()
    for row in rows:
        row.update(measured(run.artifact, row["name"], test, model, sizes))
        table.print(f"{row['name']:16} {row['bits']:.3f} bits a weight  {row['bytes']:,} bytes  {row['accuracy']:.2%}")
    write_json(options.run_dir / "plans.json", {"rows": rows, "images": len(test), **environment()})
    draw(rows, options.run_dir / "plans.png")


def calibration(train: Dataset, options: Plan) -> list[Any]:
    """Training batches without augmentation."""
    size = min(options.batch_size, len(train))
    loader = Loader(train, size, train=True, seed=0, prefetch=False, drop_last=True)
    return [x for x, _ in islice(iter(loader.epoch(0)), options.batches)]


def measured(artifact: Path, name: str, test: Dataset, model: Any, sizes: Sizes) -> dict[str, Any]:
    """Accuracy of the engine on the whole test set under a plan, and what the plan reads."""
    session = runtime.load(artifact, bits=name, executor=measure.executor())
    layers = quantized_layers(model)
    chosen = session.precision_map
    bits = sum(
        layers[key].weight.numel() * layers[key].weight_quant.bits[p]
        for key, p in chosen.items()
        if len(set(layers[key].weight_quant.bits.values())) > 1
    )
    accuracy = measure.share_equal(measure.engine_top1(session, test), test.labels.numpy())
    return {"bits": bits / sizes.free, "bytes": (bits + sizes.fixed_bits + 7) // 8, "accuracy": accuracy}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against bytes of weight codes (vertical layering, figure 8)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ordered = sorted(rows, key=lambda row: row["bytes"])
    figure, axis = plt.subplots(figsize=(5, 3.2))
    axis.plot([r["bytes"] / 1024 for r in ordered], [100 * r["accuracy"] for r in ordered], "o-", color="#4477aa")
    for row in ordered:
        axis.annotate(f"{row['bits']:.2f}", (row["bytes"] / 1024, 100 * row["accuracy"]), fontsize=7, xytext=(3, -9),
                      textcoords="offset points")  # fmt: skip
    axis.set_xlabel("KiB of weight codes (labels: bits a weight)")
    axis.set_ylabel("accuracy, %")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
