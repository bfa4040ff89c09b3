"""Artifacts made by an adversary: every one is refused with ArtifactError, or means exactly what its content says.

"Sealed" cases have all hashes recomputed after the change, as an adversary would; for those that are valid programs,
the second reader of helpers_artifact says what they mean.
"""

import copy
import json
import os
import tracemalloc

import numpy as np
import pytest
from helpers_artifact import MemorySource, canonical, files_of, manifest_of, read_plainly, reseal, seal
from helpers_programs import (
    assert_same_factors,
    assert_same_program,
    assert_same_weights,
    plain_program,
    residual_program,
)

from bitstrata_runtime import layout
from bitstrata_runtime.artifact import Artifact, write
from bitstrata_runtime.errors import ArtifactError, ProgramError
from bitstrata_runtime.manifest import MAX_BYTES, decode
from bitstrata_runtime.session import Session
from bitstrata_runtime.source import DirectorySource

BUILDERS = {"plain": plain_program, "residual": residual_program}


@pytest.fixture(scope="module", params=BUILDERS)
def files(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "net.strata"
    write(BUILDERS[request.param](), path)
    return files_of(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "plain.strata"
    write(plain_program(), path)
    return files_of(path)


def load(files):
    """The whole program of `files`, or the ArtifactError that refuses it. Any other exception is a failure."""
    try:
        artifact = Artifact.open(MemorySource(files))
        return artifact.load(set(artifact.manifest.contents), 8)
    except ArtifactError as error:
        return error


def refused(files):
    return isinstance(load(files), ArtifactError)


def assert_refused_or_faithful(files):
    """True if refused; a program that is accepted must be what the second reader finds."""
    found = load(files)
    if isinstance(found, ArtifactError):
        assert str(found)
        return True
    expected = read_plainly(files)
    assert_same_program(found, expected)
    assert_same_weights(found.weights, expected.weights, {})
    assert_same_factors(found.factors, expected.factors, set(expected.factors))
    assert logits(found) == logits(expected)
    return False


def logits(program):
    """The program's integers for a fixed input, or why it has none (its numbers may leave the integers' range)."""
    try:
        session = Session.from_program(program, program.precisions[-1], executor="oracle")
    except ProgramError as error:
        return str(error)
    pixels = np.random.default_rng(8).integers(0, 256, (1, *program.input_shape)).astype(np.uint8)
    if program.input_kind == "pixels":
        return session.run_raw(pixels).tolist()
    return session.run_raw(pixels / 64.0 - 2.0, floats=True).tolist()


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


def test_the_untouched_files_run(files):
    assert not assert_refused_or_faithful(files)
    assert not assert_refused_or_faithful(reseal(files))
    assert isinstance(logits(load(files)), list)


def test_truncated_and_lengthened_files(files):
    cases = 0
    for name, data in files.items():
        for length in {*range(0, len(data), max(1, len(data) // 40)), len(data) - 1}:
            assert refused({**files, name: data[:length]}), (name, length)
            cases += 1
            if name != "manifest.json":
                assert refused(reseal({**files, name: data[:length]})), (name, length)
                cases += 1
        for tail in (b"\0", b" ", data):
            assert refused({**files, name: data + tail}), name
            if name != "manifest.json":
                assert refused(reseal({**files, name: data + tail})), name
            cases += 2
    assert cases >= 300


def test_any_flipped_bit_is_noticed(files):
    rng = np.random.default_rng(5)
    cases = 0
    for name, data in files.items():
        for bit in rng.choice(8 * len(data), 300 if name == "manifest.json" else 60, replace=False):
            assert refused({**files, name: flip(data, int(bit))}), (name, bit)
            cases += 1
    assert cases >= 300


def test_flipped_bits_under_new_hashes_are_refused_or_mean_what_they_say(files):
    rng = np.random.default_rng(6)
    accepted = refusals = 0
    for name, data in files.items():
        if name == "manifest.json":
            continue
        for bit in rng.choice(8 * len(data), 36, replace=False):
            if assert_refused_or_faithful(reseal({**files, name: flip(data, int(bit))})):
                refusals += 1
            else:
                accepted += 1
                assert bit >= 8 * len(data) - 8 * sum(t.size for t in decode(files["manifest.json"]).layouts[name])
    assert accepted + refusals >= 300
    assert accepted > 60
    assert refusals > 60


def test_flipped_bits_of_the_manifest_under_a_new_hash(files):
    rng = np.random.default_rng(7)
    data = files["manifest.json"]
    cases = 0
    for bit in rng.choice(8 * len(data), 1500, replace=False):
        try:
            value = json.loads(flip(data, int(bit)))
        except ValueError:
            continue
        value.pop("sha256", None)
        assert_refused_or_faithful({**files, "manifest.json": seal(value)})
        cases += 1
    assert cases >= 300


def test_files_swapped_with_one_another(files):
    names = sorted(files)
    cases = 0
    for first in names:
        for second in names:
            if first < second:
                swapped = {**files, first: files[second], second: files[first]}
                assert refused(swapped)
                if "manifest.json" not in (first, second):
                    same_form = header_of(files[first]) == header_of(files[second])
                    assert assert_refused_or_faithful(reseal(swapped)) == (not same_form), (first, second)
                cases += 1
    assert cases >= 45


def test_missing_files(files):
    for name in files:
        assert refused({key: data for key, data in files.items() if key != name})


def test_headers_that_say_the_same_in_another_way(plain):
    data = plain["stratum-2.safetensors"]
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    variants = [
        json.dumps(header).encode(),
        json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode(),
        json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode(),
        data[8 : 8 + length] + b" " * 8,
    ]
    for text in variants:
        changed_file = len(text).to_bytes(8, "little") + text + body
        found = load(reseal({**plain, "stratum-2.safetensors": changed_file}))
        assert "stratum-2.safetensors: has" in str(found)
    for wrong in (0, 1, length - 1, length + 1, 1 << 32, (1 << 64) - 1):
        found = load(reseal({**plain, "stratum-2.safetensors": wrong.to_bytes(8, "little") + data[8:]}))
        assert "stratum-2.safetensors: the header differs from the one fixed by the manifest" in str(found)


@pytest.mark.parametrize(
    ("tensor", "index", "value", "message"),
    [
        ("affine", 0, np.nan, "factors '2': affine 'stem.bn'"),
        ("affine", -1, np.inf, "factors '2': affine 'head.affine'"),
        ("step", 0, 0.0, "factors '2': step of layer 'stem'"),
        ("step", -1, -0.5, "factors '2': step of layer 'head'"),
        ("step", 1, np.nan, "factors '2': step of layer 'mid'"),
        ("step", 1, np.inf, "factors '2': step of layer 'mid'"),
    ],
)
def test_factors_that_are_no_factors(plain, tensor, index, value, message):
    name = "factors-2.safetensors"
    tensors = decode(plain["manifest.json"]).layouts[name]
    arrays = {key: array.copy() for key, array in layout.split(name, plain[name], tensors).items()}
    arrays[tensor].flat[index] = value
    data = layout.header(tensors) + b"".join(array.tobytes() for array in arrays.values())
    found = load(reseal({**plain, name: data}))
    assert isinstance(found, ArtifactError)
    assert message in str(found)


def test_padding_bits_must_be_zero(plain):
    for bit in range(8):  # the last weight of layer "head", 450 weights: 6 padding bits
        data = flip(plain["stratum-2.safetensors"], 8 * len(plain["stratum-2.safetensors"]) - 8 + bit)
        found = load(reseal({**plain, "stratum-2.safetensors": data}))
        assert isinstance(found, ArtifactError) == (bit < 6)
        if bit < 6:
            assert "stratum-2.safetensors: layer 'head', plane 2: the 6 padding bits of the last byte" in str(found)


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


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json(plain, name):
    data, message = BAD_JSON[name]
    found = load({**plain, "manifest.json": data})
    assert isinstance(found, ArtifactError)
    assert str(found).startswith("manifest.json: ")
    assert message in str(found)


def test_a_manifest_beyond_the_size_limit(plain, tmp_path):
    value = manifest_of(plain)
    value["provenance"] = {"x": "y" * MAX_BYTES}
    with pytest.raises(ArtifactError, match=f"at most {MAX_BYTES} are allowed"):
        decode(seal(value))
    (tmp_path / "manifest.json").write_bytes(seal(value))
    with pytest.raises(ArtifactError, match=rf"manifest\.json: has \d+ bytes, at most {MAX_BYTES} are allowed"):
        Artifact.open(tmp_path)


@pytest.mark.parametrize("version", [0, 2, -1, 1.0, True, "1", None, [1], 1 << 62])
def test_unknown_versions(plain, version):
    found = load({**plain, "manifest.json": seal({**manifest_of(plain), "version": version})})
    assert str(found) == f"manifest.json: format version {version!r}; this reader knows version 1"


def test_a_manifest_changed_without_a_new_hash_is_noticed(plain):
    value = json.loads(plain["manifest.json"])
    value["provenance"]["seed"] = 1
    assert "it was changed" in str(load({**plain, "manifest.json": canonical(value)}))
    for wrong in (None, 1, [], "", "0" * 63, "0" * 65, "G" * 64, value["sha256"].upper()):
        found = load({**plain, "manifest.json": canonical({**value, "sha256": wrong})})
        assert "sha256: expected 64 lower-case hexadecimal digits" in str(found)


# The manifest's fields

TYPES = [None, True, 0, -1, 1 << 31, 1 << 62, 1.0, -1.5, "", "x", "../x", [], [1], {}]


def test_another_value_in_every_place(files):
    value = manifest_of(files)
    cases = accepted = 0
    for place in places(value):
        for item in TYPES:
            old = get(value, place)
            if type(item) is type(old) and item == old:
                continue
            accepted += not assert_refused_or_faithful({**files, "manifest.json": seal(changed(value, place, item))})
            cases += 1
    assert cases >= 3000
    assert 0 < accepted < cases // 10


def test_integers_are_neither_booleans_nor_fractions(files):
    value = manifest_of(files)
    cases = 0
    for place in places(value):
        number = get(value, place)
        if type(number) is int and place[0] != "provenance" and "clip" not in place:
            for item in (float(number), bool(number), str(number), [number], None, -(1 << 62)):
                assert refused({**files, "manifest.json": seal(changed(value, place, item))}), place
                cases += 1
    assert cases >= 300


def test_every_field_is_needed_and_no_other_is_known(files):
    value = manifest_of(files)
    optional = {"clip"}
    cases = 0
    for place in ((), *places(value)):
        holder = get(value, place)
        if not isinstance(holder, dict) or place[:1] == ("provenance",):
            continue
        more = copy.deepcopy(value)
        get(more, place)["surplus"] = 1
        assert refused({**files, "manifest.json": seal(more)}), place
        for key in holder:
            fewer = copy.deepcopy(value)
            del get(fewer, place)[key]
            if key in optional:
                assert not assert_refused_or_faithful({**files, "manifest.json": seal(fewer)})
            else:
                assert refused({**files, "manifest.json": seal(fewer)}), (place, key)
            cases += 1
    assert cases >= 150


def test_arrays_lengthened_shortened_reversed_and_doubled(files):
    value = manifest_of(files)
    cases = 0
    for place in places(value):
        items = get(value, place)
        if isinstance(items, list) and items and place[0] != "provenance":
            for other in ([*items, items[-1]], items[:-1], items[::-1], items * 2, []):
                if other != items:
                    assert_refused_or_faithful({**files, "manifest.json": seal(changed(value, place, other))})
                    cases += 1
    assert cases >= 300


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


@pytest.mark.parametrize("index", range(len(CHANGES)))
def test_messages_name_the_field(plain, index):
    change, message = CHANGES[index]
    value = manifest_of(plain)
    change(value)
    found = load({**plain, "manifest.json": seal(value)})
    assert isinstance(found, ArtifactError)
    assert message in str(found)
    assert len(str(found)) < 700


def test_repeated_plans(files):
    value = manifest_of(files)
    for item in value["program"]["plans"] * 2:
        value["program"]["plans"].append(item)
    if value["program"]["plans"]:
        assert "program.plans[1].name: 'mixed' occurs twice" in str(load({**files, "manifest.json": seal(value)}))


# Sizes

HUGE = [
    [65536, 4096, 1, 1],
    [1, 65536, 64, 64],
    [4096, 65536, 1, 1],
    [5, 7, 1024, 1024],
    [65536, 32000, 1, 1],
]


@pytest.mark.parametrize("shape", HUGE)
@pytest.mark.parametrize("index", [0, 1])
def test_huge_shapes_with_matching_sizes_allocate_nothing(plain, shape, index, tmp_path):
    value = manifest_of(plain)
    value["program"]["layers"][index]["shape"] = shape
    small = decode(plain["manifest.json"])
    layers = dict(small.program.layers)
    name = list(layers)[index]
    layers[name] = type(layers[name])(**{**layers[name].__dict__, "shape": tuple(shape)})
    sizes = layout.layouts(layers, small.program.affines, small.contents)
    for item in value["files"]:
        item["size"] = layout.file_size(sizes[item["name"]])
    hostile = {**plain, "manifest.json": seal(value)}
    for file, data in hostile.items():
        (tmp_path / file).write_bytes(data)
    tracemalloc.start()
    try:
        artifact = Artifact.open(tmp_path)
        with pytest.raises(ArtifactError, match="bytes, the manifest states"):
            artifact.load({"1", "2", "3", "4"}, 8)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_manifest_full_of_tiny_values_stays_small(plain):
    data = canonical({"format": "bitstrata.strata", "provenance": {"x": [[]] * 200_000}, "version": 1})
    tracemalloc.start()
    try:
        assert refused({**plain, "manifest.json": data})
        assert tracemalloc.get_traced_memory()[1] < 64 * len(data)
    finally:
        tracemalloc.stop()


def test_a_manifest_of_very_many_names_is_read_in_linear_time(plain):
    value = manifest_of(plain)
    graph = value["program"]
    graph["affines"] += [{"channels": 1, "name": f"a{index}", "owner": "mid"} for index in range(100_000)]
    for index in range(1024):
        graph["plans"].append({"name": f"p{index}", "precisions": [1, 1, 1], "affines": ["mid.bn", "a99999"]})
    assert "files: expected 1033 items, got 9" in str(load({**plain, "manifest.json": seal(value)}))


def test_a_sparse_file_is_refused_by_its_length(plain, tmp_path):
    for file, data in plain.items():
        (tmp_path / file).write_bytes(data)
    os.truncate(tmp_path / "base.safetensors", 1 << 40)
    with pytest.raises(ArtifactError, match=r"base\.safetensors: has 1099511627776 bytes, at most 225 are allowed"):
        Artifact.open(tmp_path).load({"1"}, 1)
    os.truncate(tmp_path / "manifest.json", 1 << 40)
    with pytest.raises(ArtifactError, match=r"manifest\.json: has 1099511627776 bytes, at most 16777216 are allowed"):
        Artifact.open(tmp_path)


# Directories

BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "..\\x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "./base.safetensors",
    "base.safetensors/",
    "base.safetensors\0",
    "\0",
    ".hidden",
    "-flag",
    "~",
    "C:x",
    "a b",
    "base.safetensors\n",
    "BASE.safetensors",
    "bäse.safetensors",
    "x" * 129,
    "x" * 1_000_000,
    "..safetensors",
    "%2e%2e%2fx",
    "$HOME",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_no_file_names(tmp_path, name):
    source = DirectorySource(tmp_path)
    with pytest.raises(ArtifactError, match=r"is not allowed: names have 1 to 128 of the characters a-z 0-9 \. _ -"):
        source.read(name, 10)
    assert source.reads == []


@pytest.fixture
def directory(plain, tmp_path):
    path = tmp_path / "net.strata"
    path.mkdir()
    for file, data in plain.items():
        (path / file).write_bytes(data)
    return path


FILES = ["manifest.json", "base.safetensors", "stratum-3.safetensors", "resident.safetensors", "factors-1.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("symlink", "is a symbolic link; the files of an artifact are regular files"),
        ("symlink to a directory", "is a symbolic link; the files of an artifact are regular files"),
        ("dangling symlink", "is a symbolic link; the files of an artifact are regular files"),
        ("symlink to itself", "is a symbolic link; the files of an artifact are regular files"),
        ("directory", "is a directory; the files of an artifact are regular files"),
        ("pipe", "is a special file; the files of an artifact are regular files"),
        ("missing", "cannot be read from .*: No such file or directory"),
    ],
)
def test_entries_that_are_no_regular_files(directory, name, kind, message):
    path, outside = directory / name, directory.parent / "outside"
    path.rename(outside)
    targets = {"symlink": outside, "symlink to a directory": directory.parent, "symlink to itself": path}
    if kind in targets:
        path.symlink_to(targets[kind])
    elif kind == "dangling symlink":
        path.symlink_to(directory / "nowhere")
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ArtifactError, match=rf"{name.replace('.', '[.]')}: {message}"):
        Artifact.open(directory).load({"1", "2", "3", "4"}, 4)


@pytest.mark.parametrize("path", ["none", "manifest.json", "nul\0byte"])
def test_paths_that_are_no_directories(directory, path):
    with pytest.raises(ArtifactError, match="no such directory; an artifact is a directory with a manifest"):
        Artifact.open(directory / path)


def test_an_entry_exchanged_between_look_and_open_is_not_followed(directory, monkeypatch):
    lstat, target = os.lstat, directory / "base.safetensors"
    outside = directory.parent / "outside"
    artifact = Artifact.open(directory)

    def exchanging(path, **kwargs):
        status = lstat(path, **kwargs)
        if os.fspath(path) == os.fspath(target) and not outside.exists():
            target.rename(outside)
            target.symlink_to(outside)
        return status

    monkeypatch.setattr(os, "lstat", exchanging)
    with pytest.raises(ArtifactError, match=r"base\.safetensors: cannot be read"):
        artifact.load({"1"}, 1)


def test_a_source_that_ignores_the_limit_is_caught(plain):
    class Careless(MemorySource):
        def read(self, name, limit):
            return self.files[name]

    artifact = Artifact.open(Careless({**plain, "base.safetensors": plain["base.safetensors"] + b"\0"}))
    with pytest.raises(ArtifactError, match=r"base\.safetensors: has 226 bytes, the manifest states 225"):
        artifact.load({"1"}, 1)
    with pytest.raises(ArtifactError, match="at most 16777216 are allowed"):
        Artifact.open(Careless({"manifest.json": b" " * (MAX_BYTES + 1)}))


def test_the_directory_source_counts_its_reads(directory):
    source = DirectorySource(directory)
    artifact = Artifact.open(source)
    artifact.load({"1"}, 1)
    artifact.load({"1"}, 1)
    assert source.reads == artifact.reads
    assert len(source.reads) == 4
