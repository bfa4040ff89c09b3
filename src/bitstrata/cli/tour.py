"""What `bitstrata demo` does: train on digits, pack, run at the narrowest precision, upgrade stratum by stratum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata.cli import loading, measure, outcome, pipeline
from bitstrata.cli.common import output, write_json
from bitstrata.cli.demo import Demo
from bitstrata.cli.train import Train
from bitstrata.cli.work import Run
from bitstrata.train import keep_freed_memory
from bitstrata.train.checkpoint import seed_all


def run(options: Demo) -> None:
    """The whole tour; prints a table and writes the artifact, results.json and the figure."""
    console = output()
    training = training_options(options)
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    bits = loading.make_recipe(training).precisions
    train, test = (loading.load_data("digits", None, split) for split in ("train", "test"))
    work = Run(training, None, bits, train, test, console)
    seed_all(training.seed)
    model = loading.make_model(training.model, train)
    float_accuracy = pipeline.float_stage(work, model, training)
    fake = pipeline.joint_stage(work, model)
    artifact = options.out / "digits.strata"
    options.out.mkdir(parents=True, exist_ok=True)
    outcome.packed(work, model, artifact)
    rows = upgrade(work, model, artifact, float_accuracy, fake)
    write_json(options.out / "results.json", rows)
    figure = options.out / "accuracy_vs_bytes.png"
    plot(rows, figure)
    console.print(table(rows))
    seconds = sum(work.seconds[stage] for stage in ("float", "joint"))
    print(
        f"float network {float_accuracy:.2%}; {len(test)} test images; trained in {seconds:.0f} s\n"
        f"{artifact}, {options.out / 'results.json'}, {figure}"
    )


def training_options(options: Demo) -> Train:
    """The demo's training in the terms of `bitstrata train`."""
    return Train(
        data="digits",
        model="digits_resnet",
        bits="1,2,3,4",
        float_epochs=options.float_epochs,
        float_lr=0.1,
        float_warmup=1.0,
        epochs=options.epochs,
        lr=0.05,
        batch_size=64,
        seed=options.seed,
        threads=options.threads,
        isa=options.isa,
        eval_every=0,
    )


def upgrade(
    work: Run, model: Any, artifact: Path, float_accuracy: float, fake: dict[bs.train.Level, float]
) -> list[dict[str, Any]]:
    """Load the artifact at the narrowest precision and upgrade it; one row a precision."""
    labels = work.test.labels.numpy()
    exact = measure.reference_top1(model, work.test, work.bits)
    image = work.test.batch([0])[0].numpy()
    session = runtime.load(artifact, bits=work.bits[0], executor="engine", isa=work.options.isa)
    rows: list[dict[str, Any]] = []
    for bits in work.bits:
        if bits != work.bits[0]:
            session.upgrade(bits)
        engine = measure.engine_top1(session, work.test)
        fetched = measure.bytes_fetched(session)
        differing = measure.values_differing(artifact, bits, work.test, [work.options.isa])
        rows.append(
            {
                "bits": bits,
                "bytes_fetched": fetched,
                "bytes_added": fetched - (rows[-1]["bytes_fetched"] if rows else 0),
                "float_accuracy": float_accuracy,
                "fake_accuracy": fake[bits],
                "engine_accuracy": measure.share_equal(engine, labels),
                "top1_agreement": measure.share_equal(engine, exact[bits]),
                "layers_differing_from_reference": len(differing[work.options.isa]),
                "latency_ms": round(measure.latency_ms(session, image), 4),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    shown = Table(title="one artifact, upgraded in place", title_justify="left")
    for column in (
        "bits",
        "bytes read",
        "this step",
        "engine",
        "fake-quantized",
        "same class",
        "layers differing",
        "ms",
    ):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            str(row["bits"]),
            f"{row['bytes_fetched']:,}",
            f"+{row['bytes_added']:,}",
            *(f"{row[key]:.2%}" for key in ("engine_accuracy", "fake_accuracy", "top1_agreement")),
            str(row["layers_differing_from_reference"]),
            f"{row['latency_ms']:.3f}",
        )
    return shown


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy of the integer engine against bytes read, each point named by its bits, the float network as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    size = [row["bytes_fetched"] / 1024 for row in rows]
    accuracy = [100 * row["engine_accuracy"] for row in rows]
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.axhline(
        100 * rows[0]["float_accuracy"], color="0.45", linestyle="--", linewidth=1.2, zorder=1, label="float network"
    )
    axes.plot(
        size, accuracy, color="#1f6f8b", marker="o", markersize=7, linewidth=1.8, zorder=3, label="integer engine"
    )
    for x, y, row in zip(size, accuracy, rows, strict=True):
        name = f"{row['bits']} bit" + ("s" if row["bits"] > 1 else "")
        place: dict[str, Any] = {"xytext": (7, -7), "textcoords": "offset points", "ha": "left", "va": "top"}
        paper = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        axes.annotate(f"{name}\n{y:.1f} %", (x, y), fontsize=9, bbox=paper, zorder=2, **place)
    axes.set_xlabel("bytes read from the artifact (KiB)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("One network, upgraded bit-plane by bit-plane (handwritten digits)", fontsize=11)
    spread = max(*accuracy, 100 * rows[0]["float_accuracy"]) - min(accuracy)
    axes.set_ylim(min(accuracy) - max(0.35 * spread, 1.0), None)
    axes.margins(x=0.12, y=0.1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=160)
    plt.close(figure)
