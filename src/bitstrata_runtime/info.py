"""What an artifact holds, and which of its files a precision needs: all that follows from the manifest alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from . import layout
from .errors import ArtifactError
from .manifest import VERSION, Manifest

Choice = int | str | Mapping[str, int]  # a precision, a plan's name, or a precision for every layer


@dataclass(frozen=True)
class FileRow:
    """One file. `payload` is the bytes of its tensors, size - payload is overhead; the manifest has no tensors."""

    name: str
    size: int
    payload: int
    tensors: int
    sha256: str


@dataclass(frozen=True)
class PrecisionRow:
    """One precision or plan. total: bytes of all files it needs, manifest included; added: bytes a device that holds
    everything of the rows above still has to read; weight_bits: planes of the widest layer (0: it has none)."""

    name: str
    weight_bits: int
    total: int
    added: int


@dataclass(frozen=True)
class LayerRow:
    """One layer; `weights` counts its codes."""

    name: str
    kind: str
    shape: tuple[int, int, int, int]
    weights: int
    source_bits: int
    planes: bool
    grid: str


@dataclass(frozen=True)
class ArtifactInfo:
    """An artifact at a glance. Sizes are in bytes.

    sha256 identifies the artifact: it is the manifest's, which holds those of all other files. plane_payload and
    plane_overhead: bit-planes, and what their files take beyond them; total: all files.
    """

    version: int
    sha256: str
    files: tuple[FileRow, ...]
    precisions: tuple[PrecisionRow, ...]
    layers: tuple[LayerRow, ...]
    provenance: dict[str, Any]
    plane_payload: int
    plane_overhead: int
    total: int


def needs(manifest: Manifest, choice: Choice) -> tuple[set[str], int]:
    """Factor keys and number of bit-planes that a precision, a plan or a precision map needs.

    Raises ArtifactError if the artifact does not serve it.
    """
    program = manifest.program
    keys: set[str] = set()
    chosen: Mapping[str, int] | None
    if isinstance(choice, str):
        chosen = program.plans.get(choice)
        keys.add(choice)
    elif isinstance(choice, Mapping):
        chosen = choice if choice.keys() == program.layers.keys() else None
    else:
        chosen = dict.fromkeys(program.layers, choice)
    if chosen is None or not all(type(item) is int and item in program.precisions for item in chosen.values()):
        raise ArtifactError(
            f"precision {choice!r}: the artifact serves {program.precisions}, maps of all its layers to these, "
            f"and the plans {tuple(program.plans)}"
        )
    planar = [layer for layer in program.layers.values() if layer.planes]
    bits = max((layer.weight_bits[chosen[layer.name]] for layer in planar), default=0)
    return keys | {str(precision) for precision in chosen.values()}, bits


def files_needed(manifest: Manifest, keys: Collection[str], bits: int) -> list[str]:
    """Files with the factors `keys` and the first `bits` planes, in the manifest's order; base and resident always.

    Raises ArtifactError for an unknown key or a number of planes that no layer can have.
    """
    for key in keys:
        if key not in manifest.contents:
            raise ArtifactError(f"no factors {key!r} in this artifact, it has {', '.join(manifest.contents)}")
    if type(bits) is not int or not 0 <= bits <= 8:
        raise ArtifactError(f"the number of bit-planes is an integer from 0 to 8, got {bits!r}")
    wanted = {layout.BASE, layout.RESIDENT, *(layout.factors_file(key) for key in keys)}
    wanted |= {stratum.file for stratum in manifest.strata if stratum.last <= bits}
    return [name for name in manifest.files if name in wanted]


def total_bytes(manifest: Manifest, choice: Choice) -> int:
    """Bytes of all files, the manifest included, that running at `choice` needs."""
    names = files_needed(manifest, *needs(manifest, choice))
    return manifest.size + sum(manifest.files[name].size for name in names)


def describe(manifest: Manifest) -> ArtifactInfo:
    """The manifest as rows for people."""
    files = [
        FileRow(
            name, entry.size, sum(t.size for t in manifest.layouts[name]), len(manifest.layouts[name]), entry.sha256
        )
        for name, entry in manifest.files.items()
    ]
    strata = {stratum.file for stratum in manifest.strata}
    payload = sum(row.payload for row in files if row.name in strata)
    plane_bytes = sum(row.size for row in files if row.name in strata)
    files.insert(0, FileRow(layout.MANIFEST, manifest.size, 0, 0, manifest.sha256))
    layers = manifest.program.layers.values()
    return ArtifactInfo(
        version=VERSION,
        sha256=manifest.sha256,
        files=tuple(files),
        precisions=_precision_rows(manifest),
        layers=tuple(
            LayerRow(
                layer.name, layer.kind, layer.shape, math.prod(layer.shape), layer.source_bits, layer.planes, layer.grid
            )
            for layer in layers
        ),
        provenance=manifest.program.provenance,
        plane_payload=payload,
        plane_overhead=plane_bytes - payload,
        total=sum(row.size for row in files),
    )


def _precision_rows(manifest: Manifest) -> tuple[PrecisionRow, ...]:
    rows: list[PrecisionRow] = []
    held: set[str] = set()
    choices: tuple[Choice, ...] = (*manifest.program.precisions, *manifest.program.plans)
    for choice in choices:
        keys, bits = needs(manifest, choice)
        new = [name for name in files_needed(manifest, keys, bits) if name not in held]
        added = sum(manifest.files[name].size for name in new) + (0 if rows else manifest.size)
        held.update(new)
        rows.append(PrecisionRow(str(choice), bits, total_bytes(manifest, choice), added))
    return tuple(rows)
