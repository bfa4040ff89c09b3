"""Artifacts made by an adversary: every one is refused with ArtifactError, or means exactly what its content says.

"Sealed" cases have all hashes recomputed after the change, as an adversary would; for those that are valid programs,
the second reader of helpers_artifact says what they mean.
"""

import json
import os
import tracemalloc

import helpers_hostile as hostile
import numpy as np
import pytest
from helpers_artifact import MemorySource, canonical, files_of, manifest_of, read_plainly, reseal, seal
from helpers_hostile import BAD_JSON, CHANGES, HUGE, VERSIONS, flip, header_of, huge
from helpers_programs import (
    assert_same_factors,
    assert_same_program,
    assert_same_weights,
    plain_program,
    residual_program,
)

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


# Bytes


def test_the_untouched_files_run(files):
    assert not assert_refused_or_faithful(files)
    assert not assert_refused_or_faithful(reseal(files))
    assert isinstance(logits(load(files)), list)


def test_truncated_and_lengthened_files(files):
    cases = 0
    for label, changed_files in hostile.cut_and_lengthened(files):
        assert refused(changed_files), label
        cases += 1
    assert cases >= 300


def test_any_flipped_bit_is_noticed(files):
    cases = 0
    for label, changed_files in hostile.flipped(files):
        assert refused(changed_files), label
        cases += 1
    assert cases >= 300


def test_flipped_bits_under_new_hashes_are_refused_or_mean_what_they_say(files):
    accepted = refusals = 0
    for (name, bit), changed_files in hostile.flipped_and_sealed(files):
        if assert_refused_or_faithful(changed_files):
            refusals += 1
        else:
            accepted += 1
            payload = sum(t.size for t in decode(files["manifest.json"]).layouts[name])
            assert bit >= 8 * (len(files[name]) - payload)
    assert accepted + refusals >= 300
    assert accepted > 60
    assert refusals > 60


def test_flipped_bits_of_the_manifest_under_a_new_hash(files):
    cases = 0
    for _, changed_files in hostile.flipped_manifests(files):
        assert_refused_or_faithful(changed_files)
        cases += 1
    assert cases >= 300


def test_files_swapped_with_one_another(files):
    cases = 0
    for (first, second), changed_files in hostile.swapped(files):
        assert refused(changed_files)
        if "manifest.json" not in (first, second):
            same_form = header_of(files[first]) == header_of(files[second])
            assert assert_refused_or_faithful(reseal(changed_files)) == (not same_form), (first, second)
        cases += 1
    assert cases >= 45


def test_missing_files(files):
    for name, changed_files in hostile.missing(files):
        assert refused(changed_files), name


def test_headers_that_say_the_same_in_another_way(plain):
    messages = {
        "spelling": "stratum-2.safetensors: has",
        "length": "stratum-2.safetensors: the header differs from the one fixed by the manifest",
    }
    for kind, changed_files in hostile.other_headers(plain):
        assert messages[kind] in str(load(changed_files))


@pytest.mark.parametrize(("tensor", "index", "value", "message"), hostile.FACTORS)
def test_factors_that_are_no_factors(plain, tensor, index, value, message):
    found = load(hostile.with_factor(plain, "factors-2.safetensors", tensor, index, value))
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


@pytest.mark.parametrize("version", VERSIONS)
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


def test_another_value_in_every_place(files):
    cases = accepted = 0
    for _, changed_files in hostile.other_values(files):
        accepted += not assert_refused_or_faithful(changed_files)
        cases += 1
    assert cases >= 3000
    assert 0 < accepted < cases // 10


def test_integers_are_neither_booleans_nor_fractions(files):
    cases = 0
    for label, changed_files in hostile.other_numbers(files):
        assert refused(changed_files), label
        cases += 1
    assert cases >= 300


def test_every_field_is_needed_and_no_other_is_known(files):
    cases = 0
    for place, changed_files in hostile.other_members(files):
        if place[-1] == "clip":  # the only one that may be missing
            assert not assert_refused_or_faithful(changed_files)
        else:
            assert refused(changed_files), place
        cases += 1
    assert cases >= 150


def test_arrays_lengthened_shortened_reversed_and_doubled(files):
    cases = 0
    for _, changed_files in hostile.other_arrays(files):
        assert_refused_or_faithful(changed_files)
        cases += 1
    assert cases >= 300


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


@pytest.mark.parametrize("shape", HUGE)
@pytest.mark.parametrize("index", [0, 1])
def test_huge_shapes_with_matching_sizes_allocate_nothing(plain, shape, index, tmp_path):
    for file, data in huge(plain, shape, index).items():
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
