"""Changes to artifacts as an adversary would make them, for every reader's tests.

Generators take an artifact's files and yield (what was changed, the files after it). "Sealed" cases have all hashes
recomputed after the change.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from helpers_artifact import Files, canonical, manifest_of, reseal, seal

from bitstrata_runtime import layout
from bitstrata_runtime.manifest import decode

Cases = Iterator[tuple[Any, Files]]
MANIFEST = "manifest.json"


def places(value, at=()):
    """Paths of all values within a JSON value, itself excluded."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


def get(value, place):
    for key in place:
        value = value[key]
    return value


def changed(value, place, item):
    """`value` with `item` at `place`; copied along the path only."""
    if not place:
        return item
    value = value.copy()
    value[place[0]] = changed(value[place[0]], place[1:], item)
    return value


def flip(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ (1 << bit % 8)]) + data[bit // 8 + 1 :]


def header_of(data):
    return data[: 8 + int.from_bytes(data[:8], "little")]


# Bytes


def cut_and_lengthened(files: Files) -> Cases:
    """Every file at many lengths, with and without new hashes."""
    for name, data in files.items():
        lengths = {*range(0, len(data), max(1, len(data) // 40)), len(data) - 1}
        for other in [*(data[:length] for length in lengths), *(data + tail for tail in (b"\0", b" ", data))]:
            yield (name, len(other)), {**files, name: other}
            if name != MANIFEST:
                yield (name, len(other), "sealed"), reseal({**files, name: other})


def flipped(files: Files) -> Cases:
    """Single bits, hashes left as they are."""
    rng = np.random.default_rng(5)
    for name, data in files.items():
        for bit in rng.choice(8 * len(data), 300 if name == MANIFEST else 60, replace=False):
            yield (name, int(bit)), {**files, name: flip(data, int(bit))}


def flipped_and_sealed(files: Files) -> Cases:
    """Single bits of all files but the manifest, under new hashes."""
    rng = np.random.default_rng(6)
    for name, data in files.items():
        if name != MANIFEST:
            for bit in rng.choice(8 * len(data), 36, replace=False):
                yield (name, int(bit)), reseal({**files, name: flip(data, int(bit))})


def flipped_manifests(files: Files) -> Cases:
    """Single bits of the manifest, where JSON is left, in canonical form and under a new hash."""
    rng = np.random.default_rng(7)
    data = files[MANIFEST]
    for bit in rng.choice(8 * len(data), 1500, replace=False):
        try:
            value = json.loads(flip(data, int(bit)))
        except ValueError:
            continue
        value.pop("sha256", None)
        yield int(bit), {**files, MANIFEST: seal(value)}


def swapped(files: Files) -> Cases:
    """Each pair of files exchanged."""
    names = sorted(files)
    for first in names:
        for second in names:
            if first < second:
                yield (first, second), {**files, first: files[second], second: files[first]}


def missing(files: Files) -> Cases:
    """Each file left out."""
    for name in files:
        yield name, {key: data for key, data in files.items() if key != name}


def other_headers(files: Files, name: str = "stratum-2.safetensors") -> Cases:
    """A tensor file's header that says the same in another way ("spelling"), or has a wrong length ("length")."""
    data = files[name]
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for text in (
        json.dumps(header).encode(),
        json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode(),
        json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode(),
        data[8 : 8 + length] + b" " * 8,
    ):
        yield "spelling", reseal({**files, name: len(text).to_bytes(8, "little") + text + body})
    for wrong in (0, 1, length - 1, length + 1, 1 << 32, (1 << 64) - 1):
        yield "length", reseal({**files, name: wrong.to_bytes(8, "little") + data[8:]})


def with_factor(files: Files, name: str, tensor: str, index: int, value: float) -> Files:
    """One entry of a factors file replaced, sealed."""
    tensors = decode(files[MANIFEST]).layouts[name]
    arrays = {key: array.copy() for key, array in layout.split(name, files[name], tensors).items()}
    arrays[tensor].flat[index] = value
    data = layout.header(tensors) + b"".join(array.tobytes() for array in arrays.values())
    return reseal({**files, name: data})


FACTORS = [
    ("affine", 0, np.nan, "factors '2': affine 'stem.bn'"),
    ("affine", -1, np.inf, "factors '2': affine 'head.affine'"),
    ("step", 0, 0.0, "factors '2': step of layer 'stem'"),
    ("step", -1, -0.5, "factors '2': step of layer 'head'"),
    ("step", 1, np.nan, "factors '2': step of layer 'mid'"),
    ("step", 1, np.inf, "factors '2': step of layer 'mid'"),
]  # of `plain_program`: tensor, index, value, message


# The manifest as JSON

BAD_JSON = {
    "empty": (b"", "is not JSON in UTF-8"),
    "not UTF-8": (b'{"format":"\xff"}', "is not JSON in UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), "is not JSON in UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf{}", "is not JSON in UTF-8"),
    "NUL": (b"\0", "is not JSON in UTF-8"),
    "trailing text": (b"{}{}", "is not JSON in UTF-8"),
    "comment": (b"{}//", "is not JSON in UTF-8"),
    "single quotes": (b"{'a':1}", "is not JSON in UTF-8"),
    "NaN": (b'{"a":NaN}', "numbers are finite, got NaN"),
    "Infinity": (b'{"a":Infinity}', "numbers are finite, got Infinity"),
    "-Infinity": (b'{"a":-Infinity}', "numbers are finite, got -Infinity"),
    "overflow": (b'{"a":1e999}', "number 1e999 is beyond double precision"),
    "long integer": (b"1" * 100_000, "number of 100000 digits, starting 111"),
    "long fraction": (b"0." + b"1" * 100_000, "number of 100002 characters"),
    "65 bits": (b"18446744073709551616", "integers have 64 bits, got 18446744073709551616"),
    "repeated key": (b'{"a":1,"a":1}', "key 'a' occurs twice in one object"),
    "repeated key, escaped": (b'{"a":1,"\\u0061":1}', "key 'a' occurs twice in one object"),
    "half a surrogate pair": (b'{"a":"\\ud800"}', "text holds half of a surrogate pair"),
    "half a pair as key": (b'{"\\udc00":1}', "text holds half of a surrogate pair"),
    "deep arrays": (b"[" * 100_000 + b"]" * 100_000, "nested deeper than 32"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper than 32"),
    "unclosed": (b"[" * 3_000_000, "nested deeper than 32"),
    "33 levels": (b"[" * 34 + b"]" * 34, "nested deeper than 32"),
    "white space": (b'{"a": 1}', "is not in canonical form"),
    "final newline": (b"{}\n", "is not in canonical form"),
    "unsorted": (b'{"b":1,"a":1}', "is not in canonical form"),
    "escaped letter": (b'{"a":"\\u0061"}', "is not in canonical form"),
    "escaped slash": (b'{"a":"\\/"}', "is not in canonical form"),
    "long spelling": (b'{"a":0.10}', "is not in canonical form"),
    "exponent spelling": (b'{"a":1E5}', "is not in canonical form"),
    "negative zero": (b'{"a":-0}', "is not in canonical form"),
    "array": (b"[]", "is not the manifest of a bitstrata artifact"),
    "null": (b"null", "is not the manifest of a bitstrata artifact"),
    "other format": (b'{"format":"safetensors"}', "is not the manifest of a bitstrata artifact"),
    "no version": (b'{"format":"bitstrata.strata"}', "format version None; this reader knows version 1"),
    "no hash": (b'{"format":"bitstrata.strata","version":1}', "sha256: expected 64 lower-case hexadecimal digits"),
}

VERSIONS = [0, 2, -1, 1.0, True, "1", None, [1], 1 << 62]


def bad_json(files: Files) -> Cases:
    """Manifests that are not canonical JSON, or no manifests."""
    for name, (data, _) in BAD_JSON.items():
        yield name, {**files, MANIFEST: data}
    for version in VERSIONS:
        yield version, {**files, MANIFEST: seal({**manifest_of(files), "version": version})}
    value = json.loads(files[MANIFEST])
    for wrong in (None, 1, [], "", "0" * 63, "0" * 65, "G" * 64, value["sha256"].upper(), "0" * 64):
        yield ("sha256", wrong), {**files, MANIFEST: canonical({**value, "sha256": wrong})}


# The manifest's fields

TYPES = [None, True, 0, -1, 1 << 31, 1 << 62, 1.0, -1.5, "", "x", "../x", [], [1], {}]


def other_values(files: Files) -> Cases:
    """Each value of the manifest replaced by each of `TYPES`, sealed."""
    value = manifest_of(files)
    for place in places(value):
        for item in TYPES:
            old = get(value, place)
            if not (type(item) is type(old) and item == old):
                yield (place, item), {**files, MANIFEST: seal(changed(value, place, item))}


def other_numbers(files: Files) -> Cases:
    """Each integer that is one for a reason, as something else; sealed."""
    value = manifest_of(files)
    for place in places(value):
        number = get(value, place)
        if type(number) is int and place[0] != "provenance" and "clip" not in place:
            for item in (float(number), bool(number), str(number), [number], None, -(1 << 62)):
                yield (place, item), {**files, MANIFEST: seal(changed(value, place, item))}


def other_members(files: Files) -> Cases:
    """Each object with a member more, and without each of its own; sealed. Labels end with the member's name."""
    value = manifest_of(files)
    for place in ((), *places(value)):
        holder = get(value, place)
        if not isinstance(holder, dict) or place[:1] == ("provenance",):
            continue
        more = copy.deepcopy(value)
        get(more, place)["surplus"] = 1
        yield (*place, "surplus"), {**files, MANIFEST: seal(more)}
        for key in holder:
            fewer = copy.deepcopy(value)
            del get(fewer, place)[key]
            yield (*place, key), {**files, MANIFEST: seal(fewer)}


def other_arrays(files: Files) -> Cases:
    """Each array lengthened, shortened, reversed, doubled and emptied; sealed."""
    value = manifest_of(files)
    for place in places(value):
        items = get(value, place)
        if isinstance(items, list) and items and place[0] != "provenance":
            for other in ([*items, items[-1]], items[:-1], items[::-1], items * 2, []):
                if other != items:
                    yield (place, len(other)), {**files, MANIFEST: seal(changed(value, place, other))}


def entry(index, **fields):
    def change(value):
        value["files"][index].update(fields)

    return change


def field(*place_and_item):
    *place, item = place_and_item

    def change(value):
        get(value, place[:-1])[place[-1]] = item

    return change


def plan(name, **fields):
    def change(value):
        value["program"]["plans"].append({"name": name, "precisions": [1, 1, 1], "affines": [], **fields})

    return change


CHANGES = [
    (lambda v: v.pop("strata"), "field 'strata' is missing"),
    (lambda v: v.update(extra=1), "unknown field 'extra'; known are format, version, program"),
    (lambda v: v["files"].pop(), "files: expected 9 items, got 8"),
    (lambda v: v["files"].append(v["files"][0]), "files: expected 9 items, got 10"),
    (lambda v: v["files"].reverse(), r"files[0].name: expected 'base.safetensors', got 'factors-4.safetensors'"),
    (lambda v: v["strata"].reverse(), "strata: expected [{'file': 'base.safetensors', 'planes': [1, 1]}, "),
    (field("strata", 0, "planes", [True, 1]), "strata: expected"),
    (field("strata", 0, "planes", [1.0, 1]), "strata: expected"),
    (entry(0, name="../base.safetensors"), "files[0].name: expected 'base.safetensors', got '../base.safetensors'"),
    (entry(0, name="/etc/passwd"), "files[0].name: expected 'base.safetensors', got '/etc/passwd'"),
    (entry(0, name="base.safetensors\0"), "files[0].name: expected 'base.safetensors', got 'base.safetensors\\x00'"),
    (entry(0, name="a" * 100_000), "files[0].name: expected 'base.safetensors', got 'aaaa"),
    (entry(1, name="base.safetensors"), "files[1].name: expected 'stratum-2.safetensors', got 'base.safetensors'"),
    (entry(0, size=-1), "files[0].size: expected 225, which the shapes imply for base.safetensors, got -1"),
    (entry(0, size=1 << 60), "files[0].size: expected 225, which the shapes imply"),
    (entry(0, size=225.0), "files[0].size: expected 225, which the shapes imply for base.safetensors, got 225.0"),
    (entry(0, size=224), "files[0].size: expected 225"),
    (entry(0, sha256="0" * 63), "files[0].sha256: expected 64 lower-case hexadecimal digits"),
    (field("program", "precisions", []), "program.precisions: expected one or more, ascending, got []"),
    (field("program", "precisions", [1, 2, 2, 4]), "program.precisions: expected one or more, ascending"),
    (field("program", "precisions", [4, 3, 2, 1]), "program.precisions: expected one or more, ascending"),
    (field("program", "precisions", [1, 2, 3]), "layers[0].pad_code: expected 3 items, got 4"),
    (field("program", "input", "kind", "text"), "program.input.kind: expected 'pixels' or 'codes', got 'text'"),
    (field("program", "input", "shape", [3, 6]), "program.input.shape: expected 3 items, got 2"),
    (field("program", "layers", 0, "shape", [7, 3, 3, 0]), "layers[0].shape[3]: expected an integer from 1 to 65536"),
    (field("program", "layers", 1, "shape", 5), "program.layers[1].shape: expected an array, got 5"),
    (field("program", "layers", 1, "shape", [65536] * 4), "weights, at most 2147483648 are allowed"),
    (field("program", "layers", 1, "source_bits", 9), "layers[1].source_bits: expected an integer from 1 to 8, got 9"),
    (field("program", "layers", 1, "source_bits", 3), "layers[1].weight_bits[3]: expected an integer from 1 to 3"),
    (field("program", "layers", 1, "planes", 1), "program.layers[1].planes: expected true or false, got 1"),
    (field("program", "layers", 1, "planes", False), "strata: expected"),
    (field("program", "layers", 1, "pad_code", []), "layers[1].pad_code: expected 4 items, got 0"),
    (field("program", "layers", 1, "pad_code", [0]), "layers[1].pad_code: expected 4 items, got 1"),
    (field("program", "layers", 1, "pad_code", [0] * 4), "layers[1].pad_code[0]: expected an array, got 0"),
    (field("program", "layers", 1, "pad_code", 2, []), "layers[1].pad_code[2]: expected one or more numbers, got []"),
    (field("program", "layers", 1, "pad_code", 3, [256]), "pad_code[3][0]: expected an integer from -128 to 255"),
    (field("program", "layers", 1, "input_offset", []), "layers[1].input_offset: expected 4 items, got 0"),
    (field("program", "layers", 1, "input_offset", 1, []), "layers[1].input_offset[1]: expected one or more numbers"),
    (field("program", "layers", 1, "input_offset", 1, 0.5), "layers[1].input_offset[1]: expected an array, got 0.5"),
    (field("program", "layers", 1, "input_offset", 0, [0]), "input_offset[0][0]: expected a number with a fraction"),
    (field("program", "layers", 1, "input_range", 0, [-1, 200]), "expected ranges within 0..255 or -128..127"),
    (field("program", "layers", 1, "input_range", 0, [1, 0]), "expected ranges within 0..255 or -128..127"),
    (field("program", "layers", 1, "integer_form", 0, [2]), "layers[1].integer_form[0]: expected 2 items, got 1"),
    (field("program", "layers", 1, "name", "stem"), "program.layers[1].name: 'stem' occurs twice"),
    (field("program", "layers", 1, "name", "a\nb"), "layers[1].name: expected 1 to 4096 characters, none of them"),
    (field("program", "layers", 1, "name", ""), "layers[1].name: expected 1 to 4096 characters"),
    (field("program", "layers", 1, "kind", "dense"), "layers[1].kind: expected 'conv' or 'linear', got 'dense'"),
    (field("program", "affines", 1, "name", "stem.bn"), "program.affines[1].name: 'stem.bn' occurs twice"),
    (field("program", "affines", 1, "owner", "x"), "program.affines[1].owner: expected a layer, got 'x'"),
    (field("program", "affines", 1, "channels", 0), "affines[1].channels: expected an integer from 1 to 65536"),
    (field("program", "nodes", 1, "attrs", []), "program.nodes[1].attrs: expected an object, got []"),
    (field("program", "nodes", 1, "inputs", "x"), "program.nodes[1].inputs: expected an array, got 'x'"),
    (field("program", "nodes", 1, "op", "exec"), "exec"),
    (field("program", "output", "nowhere"), "nowhere"),
    (field("provenance", []), "provenance: expected an object, got []"),
    (plan("../../x"), "plans[0].name: expected a letter a-z, then up to 63 of a-z 0-9 . _ -, got '../../x'"),
    (plan("1"), "plans[0].name: expected a letter a-z"),
    (plan("a/b"), "plans[0].name: expected a letter a-z"),
    (plan("a", precisions=[1, 1]), "plans[0].precisions: expected 3 items, got 2"),
    (plan("a", precisions=[1, 1, 7]), "plans[0].precisions: expected precisions among (1, 2, 3, 4), got 7"),
    (plan("a", affines=["x"]), "plans[0].affines[0]: expected a name of the program, got 'x'"),
    (plan("a", affines=["mid.bn", "stem.bn"]), "expected each name at most once, in the manifest's order"),
    (plan("a", affines=["mid.bn", "mid.bn"]), "expected each name at most once, in the manifest's order"),
    (plan("a"), "files: expected 10 items, got 9"),
    (lambda v: v["program"].update(plans=[None] * 1025), "program.plans: 1025 plans, at most 1024 are allowed"),
]


def field_changes(files: Files) -> Cases:
    """Each of `CHANGES`, which are of `plain_program`; sealed."""
    for change, message in CHANGES:
        value = manifest_of(files)
        change(value)
        yield message, {**files, MANIFEST: seal(value)}


# Sizes

HUGE = [
    [65536, 4096, 1, 1],
    [1, 65536, 64, 64],
    [4096, 65536, 1, 1],
    [5, 7, 1024, 1024],
    [65536, 32000, 1, 1],
]


def huge(files: Files, shape: list[int], index: int) -> Files:
    """`plain_program` with a layer of another shape and all sizes as it implies, sealed; tensor files as they were."""
    value = manifest_of(files)
    value["program"]["layers"][index]["shape"] = shape
    small = decode(files[MANIFEST])
    layers = dict(small.program.layers)
    name = list(layers)[index]
    layers[name] = type(layers[name])(**{**layers[name].__dict__, "shape": tuple(shape)})
    sizes = layout.layouts(layers, small.program.affines, small.contents)
    for item in value["files"]:
        item["size"] = layout.file_size(sizes[item["name"]])
    return {**files, MANIFEST: seal(value)}


ALL: list[Callable[[Files], Cases]] = [
    cut_and_lengthened,
    flipped,
    flipped_and_sealed,
    flipped_manifests,
    swapped,
    missing,
    bad_json,
    other_values,
    other_numbers,
    other_members,
    other_arrays,
]  # those that take any artifact
