"""What a trained network comes to: its artifact, what that reaches, and whether it computes the same (torch side)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata.cli import measure
from bitstrata.cli.common import CommandError, bytes_of, environment, write_json
from bitstrata.cli.options import provenance
from bitstrata.cli.work import Run
from bitstrata.train import Level


def write(run: Run, model: nn.Module, float_accuracy: float, fake: dict[Level, float]) -> None:
    """Artifact and results.json of a trained network. fake: its accuracies, fake-quantized.

    Raises:
        CommandError: the artifact does not compute what the network does; results.json says where.
    """
    assert run.out is not None
    if run.refusal is not None:
        rows = [{"bits": p, "float_accuracy": float_accuracy, "fake_accuracy": fake[p]} for p in run.bits]
        results = {"rows": rows, "no_artifact": run.refusal, "seconds": run.seconds, "seed": run.options.seed}
        write_json(run.out / "results.json", {**results, **environment()})
        print_results(run.console, results)
        return
    artifact = run.out / "model.strata"
    program = packed(run, model, artifact)
    rows = run.timed("measure", lambda: measured_rows(run, model, artifact, float_accuracy, fake))
    report = run.timed("verify", lambda: verified(run, model, program))
    results = {
        "rows": rows,
        "verify": {"ok": bool(report.ok), "images": run.options.verify_images, "report": str(report)},
        "files": bytes_of(artifact),
        "seconds": run.seconds,
        "seed": run.options.seed,
        "executor": measure.executor(),
        "isa": measure.isa_in_use(runtime.load(artifact, executor=measure.executor()), run.options.isa),
        **environment(),
    }
    write_json(run.out / "results.json", results)
    print_results(run.console, results)
    if not report.ok:
        raise CommandError(f"verification failed; see {run.out / 'results.json'}")


def packed(run: Run, model: nn.Module, artifact: Path) -> Any:
    """Lower the network and write the artifact anew; returns the program."""
    for left in artifact.parent.glob(f".{artifact.name}.*"):  # of a process that was killed while it packed
        shutil.rmtree(left, ignore_errors=True)
    program = run.timed("lower", lambda: bs.lower(model, run.example))
    bs.pack(program, artifact, provenance(run.options), overwrite=artifact.exists())
    return program


def measured_rows(
    run: Run, model: nn.Module, artifact: Path, float_accuracy: float, fake: dict[Level, float]
) -> list[dict[str, Any]]:
    """One row a precision: the engine on the whole test set, beside the fake-quantized network in float64."""
    labels = run.test.labels.numpy()
    exact = measure.reference_top1(model, run.test, run.bits)
    session = runtime.load(artifact, bits=run.bits[0], executor=measure.executor(), isa=run.options.isa)
    rows = []
    for bits in run.bits:
        if bits != run.bits[0]:
            session.upgrade(bits)
        engine = measure.engine_top1(session, run.test)
        rows.append(
            {
                "bits": bits,
                "float_accuracy": float_accuracy,
                "fake_accuracy": fake[bits],
                "fake64_accuracy": measure.share_equal(exact[bits], labels),
                "engine_accuracy": measure.share_equal(engine, labels),
                "top1_agreement": measure.share_equal(engine, exact[bits]),
                "bytes": measure.bytes_fetched(session),
                "images": len(labels),
                "disagreements": measure.disagreements(engine, exact[bits], labels),
            }
        )
    return rows


def verified(run: Run, model: nn.Module, program: Any) -> Any:
    """Verify every layer on a sample of the test set, as uint8 pixels."""
    count = min(run.options.verify_images, len(run.test))
    return bs.verify(model, program, measure.inputs_of(program, run.test.batch(range(count))[0], run.test))


def print_results(console: Console, results: dict[str, Any]) -> None:
    """The rows as a table, and whether verification passed."""
    table = Table(title="accuracy on the test set", title_justify="left")
    for column in ("bits", "float", "fake-quantized", "integer engine", "same class", "bytes read"):
        table.add_column(column, justify="right")
    shares = ("float_accuracy", "fake_accuracy", "engine_accuracy", "top1_agreement")
    for row in results["rows"]:
        cells = [f"{row[key]:.2%}" if key in row else "-" for key in shares]
        table.add_row(str(row["bits"]), *cells, f"{row['bytes']:,}" if "bytes" in row else "-")
    console.print(table)
    if "no_artifact" in results:
        console.print(f"no artifact: {results['no_artifact']}")
        return
    console.print(f"verified layer by layer: {'ok' if results['verify']['ok'] else 'FAILED'}")
