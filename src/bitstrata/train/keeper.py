"""The checkpoints of one stage: the last ones and the best one, never without a good one, damaged ones set aside."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitstrata.train import checkpoint
from bitstrata.train.checkpoint import CheckpointError


class Keeper:
    """Files of the stage NAME in a directory.

    NAME.ckpt is the last checkpoint, NAME.1.ckpt the one before it, and so on up to `keep` files; NAME.best.ckpt the
    best one. keep: at least 1.
    """

    def __init__(self, directory: Path, name: str, keep: int) -> None:
        self.directory, self.name, self.keep = directory, name, keep

    @property
    def last(self) -> Path:
        """Where the last checkpoint is."""
        return self.directory / f"{self.name}.ckpt"

    @property
    def best(self) -> Path:
        """Where the best checkpoint is."""
        return self.directory / f"{self.name}.best.ckpt"

    def older(self, age: int) -> Path:
        """The checkpoint that was the last one `age` checkpoints ago."""
        return self.last if age == 0 else self.directory / f"{self.name}.{age}.ckpt"

    def save(self, state: Mapping[str, Any], best: bool = False) -> None:
        """Write a checkpoint; with `best` it is also the best one.

        At every moment each name stands for a whole file, and the last good checkpoint has one.

        Raises:
            CheckpointError: the file system refuses; the checkpoints before are intact.
        """
        temporary = checkpoint.write_temporary(self.last, state)
        with checkpoint.refused(self.last, temporary):
            if best:
                _second_name(temporary, self.best)
            self._age()
            os.replace(temporary, self.last)
            checkpoint.sync_directory(self.directory)

    def load(self) -> tuple[dict[str, Any], Path] | None:
        """The newest checkpoint that is whole, and its path; None where there are no checkpoints.

        One that is damaged is set aside under the name NAME.ckpt.damaged, so that it can push no good one out.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.

        Warns:
            UserWarning: a damaged one was passed over; the message names it and the one that is taken.
        """
        damaged: list[str] = []
        moved: list[Path] = []
        for path in self._candidates():
            try:
                state = checkpoint.load(path)
            except CheckpointError as error:
                damaged.append(str(error))
                moved.append(path)
                continue
            if damaged:
                warnings.warn(
                    f"{'; '.join(damaged)}. Continuing from the one before it, {path}; "
                    f"damaged files are renamed to {_aside(moved[0]).name} and the like",
                    stacklevel=4,
                )
                for bad in moved:
                    os.replace(bad, _aside(bad))
            return state, path
        if damaged:
            raise CheckpointError(
                f"no whole checkpoint of {self.name!r} is left: {'; '.join(damaged)}. Put a copy back, or start over "
                "(resume=False, --fresh)"
            )
        return None

    def clear(self) -> None:
        """Delete all of the stage's checkpoints, for one that starts over."""
        for path in [self.last, *self._numbered(), self.best]:
            for file in (path, path.with_name(path.name + ".tmp"), _aside(path)):
                file.unlink(missing_ok=True)

    def _candidates(self) -> list[Path]:
        """Existing checkpoints, newest first; the best one, which may be much older, last."""
        return [path for path in (self.last, *self._numbered(), self.best) if path.is_file()]

    def _numbered(self) -> list[Path]:
        """Existing NAME.1.ckpt, NAME.2.ckpt ..., newest first."""
        ages = [
            int(age)
            for path in self.directory.glob(f"{self.name}.*.ckpt")
            if (age := path.name.removeprefix(f"{self.name}.").removesuffix(".ckpt")).isdigit()
        ]
        return [self.older(age) for age in sorted(ages)]

    def _age(self) -> None:
        """Make the last checkpoint the one before the last, and drop those beyond `keep`."""
        if self.last.exists() and self.keep > 1:
            for age in range(self.keep - 1, 1, -1):
                if self.older(age - 1).exists():
                    os.replace(self.older(age - 1), self.older(age))
            _second_name(self.last, self.older(1))
        for path in self._numbered():
            if path not in [self.older(age) for age in range(self.keep)] and self.last.exists():
                path.unlink()


def _second_name(file: Path, name: Path) -> None:
    """Give `file` another name, in the place of what has it, in one step: a link, or a copy where there are none."""
    new = name.with_name(name.name + ".tmp")
    new.unlink(missing_ok=True)
    try:
        os.link(file, new)
    except OSError:
        _copy(file, new)
    os.replace(new, name)


def _copy(file: Path, new: Path) -> None:
    try:
        shutil.copyfile(file, new)
        with new.open("rb") as stream:
            os.fsync(stream.fileno())
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".damaged")
