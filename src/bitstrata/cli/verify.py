"""`bitstrata verify`: an artifact against the network it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bitstrata.cli.common import CommandError, need_training


@dataclass(frozen=True)
class Verify:
    """Compare an artifact with its trained network, layer by layer: codes, distances to thresholds, classes."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory of `train` or `quantize`."""
    artifact: Path | None = None
    """Artifact to verify; default the run's own model.strata."""
    images: int = 64
    """Test images to verify on."""
    root: Path | None = None
    """Directory of the data set's files, if it has moved."""

    def run(self) -> None:
        """Print the report; a difference that rounding does not explain is an error."""
        need_training("verify")
        import bitstrata as bs
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
        report = bs.verify(run.model(dataset), program, sample)
        print(report)
        if not report.ok:
            raise CommandError(f"verify: {path} differs from the network of {self.run_dir}")
