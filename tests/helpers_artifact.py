"""A second reader of artifacts, written from spec/artifact.md with other means, and tools to take artifacts apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from bitstrata_runtime.errors import ArtifactError
from bitstrata_runtime.program import AffineInfo, Factors, Layer, Node, Program, Weights

Files = dict[str, bytes]


class MemorySource:
    """Files from a dictionary; `reads` lists the names asked for."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.reads: list[str] = []

    def read(self, name: str, limit: int) -> bytes:
        self.reads.append(name)
        if name not in self.files:
            raise ArtifactError(f"{name}: no such file")
        if len(self.files[name]) > limit:
            raise ArtifactError(f"{name}: has {len(self.files[name])} bytes, at most {limit} are allowed")
        return self.files[name]


def files_of(path: Path) -> Files:
    """Every file of an artifact directory."""
    return {entry.name: entry.read_bytes() for entry in sorted(path.iterdir())}


def canonical(value: Any) -> bytes:
    """The canonical form of a JSON value; NaN and such pass, so that hostile manifests can be made."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode("utf-8", "surrogatepass")


def manifest_of(files: Files) -> dict[str, Any]:
    """The manifest as a fresh JSON value, without its seal."""
    value = json.loads(files["manifest.json"])
    del value["sha256"]
    return value


def seal(value: Any) -> bytes:
    """manifest.json for a manifest value, with a right hash if the value is an object."""
    if not isinstance(value, dict):
        return canonical(value)
    return canonical({**value, "sha256": hashlib.sha256(canonical(value)).hexdigest()})


def reseal(files: Files, value: Any = None) -> Files:
    """The files with a manifest (default: the one they have) whose hashes fit the files' present content."""
    value = manifest_of(files) if value is None else value
    for entry in value["files"]:
        if entry["name"] in files:
            entry["sha256"] = hashlib.sha256(files[entry["name"]]).hexdigest()
    return {**files, "manifest.json": seal(value)}


def read_plainly(files: Files) -> Program:
    """The whole program in well-formed files. Digits are summed by their weight, files parsed by safetensors."""
    value = manifest_of(files)
    graph = value["program"]
    precisions = tuple(graph["precisions"])
    layers = [
        Layer(
            name=item["name"],
            kind=item["kind"],
            shape=tuple(item["shape"]),
            source_bits=item["source_bits"],
            planes=item["planes"],
            weight_bits=dict(zip(precisions, item["weight_bits"], strict=True)),
            integer_form=dict(zip(precisions, map(tuple, item["integer_form"]), strict=True)),
            input_range=dict(zip(precisions, map(tuple, item["input_range"]), strict=True)),
            pad_code=dict(zip(precisions, map(tuple, item["pad_code"]), strict=True)),
            input_offset=dict(zip(precisions, map(tuple, item["input_offset"]), strict=True)),
            grid=item["grid"],
        )
        for item in graph["layers"]
    ]
    tensors = {name: safetensors.numpy.load(files[name]) for name in (entry["name"] for entry in value["files"])}
    plans = {
        plan["name"]: dict(zip([item.name for item in layers], plan["precisions"], strict=True))
        for plan in graph["plans"]
    }
    held = {str(precision): graph["affines"] for precision in precisions}
    for plan in graph["plans"]:
        held[plan["name"]] = [item for item in graph["affines"] if item["name"] in plan["affines"]]
    return Program(
        input_shape=tuple(graph["input"]["shape"]),
        input_kind=graph["input"]["kind"],
        nodes=tuple(Node(item["name"], item["op"], tuple(item["inputs"]), item["attrs"]) for item in graph["nodes"]),
        output=graph["output"],
        layers={item.name: item for item in layers},
        affines={item["name"]: AffineInfo(item["owner"], item["channels"]) for item in graph["affines"]},
        precisions=precisions,
        weights={item.name: _weights(str(index), item, value, tensors) for index, item in enumerate(layers)},
        factors={
            key: _factors(tensors[f"factors-{key}.safetensors"], affines, [] if key in plans else layers)
            for key, affines in held.items()
        },
        plans=plans,
        provenance=value["provenance"],
    )


def _weights(key: str, layer: Layer, value: dict[str, Any], tensors: dict[str, dict[str, Any]]) -> Weights:
    if not layer.planes:
        return Weights(tensors["resident.safetensors"][key], layer.source_bits)
    rows = [row for item in value["strata"] for row in tensors[item["file"]].get(key, ())]
    count = int(np.prod(layer.shape))
    total = np.zeros(count, np.int64)
    for plane, row in enumerate(rows, start=1):
        digits = [(int(row[at // 8]) >> (7 - at % 8)) & 1 for at in range(count)]
        total += np.array(digits, np.int64) << (layer.source_bits - plane)
    codes = total - (1 << (layer.source_bits - 1))
    return Weights(codes.astype(np.int8).reshape(layer.shape), layer.source_bits)


def _factors(tensors: dict[str, Any], affines: list[dict[str, Any]], layers: list[Layer]) -> Factors:
    found, start = Factors(), 0
    for item in affines:
        found.affine[item["name"]] = tensors["affine"][:, start : start + item["channels"]]
        start += item["channels"]
    found.step = {layer.name: float(step) for layer, step in zip(layers, tensors["step"], strict=True)}
    return found
