"""pack: write a program as an artifact."""

from __future__ import annotations

import dataclasses
from os import PathLike
from typing import Any

from bitstrata_runtime import artifact
from bitstrata_runtime.program import Program


def pack(
    program: Program, path: str | PathLike[str], provenance: dict[str, Any] | None = None, *, overwrite: bool = False
) -> Any:
    """Write the program as the directory `path` (customarily NAME.strata): spec/artifact.md.

    Args:
        program: from `lower`.
        path: must not exist, unless `overwrite`.
        provenance: JSON values to keep in the manifest (versions, seed, data set); no clock time, so that bytes repeat.

    Returns:
        `bitstrata_runtime.artifact.ArtifactInfo`: files, sizes, bytes a precision.

    Raises:
        TypeError: `program` is none.
        ArtifactError: `path` exists already, or cannot be written.
    """
    if not isinstance(program, Program):
        raise TypeError(f"pack: program must be what lower(model, example) returns, got {type(program).__name__}")
    if provenance is not None:
        program = dataclasses.replace(program, provenance={**program.provenance, **provenance})
    return artifact.write(program, path, overwrite=overwrite)
