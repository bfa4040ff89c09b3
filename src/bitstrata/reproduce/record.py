"""Finished runs and float networks as small files that outlast the folder of runs, and go into version control.

<record>/<digest>.json               what a run measured, its configuration and its environment
<record>/float-<digest>.safetensors  weights and statistics of a float network that runs start from
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn


class RecordError(ValueError):
    """A recorded file is not what its name says."""


@dataclass(frozen=True)
class Record:
    """A folder of recorded runs, or none: then nothing is found and nothing is kept."""

    folder: Path | None

    def result(self, name: str) -> dict[str, Any] | None:
        """The result recorded under a run's digest; RecordError if it cannot be read."""
        return None if self.folder is None else read_result(self.folder / f"{name}.json")

    def keep_result(self, name: str, result: Mapping[str, Any]) -> None:
        """Record a run's result."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_result(self.folder / f"{name}.json", result)

    def load_float_(self, name: str, model: nn.Module) -> bool:
        """Load a float network in place; False if there is none. RecordError if it is of another network."""
        file = None if self.folder is None else self.folder / f"{name}.safetensors"
        if file is None or not file.is_file():
            return False
        try:
            model.load_state_dict(load_file(file))
        except Exception as error:
            raise RecordError(f"{file}: not this run's float network ({error}); remove it to train anew") from error
        return True

    def keep_float(self, name: str, model: nn.Module) -> None:
        """Record a float network."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name}.safetensors"
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
        os.replace(temporary, file)


def read_result(file: Path) -> dict[str, Any] | None:
    """A run's result, None if there is no such file; RecordError if it is not a result."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{file}: not JSON ({error}); remove it to run again") from error
    missing = {"config", "measured", "metrics"} - set(found if isinstance(found, dict) else ())
    if missing:
        raise RecordError(
            f"{file}: not the result of a run: {', '.join(sorted(missing))} missing; remove it to run again"
        )
    return dict(found)


def write_result(file: Path, result: Mapping[str, Any]) -> None:
    """Write a run's result, whole or not at all."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)
