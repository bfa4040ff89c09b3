"""TensorBoard as a second reader of what the metrics file gets: one event directory a stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class TensorBoardLog:
    """Writes the events of a stage as scalars under `directory`/`run`.

    Tags: loss/step/LEVEL, loss/epoch/LEVEL, accuracy/train/LEVEL, accuracy/eval/LEVEL ("4b", or "float"), lr,
    images_per_s, seconds/PART, and of `diagnostics.Live` QUANTITY/KEY and QUANTITY/LAYER/KEY; accuracies are fractions,
    steps are the stage's optimizer steps. Raises ModuleNotFoundError without tensorboard.

    start: steps that are done; events of a previous process beyond them are marked as void, as a resumed stage
    repeats them.
    """

    def __init__(self, directory: Path, run: str, start: int = 0) -> None:
        require()
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(directory / run), purge_step=start + 1)

    def write(self, event: str, **fields: Any) -> None:
        """The scalars of one event; what is none is left to the metrics file."""
        for tag, value in scalars(event, fields):
            self.writer.add_scalar(tag, value, fields["step"])
        if event != "step":
            self.writer.flush()

    def close(self) -> None:
        """Write what is left and close the files."""
        self.writer.close()


def require() -> None:
    """Raise ModuleNotFoundError that says what to install, if tensorboard is absent."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f'tensorboard logs: {error}; install it with: pip install "bitstrata[tensorboard]"'
        ) from error


def scalars(event: str, fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, value) of every scalar in an event of the metrics file."""
    groups = {
        "step": {"loss": "loss/step"},
        "epoch": {"loss": "loss/epoch", "accuracy": "accuracy/train"},
        "eval": {"accuracy": "accuracy/eval"},
    }
    for name, prefix in groups.get(event, {}).items():
        for level, value in fields.get(name, {}).items():
            yield f"{prefix}/{level}b" if level.isdigit() else f"{prefix}/{level}", value
    for name in ("lr", "images_per_s"):
        if name in fields:
            yield name, fields[name]
    if event == "diagnosis":
        yield from _diagnosis(fields)
    if event == "time":
        for part, seconds in fields["seconds"].items():
            yield f"seconds/{part}", seconds


def _diagnosis(fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for quantity, by_key in fields["whole"].items():
        for key, value in by_key.items():
            yield f"{quantity}/{key}", value
    for quantity, by_key in fields["layers"].items():
        for key, of_layers in by_key.items():
            for layer, value in of_layers.items():
                yield f"{quantity}/{layer}/{key}", value
