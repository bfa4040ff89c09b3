"""`bitstrata verify`: an artifact against the network it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from bitstrata.cli.common import CommandError, environment, need_training, output, write_json

if TYPE_CHECKING:
    from bitstrata.data import Dataset


@dataclass(frozen=True)
class Verify:
    """Compare an artifact with its trained network, layer by layer: codes, distances to thresholds, classes."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory of `train` or `quantize`."""
    artifact: Path | None = None
    """Artifact to verify; default the run's own model.strata."""
    images: int = 64
    """Test images to verify on."""
    all: bool = False
    """Also compare every integer of every layer, engine against reference, on all test images, on every kernel set.
    Writes RUN_DIR/exactness.json; the reference computes its convolutions as exact matrix products here."""
    root: Path | None = None
    """Directory of the data set's files, if it has moved."""

    def run(self) -> None:
        """Print the report; a difference that rounding does not explain is an error."""
        need_training("verify")
        import bitstrata as bs
        from bitstrata.cli import measure
        from bitstrata.cli.saved import SavedRun
        from bitstrata_runtime.artifact import Artifact

        run = SavedRun(self.run_dir, self.root)
        dataset = run.data()
        path = self.artifact or run.artifact
        artifact = Artifact.open(path)
        keys, bits = set(map(str, artifact.precisions)), 0
        for precision in artifact.precisions:
            bits = max(bits, artifact.needs(precision)[1])
        program = artifact.load(keys, bits)
        sample = dataset.batch(range(min(self.images, len(dataset))))[0]
        report = bs.verify(run.model(dataset), program, measure.inputs_of(program, sample, dataset))
        output().print(str(report), markup=False, highlight=False)
        if not report.ok:
            raise CommandError(f"verify: {path} differs from the network of {self.run_dir}")
        if self.all:
            self._everything(path, artifact.precisions, dataset)

    def _everything(self, path: Path, precisions: tuple[int, ...], dataset: Dataset) -> None:
        from bitstrata.cli import measure
        from bitstrata_runtime import available_isas

        isas = available_isas()
        found = [measure.values_differing(path, p, dataset, isas, "oracle") for p in precisions]
        rows = [
            {"bits": p, "isa": isa, "images": len(dataset), "layers_differing_from_reference": len(names[isa])}
            for p, names in zip(precisions, found, strict=True)
            for isa in isas
        ]
        write_json(self.run_dir / "exactness.json", {"rows": rows, **environment()})
        for row in rows:
            output().print(
                f"{row['bits']} bits, {row['isa']}: {row['layers_differing_from_reference']} values differ from the "
                f"reference on {row['images']:,} images",
                highlight=False,
            )
        if any(row["layers_differing_from_reference"] for row in rows):
            raise CommandError(f"verify: engine and reference differ; see {self.run_dir / 'exactness.json'}")
