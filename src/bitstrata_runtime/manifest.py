"""The manifest: an artifact's program graph and list of files as canonical JSON (spec/artifact.md, section 3)."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import canonical, layout
from .errors import ArtifactError
from .layout import Contents, Stratum, Tensor
from .program import AffineInfo, Layer, Node, Program
from .tables import BY_PRECISION, MAX_CHANNELS

FORMAT = "bitstrata.strata"
VERSION = 1
MAX_BYTES = 16 << 20
MAX_WEIGHTS = 1 << 31  # of all layers together
MAX_PRECISION = 64
MAX_PLANS = 1024

_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,4096}")
_PLAN = re.compile(r"[a-z][a-z0-9._-]{0,63}")  # becomes part of a file name; a letter first keeps it off the precisions
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file: its name, the SHA-256 of its bytes in lower-case hexadecimal, and its size in bytes."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """A checked manifest. `program` has the whole graph, but no weights and no factors.

    contents: precision or plan name -> what its factors file holds; layouts: file name -> tensors, in file order;
    sha256: of the manifest's canonical form without that field; size: bytes of manifest.json.
    """

    program: Program
    contents: dict[str, Contents]
    strata: tuple[Stratum, ...]
    layouts: dict[str, tuple[Tensor, ...]]
    files: dict[str, FileEntry]
    sha256: str
    size: int


def contents(program: Program) -> dict[str, Contents]:
    """What each factors file of a valid program holds: everything for a precision, the re-estimated for a plan.

    Raises ArtifactError if a precision or plan has no factors.
    """
    held: dict[str, Contents] = {}
    for key in (*map(str, program.precisions), *program.plans):
        if key not in program.factors:
            raise ArtifactError(f"program.factors: has no entry for {key!r}, has {sorted(program.factors)}")
        factors = program.factors[key]
        held[key] = Contents(
            tuple(name for name in program.affines if name in factors.affine),
            tuple(name for name in program.layers if name in factors.step),
        )
    return held


def encode(program: Program, held: Mapping[str, Contents], files: Mapping[str, FileEntry]) -> bytes:
    """The bytes of manifest.json. Raises ArtifactError where the program has no JSON form."""
    value = {
        "format": FORMAT,
        "version": VERSION,
        "program": {
            "input": {"kind": program.input_kind, "shape": program.input_shape},
            "output": program.output,
            "precisions": program.precisions,
            "nodes": [
                {"name": node.name, "op": node.op, "inputs": node.inputs, "attrs": node.attrs} for node in program.nodes
            ],
            "layers": [_encode_layer(layer, program.precisions) for layer in program.layers.values()],
            "affines": [
                {"name": name, "owner": affine.owner, "channels": affine.channels}
                for name, affine in program.affines.items()
            ],
            "plans": [
                {
                    "name": name,
                    "precisions": [precision_map.get(layer) for layer in program.layers],
                    "affines": held[name].affines,
                }
                for name, precision_map in program.plans.items()
            ],
        },
        "strata": _encode_strata(layout.strata(program.layers.values())),
        "files": [{"name": entry.name, "sha256": entry.sha256, "size": entry.size} for entry in files.values()],
        "provenance": program.provenance,
    }
    value = canonical.plain(value, layout.MANIFEST)
    value["sha256"] = hashlib.sha256(canonical.dump(value)).hexdigest()
    return canonical.dump(value)


def decode(data: bytes) -> Manifest:
    """Parse and check manifest.json. Raises ArtifactError, naming the field, unless every rule of the format holds."""
    if len(data) > MAX_BYTES:
        raise ArtifactError(f"{layout.MANIFEST}: has {len(data)} bytes, at most {MAX_BYTES} are allowed")
    value = canonical.load(data, layout.MANIFEST)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ArtifactError(f"{layout.MANIFEST}: is not the manifest of a bitstrata artifact (format {FORMAT!r})")
    version = value.get("version")
    if type(version) is not int or version != VERSION:
        raise ArtifactError(f"{layout.MANIFEST}: format version {_show(version)}; this reader knows version {VERSION}")
    sha256 = _sha256(value.pop("sha256", None), "sha256")
    actual = hashlib.sha256(canonical.dump(value)).hexdigest()
    if sha256 != actual:
        raise ArtifactError(f"{layout.MANIFEST}: sha256 is {actual}, the manifest states {sha256}; it was changed")
    _object(value, layout.MANIFEST, ("format", "version", "program", "strata", "files", "provenance"))
    program, held = _decode_program(value["program"])
    if type(value["provenance"]) is not dict:
        raise _wrong("provenance", "an object", value["provenance"])
    program.provenance = value["provenance"]
    strata = layout.strata(program.layers.values())
    if canonical.dump(value["strata"]) != canonical.dump(_encode_strata(strata)):
        raise _wrong("strata", f"{_encode_strata(strata)}, which the layers imply", value["strata"])
    layouts = layout.layouts(program.layers, program.affines, held)
    return Manifest(program, held, strata, layouts, _decode_files(value["files"], layouts), sha256, len(data))


def _encode_layer(layer: Layer, precisions: tuple[int, ...]) -> dict[str, Any]:
    for name in BY_PRECISION:
        mapping = getattr(layer, name)
        if sorted(mapping) != sorted(precisions):
            raise ArtifactError(f"layer {layer.name!r}: {name} is given for {sorted(mapping)}, not for {precisions}")
    return {
        "name": layer.name,
        "kind": layer.kind,
        "shape": layer.shape,
        "source_bits": layer.source_bits,
        "planes": layer.planes,
        "weight_bits": [layer.weight_bits[precision] for precision in precisions],
        "integer_form": [layer.integer_form[precision] for precision in precisions],
        "input_range": [layer.input_range[precision] for precision in precisions],
        "pad_code": [layer.pad_code[precision] for precision in precisions],
        "input_offset": [[float(offset) for offset in layer.input_offset[precision]] for precision in precisions],
        "grid": layer.grid,
    }


def _encode_strata(strata: tuple[Stratum, ...]) -> list[dict[str, Any]]:
    return [{"file": stratum.file, "planes": [stratum.first, stratum.last]} for stratum in strata]


def _decode_program(value: Any) -> tuple[Program, dict[str, Contents]]:
    where = "program"
    _object(value, where, ("input", "output", "precisions", "nodes", "layers", "affines", "plans"))
    entry = _object(value["input"], f"{where}.input", ("kind", "shape"))
    channels, height, width = _integers(entry["shape"], f"{where}.input.shape", 1, MAX_CHANNELS, 3)
    precisions = _integers(value["precisions"], f"{where}.precisions", 1, MAX_PRECISION)
    if not precisions or list(precisions) != sorted(set(precisions)):
        raise _wrong(f"{where}.precisions", "one or more, ascending", value["precisions"])
    nodes = tuple(_decode_node(item, at) for item, at in _items(value["nodes"], f"{where}.nodes"))
    layers: dict[str, Layer] = {}
    for item, at in _items(value["layers"], f"{where}.layers"):
        layer = _decode_layer(item, at, precisions)
        _unique(layer.name, layers, at)
        layers[layer.name] = layer
    weights = sum(math.prod(layer.shape) for layer in layers.values())
    if weights > MAX_WEIGHTS:
        raise ArtifactError(f"{layout.MANIFEST}: {where}.layers: {weights} weights, at most {MAX_WEIGHTS} are allowed")
    affines: dict[str, AffineInfo] = {}
    for item, at in _items(value["affines"], f"{where}.affines"):
        _object(item, at, ("name", "owner", "channels"))
        name = _unique(_name(item["name"], f"{at}.name"), affines, at)
        owner = _one_of(item["owner"], f"{at}.owner", layers, "a layer")
        affines[name] = AffineInfo(owner, _integer(item["channels"], f"{at}.channels", 1, MAX_CHANNELS))
    program = Program(
        input_shape=(channels, height, width),
        input_kind=_one_of(entry["kind"], f"{where}.input.kind", ("pixels", "codes"), "'pixels' or 'codes'"),
        nodes=nodes,
        output=_name(value["output"], f"{where}.output"),
        layers=layers,
        affines=affines,
        precisions=precisions,
        weights={},
        factors={},
    )
    held = {str(precision): Contents(tuple(affines), tuple(layers)) for precision in precisions}
    plans = _items(value["plans"], f"{where}.plans")
    if len(plans) > MAX_PLANS:
        raise ArtifactError(f"{layout.MANIFEST}: {where}.plans: {len(plans)} plans, at most {MAX_PLANS} are allowed")
    order = {name: index for index, name in enumerate(affines)}
    for item, at in plans:
        name, program_map, plan_contents = _decode_plan(item, at, program, order)
        _unique(name, program.plans, at)
        program.plans[name], held[name] = program_map, plan_contents
    return program, held


def _decode_node(value: Any, where: str) -> Node:
    _object(value, where, ("name", "op", "inputs", "attrs"))
    if type(value["attrs"]) is not dict:
        raise _wrong(f"{where}.attrs", "an object", value["attrs"])
    inputs = tuple(_name(item, at) for item, at in _items(value["inputs"], f"{where}.inputs"))
    return Node(_name(value["name"], f"{where}.name"), _name(value["op"], f"{where}.op"), inputs, value["attrs"])


def _decode_layer(value: Any, where: str, precisions: tuple[int, ...]) -> Layer:
    keys = ("name", "kind", "shape", "source_bits", "planes", "weight_bits", "integer_form", "input_range")
    _object(value, where, (*keys, "pad_code", "input_offset", "grid"))
    out, inner, height, width = _integers(value["shape"], f"{where}.shape", 1, MAX_CHANNELS, 4)
    source_bits = _integer(value["source_bits"], f"{where}.source_bits", 1, 8)
    if type(value["planes"]) is not bool:
        raise _wrong(f"{where}.planes", "true or false", value["planes"])
    pads = [_integers(row, at, -128, 255) for row, at in _rows(value["pad_code"], f"{where}.pad_code", len(precisions))]
    offsets = [
        tuple(_float(item, at) for item, at in _items(row, place))
        for row, place in _rows(value["input_offset"], f"{where}.input_offset", len(precisions))
    ]
    bits = _integers(value["weight_bits"], f"{where}.weight_bits", 1, source_bits, len(precisions))
    forms = _pairs(value["integer_form"], f"{where}.integer_form", -(1 << 31), (1 << 31) - 1, len(precisions))
    ranges = _pairs(value["input_range"], f"{where}.input_range", -128, 255, len(precisions))
    for low, high in ranges:
        if low > high or (low < 0 and high > 127):
            raise _wrong(f"{where}.input_range", "ranges within 0..255 or -128..127", [low, high])
    return Layer(
        name=_name(value["name"], f"{where}.name"),
        kind=_one_of(value["kind"], f"{where}.kind", ("conv", "linear"), "'conv' or 'linear'"),
        shape=(out, inner, height, width),
        source_bits=source_bits,
        planes=value["planes"],
        weight_bits=dict(zip(precisions, bits, strict=True)),
        integer_form=dict(zip(precisions, forms, strict=True)),
        input_range=dict(zip(precisions, ranges, strict=True)),
        pad_code=dict(zip(precisions, pads, strict=True)),
        input_offset=dict(zip(precisions, offsets, strict=True)),
        grid=_name(value["grid"], f"{where}.grid") if value["grid"] != "" else "",
    )


def _decode_plan(
    value: Any, where: str, program: Program, order: Mapping[str, int]
) -> tuple[str, dict[str, int], Contents]:
    _object(value, where, ("name", "precisions", "affines"))
    name = _name(value["name"], f"{where}.name")
    if not _PLAN.fullmatch(name):
        raise _wrong(f"{where}.name", "a letter a-z, then up to 63 of a-z 0-9 . _ -", name)
    precisions = _integers(value["precisions"], f"{where}.precisions", 1, MAX_PRECISION, len(program.layers))
    for precision in precisions:
        if precision not in program.precisions:
            raise _wrong(f"{where}.precisions", f"precisions among {program.precisions}", precision)
    held = Contents(_subset(value["affines"], f"{where}.affines", order), ())
    return name, dict(zip(program.layers, precisions, strict=True)), held


def _decode_files(value: Any, layouts: Mapping[str, tuple[Tensor, ...]]) -> dict[str, FileEntry]:
    entries = _items(value, "files", len(layouts))
    files: dict[str, FileEntry] = {}
    for (item, where), (name, tensors) in zip(entries, layouts.items(), strict=True):
        _object(item, where, ("name", "sha256", "size"))
        if item["name"] != name:
            raise _wrong(f"{where}.name", repr(name), item["name"])
        size = layout.file_size(tensors)
        if type(item["size"]) is not int or item["size"] != size:
            raise _wrong(f"{where}.size", f"{size}, which the shapes imply for {name}", item["size"])
        files[name] = FileEntry(name, _sha256(item["sha256"], f"{where}.sha256"), size)
    return files


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _wrong(where: str, expected: str, value: Any) -> ArtifactError:
    return ArtifactError(f"{layout.MANIFEST}: {where}: expected {expected}, got {_show(value)}")


def _object(value: Any, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if type(value) is not dict:
        raise _wrong(where, "an object", value)
    for key in keys:
        if key not in value:
            raise ArtifactError(f"{layout.MANIFEST}: {where}: field {key!r} is missing")
    for key in value:
        if key not in keys:
            raise ArtifactError(f"{layout.MANIFEST}: {where}: unknown field {_show(key)}; known are {', '.join(keys)}")
    return value


def _items(value: Any, where: str, length: int | None = None) -> list[tuple[Any, str]]:
    """The items of an array with their places, e.g. "program.layers[3]"."""
    if type(value) is not list:
        raise _wrong(where, "an array", value)
    if length is not None and len(value) != length:
        raise ArtifactError(f"{layout.MANIFEST}: {where}: expected {length} items, got {len(value)}")
    return [(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _rows(value: Any, where: str, length: int) -> list[tuple[Any, str]]:
    """Like `_items`, for an array of arrays with one or more items each."""
    rows = _items(value, where, length)
    for row, at in rows:
        if not _items(row, at):
            raise _wrong(at, "one or more numbers", row)
    return rows


def _integer(value: Any, where: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _wrong(where, f"an integer from {low} to {high}", value)
    return value


def _integers(value: Any, where: str, low: int, high: int, length: int | None = None) -> tuple[int, ...]:
    return tuple(_integer(item, at, low, high) for item, at in _items(value, where, length))


def _pairs(value: Any, where: str, low: int, high: int, length: int) -> list[tuple[int, int]]:
    pairs = []
    for item, at in _items(value, where, length):
        first, second = _integers(item, at, low, high, 2)
        pairs.append((first, second))
    return pairs


def _float(value: Any, where: str) -> float:
    if type(value) is not float:
        raise _wrong(where, "a number with a fraction part or exponent", value)
    return value


def _name(value: Any, where: str) -> str:
    if type(value) is not str or not _NAME.fullmatch(value):
        raise _wrong(where, "1 to 4096 characters, none of them a control character", value)
    return value


def _sha256(value: Any, where: str) -> str:
    if type(value) is not str or not _SHA256.fullmatch(value):
        raise _wrong(where, "64 lower-case hexadecimal digits", value)
    return value


def _one_of(value: Any, where: str, known: Any, expected: str) -> str:
    if type(value) is not str or value not in known:
        raise _wrong(where, expected, value)
    return value


def _unique(name: str, known: Mapping[str, Any], where: str) -> str:
    if name in known:
        raise ArtifactError(f"{layout.MANIFEST}: {where}.name: {_show(name)} occurs twice")
    return name


def _subset(value: Any, where: str, order: Mapping[str, int]) -> tuple[str, ...]:
    """Names out of `order` (name -> position), each at most once and by position."""
    names = tuple(_one_of(item, at, order, "a name of the program") for item, at in _items(value, where))
    if any(order[first] >= order[second] for first, second in itertools.pairwise(names)):
        raise _wrong(where, "each name at most once, in the manifest's order", value)
    return names
