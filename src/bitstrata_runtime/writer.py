"""Writing artifacts: the same program always gives the same bytes, and a path never holds half an artifact."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import graph, layout, manifest
from .errors import ArtifactError
from .info import ArtifactInfo, describe
from .layout import Contents
from .manifest import FileEntry
from .planes import pack_plane
from .program import Layer, Program

if TYPE_CHECKING:
    from numpy.typing import NDArray


def write(program: Program, path: str | os.PathLike[str], *, overwrite: bool = False) -> ArtifactInfo:
    """Write `program` as the artifact directory `path`; returns what `info(path)` would.

    All is written to a temporary directory beside `path`, then renamed; on any failure `path` is as it was and the
    temporary directory is gone. An existing `path` is an error, unless `overwrite` is set and it is an artifact.

    Raises ArtifactError if the program does not satisfy spec/numerics.md or spec/artifact.md, or lacks planes or
    factors, and if `path` may not be written or replaced; OSError if the file system fails.
    """
    target = Path(os.path.abspath(path))
    _check_target(target, overwrite)
    graph.validate(program)
    _check_weights(program)
    held = manifest.contents(program)
    _check_manifest(program, held)
    temporary = _sibling(target, "new")
    temporary.mkdir()
    try:
        files: dict[str, FileEntry] = {}
        for name, tensors in layout.layouts(program.layers, program.affines, held).items():
            parts = (part.tobytes() for part in _parts(program, held, name))
            files[name] = _write_file(temporary / name, chain([layout.header(tensors)], parts))
        data = manifest.encode(program, held, files)
        _write_file(temporary / layout.MANIFEST, [data])
        _sync_directory(temporary)
        _replace(temporary, target, overwrite)
    finally:
        _remove(temporary, ignore_errors=True)  # gone already if all went well
    return describe(manifest.decode(data))


def _check_manifest(program: Program, held: dict[str, Contents]) -> None:
    """Encode and decode the manifest with empty hashes: the reader's rules are the writer's, before a file exists."""
    sizes = {
        name: layout.file_size(tensors)
        for name, tensors in layout.layouts(program.layers, program.affines, held).items()
    }
    manifest.decode(
        manifest.encode(program, held, {name: FileEntry(name, "0" * 64, size) for name, size in sizes.items()})
    )


def _check_weights(program: Program) -> None:
    for layer in program.layers.values():
        weights = program.weights.get(layer.name)
        if weights is None or weights.bits != layer.source_bits:
            held = 0 if weights is None else weights.bits
            raise ArtifactError(
                f"layer {layer.name!r}: an artifact needs all {layer.source_bits} bit-planes, the program holds {held}"
            )


def _parts(program: Program, held: dict[str, Contents], name: str) -> Iterator[NDArray[np.generic]]:
    """The tensors of a file, in file order, one at a time."""
    layers = list(program.layers.values())
    for stratum in layout.strata(layers):
        if stratum.file == name:
            for layer in layers:
                if layer.planes and layer.source_bits >= stratum.last:
                    yield from _planes(program, layer, range(stratum.first, stratum.last + 1))
            return
    if name == layout.RESIDENT:
        yield from (program.weights[layer.name].codes for layer in layers if not layer.planes)
        return
    key = next(key for key in held if layout.factors_file(key) == name)
    factors, contents = program.factors[key], held[key]
    rows = [np.asarray(factors.affine[affine], "<f8") for affine in contents.affines]
    yield np.concatenate(rows, axis=1) if rows else np.empty((2, 0), "<f8")
    yield np.array([factors.step[layer] for layer in contents.steps], "<f8")


def _planes(program: Program, layer: Layer, planes: range) -> Iterator[NDArray[np.uint8]]:
    codes = np.ascontiguousarray(program.weights[layer.name].codes)
    for plane in planes:
        yield pack_plane(codes, layer.source_bits, plane)


def _write_file(path: Path, parts: Iterable[bytes]) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for data in parts:
            file.write(data)
            digest.update(data)
            size += len(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(path.name, digest.hexdigest(), size)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise ArtifactError(f"{target}: the directory it would be in does not exist")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ArtifactError(f"{target}: exists already; overwrite=True replaces an artifact")
    if target.is_symlink() or not target.is_dir():
        raise ArtifactError(f"{target}: is not a directory, so it is no artifact and is not replaced")
    names = {entry.name for entry in os.scandir(target) if entry.is_file(follow_symlinks=False)}
    foreign = [name for name in os.listdir(target) if name not in names or not _is_artifact_file(name)]
    if foreign or layout.MANIFEST not in names:
        cause = f"it holds {sorted(foreign)[0]!r}" if foreign else f"it has no {layout.MANIFEST}"
        raise ArtifactError(f"{target}: {cause}, so it is no artifact and is not replaced")


def _is_artifact_file(name: str) -> bool:
    return name == layout.MANIFEST or name.endswith(".safetensors")


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{os.urandom(8).hex()}.{kind}")


def _replace(temporary: Path, target: Path, overwrite: bool) -> None:
    _check_target(target, overwrite)  # again: writing took its time
    old = _sibling(target, "old")
    replaced = os.path.lexists(target)
    if replaced:
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if replaced:
            old.rename(target)
        raise
    _sync_directory(target.parent)
    if replaced:
        _remove(old)


def _remove(folder: Path, *, ignore_errors: bool = False) -> None:
    import shutil  # with its compressors, more than all else that reading an artifact needs

    shutil.rmtree(folder, ignore_errors=ignore_errors)


def _sync_directory(path: Path) -> None:
    """Make names in a directory durable, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
