"""Artifacts: a program at several precisions as one directory of strata (spec/artifact.md).

`write` makes one, `Artifact` reads one file by file as precisions are asked for, `info` tells what is in one.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import graph, layout, manifest
from .errors import ArtifactError
from .info import ArtifactInfo, Choice, FileRow, LayerRow, PrecisionRow, describe, files_needed, needs, total_bytes
from .layout import Contents
from .manifest import Manifest
from .planes import unpack_plane, widen
from .program import Factors, Program, Weights
from .source import DirectorySource, Source
from .writer import write

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Artifact", "ArtifactInfo", "FileRow", "LayerRow", "PrecisionRow", "info", "write"]


@dataclass
class _Held:
    """What has been read so far. Copied before a load and replaced after it, so that a failure changes nothing."""

    reads: list[tuple[str, int]]
    weights: dict[str, Weights]
    factors: dict[str, Factors]

    def copy(self) -> _Held:
        return _Held(list(self.reads), dict(self.weights), dict(self.factors))


class Artifact:
    """An artifact opened for reading. Only files that a precision needs are read, each once and whole.

    `manifest` is the checked manifest; `reads` lists (file, bytes) of every file read and accepted so far. Every
    problem with the content is an ArtifactError that names the file; the state then is what it was before the call.
    Not safe for use by several threads at once.
    """

    def __init__(self, source: Source, checked: Manifest) -> None:
        self._source = source
        self.manifest = checked
        self._held = _Held([(layout.MANIFEST, checked.size)], {}, {})

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Source) -> Artifact:
        """Read and check manifest.json, and nothing else. `path` is a directory or any `Source`."""
        source = DirectorySource(path) if isinstance(path, str | os.PathLike) else path
        return cls(source, manifest.decode(source.read(layout.MANIFEST, manifest.MAX_BYTES)))

    @property
    def precisions(self) -> tuple[int, ...]:
        """Precisions the artifact serves, ascending."""
        return self.manifest.program.precisions

    @property
    def plans(self) -> dict[str, dict[str, int]]:
        """Named precision maps: plan -> layer -> precision."""
        return {name: dict(chosen) for name, chosen in self.manifest.program.plans.items()}

    @property
    def reads(self) -> list[tuple[str, int]]:
        """(file, bytes) of every file read so far, in order; manifest.json is the first."""
        return list(self._held.reads)

    def needs(self, precision: Choice) -> tuple[set[str], int]:
        """Arguments for `load`: factor keys and bit-planes that a precision, a plan or a precision map needs."""
        return needs(self.manifest, precision)

    def total_bytes(self, precision: Choice) -> int:
        """Bytes of all files, the manifest included, that a device reads to run at `precision` (as in `needs`)."""
        return total_bytes(self.manifest, precision)

    def load(self, precisions_needed: Collection[str], weight_bits_needed: int) -> Program:
        """Read the files not yet read that give these factors and this many bit-planes; return the program.

        precisions_needed: factor keys, "1", "2", ... or plan names; weight_bits_needed: planes of the widest layer, at
        most 8. The base stratum and the resident layers are always read. The program holds all that was ever read;
        its arrays are read-only and shared with the artifact. Raises ArtifactError if a file is missing, is not what
        the manifest states, or if the program breaks spec/numerics.md.
        """
        held = self._held.copy()
        done = {name for name, _ in held.reads}
        for name in files_needed(self.manifest, precisions_needed, weight_bits_needed):
            if name not in done:
                self._read(name, held)
        program = self._program(held)
        graph.validate(program)
        self._held = held
        return program

    def _read(self, name: str, held: _Held) -> None:
        """Read one file and add its content to `held`."""
        entry = self.manifest.files[name]
        data = self._source.read(name, entry.size)
        if len(data) != entry.size:
            raise ArtifactError(f"{name}: has {len(data)} bytes, the manifest states {entry.size}")
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry.sha256:
            raise ArtifactError(f"{name}: sha256 is {digest}, the manifest states {entry.sha256}; it was changed")
        arrays = layout.split(name, data, self.manifest.layouts[name])
        if name in {stratum.file for stratum in self.manifest.strata}:
            self._add_planes(name, arrays, held)
        elif name == layout.RESIDENT:
            self._add_resident(arrays, held)
        else:
            key = next(key for key in self.manifest.contents if layout.factors_file(key) == name)
            held.factors[key] = _factors(arrays, self.manifest.contents[key], self.manifest.program)
        held.reads.append((name, len(data)))

    def _add_planes(self, name: str, arrays: Mapping[str, NDArray[Any]], held: _Held) -> None:
        layers = list(self.manifest.program.layers.values())
        for key, rows in arrays.items():
            layer = layers[int(key)]
            before = held.weights.get(layer.name)
            codes, bits = (before.codes, before.bits) if before else (None, 0)
            for row in rows:
                codes = widen(codes, unpack_plane(row, layer.shape, f"{name}: layer {layer.name!r}, plane {bits + 1}"))
                bits += 1
            assert codes is not None  # a stratum has at least one plane
            codes.flags.writeable = False
            held.weights[layer.name] = Weights(codes, bits)

    def _add_resident(self, arrays: Mapping[str, NDArray[Any]], held: _Held) -> None:
        layers = list(self.manifest.program.layers.values())
        for key, codes in arrays.items():
            layer = layers[int(key)]
            held.weights[layer.name] = Weights(_owned(codes), layer.source_bits)

    def _program(self, held: _Held) -> Program:
        """A program of its own: what a caller does to its dictionaries does not reach the artifact."""
        known = self.manifest.program
        return replace(
            known,
            nodes=tuple(replace(node, attrs=copy.deepcopy(node.attrs)) for node in known.nodes),
            layers=dict(known.layers),
            affines=dict(known.affines),
            weights={name: held.weights[name] for name in known.layers if name in held.weights},
            factors={
                key: Factors(dict(held.factors[key].affine), dict(held.factors[key].step))
                for key in self.manifest.contents
                if key in held.factors
            },
            plans=self.plans,
            provenance=copy.deepcopy(known.provenance),
        )


def _owned(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only, native-endian copy, so that a view does not keep a whole file's bytes alive."""
    array = array.astype(array.dtype.newbyteorder("="), order="C")
    array.flags.writeable = False
    return array


def _factors(arrays: Mapping[str, NDArray[Any]], contents: Contents, program: Program) -> Factors:
    affine, step = arrays["affine"], arrays["step"]
    ends = np.cumsum([program.affines[key].channels for key in contents.affines], dtype=np.int64)
    columns = np.split(affine, ends[:-1], axis=1) if len(ends) else []
    rows = {key: _owned(part) for key, part in zip(contents.affines, columns, strict=True)}
    return Factors(rows, dict(zip(contents.steps, step.tolist(), strict=True)))


def info(path: str | os.PathLike[str] | Source) -> ArtifactInfo:
    """What an artifact holds, from its manifest alone; no other file is read. Raises ArtifactError."""
    return describe(Artifact.open(path).manifest)
