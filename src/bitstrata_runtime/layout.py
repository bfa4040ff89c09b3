"""Which files an artifact has, which tensors each holds, and their bytes (spec/artifact.md, sections 3 to 6).

Everything here follows from the manifest alone. A tensor file is a safetensors file whose header is fixed by its
tensors, so a reader knows every byte of it but the tensors' before it opens the file, and compares instead of parsing.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ArtifactError
from .planes import packed_size
from .program import AffineInfo, Layer

if TYPE_CHECKING:
    from numpy.typing import NDArray

MANIFEST = "manifest.json"
BASE = "base.safetensors"
RESIDENT = "resident.safetensors"

_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "I8": np.dtype("i1"), "F64": np.dtype("<f8")}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its safetensors key, dtype name (U8, I8 or F64) and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensor's elements."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Stratum:
    """A file of bit-planes: planes first..last, of every layer that has them."""

    file: str
    first: int
    last: int


@dataclass(frozen=True)
class Contents:
    """What one factors file holds: names of affines and of layers (their input steps), both in manifest order.

    A plan has no steps of its own: its layers use those of their precisions.
    """

    affines: tuple[str, ...]
    steps: tuple[str, ...]


def strata(layers: Iterable[Layer]) -> tuple[Stratum, ...]:
    """The strata, base first; the base is as wide as the narrowest model, every further stratum adds one plane."""
    planar = [layer for layer in layers if layer.planes]
    if not planar:
        return ()
    base = min(min(layer.weight_bits.values()) for layer in planar)
    top = max(layer.source_bits for layer in planar)
    further = (Stratum(f"stratum-{plane}.safetensors", plane, plane) for plane in range(base + 1, top + 1))
    return (Stratum(BASE, 1, base), *further)


def factors_file(key: str) -> str:
    """File of the factors of a precision ("1", "2", ...) or of a plan (its name)."""
    return f"factors-{key}.safetensors"


def layouts(
    layers: Mapping[str, Layer], affines: Mapping[str, AffineInfo], contents: Mapping[str, Contents]
) -> dict[str, tuple[Tensor, ...]]:
    """The tensors of every file but the manifest, in the order in which the manifest lists the files."""
    indexed = [(str(index), layer) for index, layer in enumerate(layers.values())]
    files = {
        stratum.file: tuple(
            Tensor(key, "U8", (stratum.last - stratum.first + 1, packed_size(math.prod(layer.shape))))
            for key, layer in indexed
            if layer.planes and layer.source_bits >= stratum.last
        )
        for stratum in strata(layers.values())
    }
    resident = tuple(Tensor(key, "I8", layer.shape) for key, layer in indexed if not layer.planes)
    if resident:
        files[RESIDENT] = resident
    for key, held in contents.items():
        channels = sum(affines[name].channels for name in held.affines)
        files[factors_file(key)] = (Tensor("affine", "F64", (2, channels)), Tensor("step", "F64", (len(held.steps),)))
    return files


def header(tensors: Iterable[Tensor]) -> bytes:
    """The bytes before the first tensor: length (8 bytes, little endian), JSON, spaces up to a multiple of 8."""
    entries, end = {}, 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        entries[tensor.key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_size(tensors: Iterable[Tensor]) -> int:
    """Bytes of a tensor file."""
    tensors = tuple(tensors)
    return len(header(tensors)) + sum(tensor.size for tensor in tensors)


def split(file: str, data: bytes, tensors: tuple[Tensor, ...]) -> dict[str, NDArray[Any]]:
    """Key -> read-only view of `data`. Raises ArtifactError unless length and header are exactly those of `tensors`."""
    expected = header(tensors)
    if len(data) != file_size(tensors):
        raise ArtifactError(f"{file}: has {len(data)} bytes, its tensors need {file_size(tensors)}")
    if data[: len(expected)] != expected:
        at = next(i for i, (found, wanted) in enumerate(zip(data, expected, strict=False)) if found != wanted)
        raise ArtifactError(
            f"{file}: the header differs from the one fixed by the manifest's shapes, first at byte {at}: "
            f"expected {expected[at : at + 24]!r}, got {data[at : at + 24]!r}"
        )
    arrays: dict[str, NDArray[Any]] = {}
    offset = len(expected)
    for tensor in tensors:
        arrays[tensor.key] = np.ndarray(tensor.shape, _DTYPES[tensor.dtype], data, offset)
        offset += tensor.size
    return arrays
