"""Asking the native reader what it makes of artifacts (engine/tests/artifact_dump.cc)."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from helpers_artifact import Files, MemorySource

from bitstrata_runtime import graph
from bitstrata_runtime.artifact import Artifact
from bitstrata_runtime.errors import ArtifactError, ProgramError
from bitstrata_runtime.program import Factors, Program, Weights

KINDS = ("code", "acc", "fixed")


class NativeReader:
    """A running artifact_dump. `ask` takes files, or a directory, and steps; the answers are JSON values."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, source: Files | Path, *steps: str, careless: bool = False) -> list[Any]:
        """What opening gives, then what each step gives. See artifact_dump.cc for the steps.

        careless: the files come from a function that ignores the limit it is given.
        """
        if isinstance(source, Path):
            parts = [struct.pack("<I", (1 << 32) - 1), _text(str(source).encode())]
        else:
            parts = [struct.pack("<I", (1 << 32) - 2)] if careless else []
            parts.append(struct.pack("<I", len(source)))
            for name, data in source.items():
                parts += [_text(name.encode()), _text(data)]
        parts += [struct.pack("<I", len(steps)), *(_text(step.encode()) for step in steps)]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"".join(parts))
        self._process.stdin.flush()
        lines = [self._process.stdout.readline() for _ in range(1 + len(steps))]
        assert all(lines), f"artifact_dump ended: {self._process.poll()}"
        return [json.loads(line) for line in lines]

    def close(self) -> int:
        """Let it end; returns its exit status, which is that of the sanitizers, too."""
        self._process.communicate()
        return self._process.returncode


def _text(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def expected_program(program: Program) -> dict[str, Any]:
    """What opening must give for a whole valid program."""
    layers, affines = list(program.layers), list(program.affines)
    nodes = [node.name for node in program.nodes]
    infos = graph.validate(program)

    def attrs(node: Any) -> dict[str, Any]:
        value = dict(node.attrs)
        for key in ("layer", "to"):
            if key in value:
                value[key] = layers.index(value[key])
        if "affine" in value:
            value["affine"] = [affines.index(name) for name in value["affine"]]
        if node.op in ("requant", "rescale", "clip"):
            bounds = value.get("clip", (None, None))
            value["clip"] = [None if bound is None else float(bound) for bound in bounds]
        return {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}

    def value(info: graph.ValueInfo) -> list[Any]:
        layer = -1 if info.layer is None else layers.index(info.layer)
        origin = nodes.index(info.origin) if info.origin else -1
        return [list(info.shape), KINDS.index(info.kind), layer, origin, info.aligned]

    return {
        "shape": list(program.input_shape),
        "pixels": program.input_kind == "pixels",
        "precisions": list(program.precisions),
        "input": next(index for index, node in enumerate(program.nodes) if node.op == "input"),
        "output": nodes.index(program.output),
        "provenance": program.provenance,
        "nodes": [
            {
                "name": node.name,
                "op": node.op,
                "inputs": [nodes.index(name) for name in node.inputs],
                "attrs": attrs(node),
                "value": value(infos[node.name]),
            }
            for node in program.nodes
        ],
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "source_bits": layer.source_bits,
                "planes": layer.planes,
                "grid": layer.grid,
                "at": [
                    [
                        layer.weight_bits[p],
                        list(layer.integer_form[p]),
                        list(layer.input_range[p]),
                        list(layer.pad_code[p]),
                        list(layer.input_offset[p]),
                    ]
                    for p in program.precisions
                ],
            }
            for layer in program.layers.values()
        ],
        "affines": [[name, layers.index(item.owner), item.channels] for name, item in program.affines.items()],
        "plans": [
            [
                name,
                [program.precisions.index(chosen[layer]) for layer in layers],
                [affines.index(key) for key in program.factors[name].affine] if name in program.factors else None,
            ]
            for name, chosen in program.plans.items()
        ],
    }


def expected_held(program: Program, files: Files, reads: list[tuple[str, int]]) -> dict[str, Any]:
    """What a step must give after these reads, `program` being what is held then."""

    def weights(held: Weights | None) -> list[Any] | None:
        return held and [held.bits, hashlib.sha256(held.codes.tobytes()).hexdigest()]

    def factors(held: Factors | None) -> str | None:
        if held is None:
            return None
        data = b"".join(np.asarray(lines, "<f8").tobytes() for lines in held.affine.values())
        return hashlib.sha256(data + np.array(list(held.step.values()), "<f8").tobytes()).hexdigest()

    keys = (*map(str, program.precisions), *program.plans)
    return {
        "reads": [[name, size, hashlib.sha256(files[name]).hexdigest()] for name, size in reads],
        "weights": [weights(program.weights.get(name)) for name in program.layers],
        "factors": [factors(program.factors.get(key)) for key in keys],
    }


def python_verdict(files: Files) -> tuple[Artifact | None, Program | None, str]:
    """The artifact and its whole program, or (None, None, file at fault) if Python's reader refuses it.

    Python checks the graph when all is read, the native reader when the manifest is: so the graph comes first here.
    """
    try:
        artifact = Artifact.open(MemorySource(files))
    except ArtifactError as error:
        return None, None, _file_of(error)
    known = artifact.manifest.program
    zeros = {
        name: Weights(np.broadcast_to(np.int8(0), layer.shape), layer.source_bits)  # of no size in memory
        for name, layer in known.layers.items()
    }
    try:
        graph.validate(replace(known, weights=zeros))
        return artifact, artifact.load(set(artifact.manifest.contents), 8), ""
    except ArtifactError as error:
        return None, None, _file_of(error)


def _file_of(error: ArtifactError) -> str:
    """The file that a message names. What programs may not have is in the manifest, or where the number is."""
    text = str(error)
    if not isinstance(error, ProgramError):
        return text.split(":", 1)[0]
    key = re.match(r"factors '([^']+)'", text)
    if key:
        return f"factors-{key[1]}.safetensors"
    return "resident.safetensors" if re.match(r"layer .*: weights: codes reach", text) else "manifest.json"


def compare(reader: NativeReader, files: Files) -> bool:
    """Whether both readers accept the artifact. They must agree on that, and on the content or the file at fault."""
    artifact, program, file = python_verdict(files)
    opened, loaded = reader.ask(files, "everything")
    error = opened.get("error") or (loaded or {}).get("error")
    if artifact is None or program is None:
        assert error, f"accepted, but Python finds fault with {file}"
        assert error["file"] == file, error
        assert error["message"].startswith(f"{file}: ")
        return False
    assert not error, error
    assert opened == {"sha256": artifact.manifest.sha256, "program": expected_program(program)}
    assert loaded == {"error": None, "total": 0, "held": expected_held(program, files, artifact.reads)}
    return True
