"""`bitstrata info`: what an artifact holds; needs no torch."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from bitstrata.cli.common import human_bytes, output

if TYPE_CHECKING:
    from bitstrata_runtime.artifact import Artifact
    from bitstrata_runtime.info import ArtifactInfo
    from bitstrata_runtime.program import Program


@dataclass(frozen=True)
class Info:
    """Show an artifact's precisions, files and layers; reads its manifest and base only."""

    artifact: Annotated[Path, tyro.conf.Positional]
    """Artifact directory."""
    operations: bool = False
    """Also count the operations of an image at every precision, by kind; reads all."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> None:
        """Print what the artifact holds."""
        from bitstrata_runtime.artifact import Artifact
        from bitstrata_runtime.info import describe

        artifact = Artifact.open(self.artifact)
        manifest = artifact.manifest
        # Shapes follow from the graph, which is only checked together with its weights.
        program = artifact.load(*artifact.needs(min(artifact.precisions)))
        info, macs = describe(manifest), macs_of(program)
        if self.json:
            rows = dataclasses.asdict(info)
            rows["layers"] = [{**row, "macs": macs[row["name"]]} for row in rows["layers"]]
            if self.operations:
                rows["operations"] = operations_of(artifact)
            print(json.dumps({**rows, "input_shape": program.input_shape, "macs": sum(macs.values())}, indent=2))
            return
        self._tables(program, info, macs)
        if self.operations:
            self._operations(operations_of(artifact))

    def _operations(self, rows: list[dict[str, Any]]) -> None:
        from rich.table import Table

        kinds = ("multiplications", "rescalings", "additions", "comparisons", "shifts", "lookups")
        columns = ("precision", "requantization by", *kinds)
        table = Table(title="operations of one image", title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column in columns[:2] else "right")
        for row in rows:
            table.add_row(row["precision"], row["form"], *(f"{row[name]:,}" for name in kinds))
        output().print(table)

    def _tables(self, program: Program, info: ArtifactInfo, macs: dict[str, int]) -> None:
        from rich.table import Table

        console = output()
        shape = "x".join(map(str, program.input_shape))
        print(
            f"{self.artifact}: {human_bytes(info.total)} in {len(info.files)} files, input {shape} "
            f"{program.input_kind}, {sum(macs.values()):,} multiply-adds, sha256 {info.sha256[:16]}",
        )
        precisions = Table(title="precisions", title_justify="left")
        for column in ("precision", "bit-planes", "bytes in all", "bytes more than the row above"):
            precisions.add_column(column, justify="right")
        for row in info.precisions:
            precisions.add_row(row.name, str(row.weight_bits), f"{row.total:,}", f"{row.added:,}")
        console.print(precisions)
        files = Table(title="files", title_justify="left")
        for column in ("file", "bytes", "of which tensors"):
            files.add_column(column, justify="left" if column == "file" else "right")
        for file in info.files:
            files.add_row(file.name, f"{file.size:,}", f"{file.payload:,}")
        console.print(files)
        layers = Table(title="layers", title_justify="left")
        for column in ("layer", "shape", "grid", "weight bits", "weights", "multiply-adds"):
            layers.add_column(column, justify="right" if column in ("weights", "multiply-adds") else "left")
        for layer in info.layers:
            widths = sorted(set(program.layers[layer.name].weight_bits.values()))
            layers.add_row(
                layer.name,
                "x".join(map(str, layer.shape)),
                layer.grid,
                ",".join(map(str, widths)),
                f"{layer.weights:,}",
                f"{macs[layer.name]:,}",
            )
        console.print(layers)


def operations_of(artifact: Artifact) -> list[dict[str, Any]]:
    """Operations of an image at every precision: requantization by multiplication, by comparison, then by table too."""
    from bitstrata_runtime.derive import derive
    from bitstrata_runtime.lookup import as_tables
    from bitstrata_runtime.operations import Operations, count
    from bitstrata_runtime.thresholds import as_thresholds

    rows = []
    for precision in artifact.precisions:
        plan = derive(artifact.load(*artifact.needs(precision)), precision)
        compared = as_thresholds(plan, 255)
        forms = {"multiplication": plan, "comparison": compared, "comparison, table": as_tables(compared)}
        for form, shown in forms.items():
            total = sum(count(shown).values(), Operations())
            rows.append({"precision": str(precision), "form": form, **dataclasses.asdict(total)})
    return rows


def macs_of(program: Program) -> dict[str, int]:
    """Multiply-adds a layer and image: weights times output positions."""
    from bitstrata_runtime import graph

    values = graph.validate(program)
    counts = dict.fromkeys(program.layers, 0)
    for node in program.nodes:
        if node.op == "conv":
            name = node.attrs["layer"]
            _, height, width = values[node.name].shape
            counts[name] += math.prod(program.layers[name].shape) * height * width
    return counts
