"""`bitstrata eval`: accuracy of a trained network or of an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bitstrata.cli.common import CommandError, need_training, parse_bits, write_json


@dataclass(frozen=True)
class Eval:
    """Top-1 accuracy on the test set at each precision: of a run directory's network, or of an artifact's integers."""

    target: Annotated[Path, tyro.conf.Positional]
    """A run directory (fake-quantized network) or an artifact (integer engine)."""
    bits: str | None = None
    """Precisions to evaluate, as 1,2,4; default all."""
    stage: Literal["joint", "float"] = "joint"
    """Which network of a run directory: the quantized one or the float one."""
    data: str = "cifar10"
    """Data set for an artifact; a run directory knows its own."""
    root: Path | None = None
    """Directory of the data set's files."""
    limit: int | None = None
    """Use only the first images of the test set."""
    executor: Literal["engine", "reference", "oracle"] = "engine"
    """What runs an artifact: the engine, the slow reference, or the reference by matrix products."""
    isa: str | None = None
    """Instruction set of the engine; the best one by default."""
    threads: int = 1
    """Threads of the engine."""
    json: Path | None = None
    """Also write the accuracies to this file."""

    def run(self) -> None:
        """Print one line a precision."""
        need_training("eval")
        if not self.target.exists():
            raise CommandError(f"eval: {self.target} does not exist")
        accuracy = self._artifact() if (self.target / "manifest.json").is_file() else self._network()
        for level, value in accuracy.items():
            print(f"{level if isinstance(level, str) else f'{level} bits':8} {value:.2%}")
        if self.json is not None:
            write_json(self.json, {str(level): value for level, value in accuracy.items()})

    def _network(self) -> dict[Any, float]:
        from bitstrata.cli.loading import first_images
        from bitstrata.cli.saved import SavedRun
        from bitstrata.data import Loader
        from bitstrata.train import evaluate

        run = SavedRun(self.target, self.root)
        dataset = run.data()
        model = run.model(dataset, self.stage)
        if self.limit is not None:
            dataset = first_images(dataset, self.limit)
        levels = parse_bits(self.bits) if self.bits is not None else None
        return evaluate(model, Loader(dataset, 250, train=False).epoch(0), levels)

    def _artifact(self) -> dict[Any, float]:
        import bitstrata_runtime as runtime
        from bitstrata.cli import loading, measure
        from bitstrata_runtime.artifact import Artifact

        dataset = loading.load_data(self.data, self.root, "test", self.limit)
        levels = parse_bits(self.bits) if self.bits is not None else Artifact.open(self.target).precisions
        found = {}
        for level in levels:
            session = runtime.load(self.target, bits=level, executor=self.executor, isa=self.isa, threads=self.threads)
            found[level] = measure.share_equal(measure.engine_top1(session, dataset), dataset.labels.numpy())
        return found
