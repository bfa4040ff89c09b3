"""Artifacts written and read back: equality, determinism, which files are read, sizes."""

import dataclasses
import os
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from helpers_artifact import MemorySource, files_of, read_plainly
from helpers_programs import (
    assert_same_factors,
    assert_same_program,
    assert_same_weights,
    chain_program,
    plain_program,
    residual_program,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bitstrata_runtime import layout
from bitstrata_runtime.artifact import Artifact, info, write
from bitstrata_runtime.errors import ArtifactError
from bitstrata_runtime.program import AffineInfo, Weights


def grids_program():
    """`plain_program` with other input grids and integer forms at every precision."""
    program = plain_program()
    mid, stem = program.layers["mid"], program.layers["stem"]
    program.layers["mid"] = dataclasses.replace(
        mid,
        integer_form={1: (8, 3), 2: (4, 1), 3: (2, 1), 4: (1, 0)},
        input_range={1: (0, 1), 2: (-1, 1), 3: (0, 6), 4: (-8, 7)},
        pad_code={1: (0,), 2: (-1,), 3: tuple(range(7)), 4: (7,)},
        input_offset={1: (0.0,), 2: (-0.0,), 3: (-1.5,), 4: (1e-07,)},
    )
    offsets = {1: (-123.675, -116.28, -103.53), 2: (0.0,), 3: (1.0, 2.0, 3.0), 4: (-128.0,)}
    program.layers["stem"] = dataclasses.replace(stem, input_offset=offsets)
    return program


BUILDERS = {"plain": plain_program, "residual": residual_program, "grids": grids_program}


@pytest.fixture(params=BUILDERS)
def program(request):
    return BUILDERS[request.param]()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.strata"


def load_all(artifact):
    return artifact.load(set(artifact.manifest.contents), 8)


def names(reads):
    return [name for name, _ in reads]


def assert_equal(found, expected):
    assert_same_program(found, expected)
    assert_same_weights(found.weights, expected.weights, {})
    assert_same_factors(found.factors, expected.factors, set(expected.factors))


def test_round_trip(program, path):
    write(program, path)
    assert_equal(load_all(Artifact.open(path)), program)


def test_a_reader_written_from_the_specification_agrees(program, path):
    write(program, path)
    assert_equal(read_plainly(files_of(path)), program)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_round_trip_of_any_chain(tmp_path_factory, data):
    depth = data.draw(st.integers(1, 4), "depth")
    widths = data.draw(st.lists(st.integers(1, 9), min_size=depth + 1, max_size=depth + 1), "widths")
    bits = data.draw(st.lists(st.integers(1, 8), min_size=depth, max_size=depth), "source bits")
    precisions = tuple(sorted(data.draw(st.sets(st.integers(1, 8), min_size=1), "precisions")))
    program = chain_program(widths, bits, precisions, resident=data.draw(st.booleans(), "resident"))
    path = tmp_path_factory.mktemp("chain") / "net.strata"
    write(program, path)
    assert_equal(load_all(Artifact.open(path)), program)
    artifact = Artifact.open(path)
    for precision in data.draw(st.permutations(precisions), "order"):
        artifact.load(*artifact.needs(precision))
    planes = max((bits for name, bits in held_planes(artifact).items() if program.layers[name].planes), default=0)
    for name, held in held_planes(artifact).items():
        item = program.layers[name]
        assert held == (min(item.source_bits, planes) if item.planes else 8)
        assert held >= max(item.weight_bits.values())
    assert len(set(names(artifact.reads))) == len(artifact.reads)


def held_planes(artifact):
    return {name: weights.bits for name, weights in artifact.load(set(), 0).weights.items()}


def test_bytes_are_the_same_for_the_same_program(program, tmp_path):
    first, second = tmp_path / "a.strata", tmp_path / "b.strata"
    write(program, first)
    write(load_all(Artifact.open(first)), second)
    assert files_of(first) == files_of(second)


def test_dictionary_order_of_plain_data_does_not_change_the_bytes(path, tmp_path):
    program = plain_program()
    write(program, path)
    program.provenance = dict(reversed(program.provenance.items()))
    program.factors = dict(reversed(program.factors.items()))
    program.weights = dict(reversed(program.weights.items()))
    other = tmp_path / "other.strata"
    write(program, other)
    assert files_of(path) == files_of(other)


def test_every_tensor_file_is_read_by_the_safetensors_library(program, path):
    write(program, path)
    manifest = Artifact.open(path).manifest
    for name, tensors in manifest.layouts.items():
        arrays = safetensors.numpy.load_file(path / name)
        assert {key: array.shape for key, array in arrays.items()} == {t.key: t.shape for t in tensors}
    assert {file.name for file in path.iterdir()} == {*manifest.layouts, "manifest.json"}


def test_only_the_files_a_precision_needs_are_read_each_once(path):
    program = plain_program()
    write(program, path)
    artifact = Artifact.open(path)
    assert names(artifact.reads) == ["manifest.json"]
    loaded = artifact.load({"1"}, 1)
    assert names(artifact.reads)[1:] == ["base.safetensors", "resident.safetensors", "factors-1.safetensors"]
    assert_same_weights(loaded.weights, program.weights, {"mid": 1, "head": 1})
    assert_same_factors(loaded.factors, program.factors, {"1"})
    for bits in (2, 3, 4):
        before = len(artifact.reads)
        upgraded = artifact.load({str(bits)}, bits)
        assert names(artifact.reads)[before:] == [f"stratum-{bits}.safetensors", f"factors-{bits}.safetensors"]
        assert_same_weights(upgraded.weights, program.weights, {"mid": bits, "head": min(bits, 2)})
        assert_same_factors(upgraded.factors, program.factors, {str(n) for n in range(1, bits + 1)})
    assert_same_weights(loaded.weights, program.weights, {"mid": 1, "head": 1})  # the first program is as it was
    before = artifact.reads
    assert_equal(artifact.load({"1", "4"}, 2), program)
    assert artifact.reads == before
    assert artifact.reads == [(name, (path / name).stat().st_size) for name in names(before)]


def test_a_plan_reads_its_own_factors_and_those_of_its_precisions(path):
    program = residual_program()
    write(program, path)
    artifact = Artifact.open(path)
    assert artifact.plans == program.plans
    assert artifact.needs("mixed") == ({"mixed", "2", "4", "8"}, 4)
    assert artifact.needs({"stem": 8, "block.conv": 2, "head": 8}) == ({"2", "8"}, 2)
    loaded = artifact.load(*artifact.needs("mixed"))
    assert names(artifact.reads)[1:4] == ["base.safetensors", "stratum-3.safetensors", "stratum-4.safetensors"]
    assert_same_factors(loaded.factors, program.factors, {"mixed", "2", "4", "8"})
    assert artifact.total_bytes("mixed") == sum(size for _, size in artifact.reads)


def test_arrays_are_read_only_and_dictionaries_are_the_callers_own(path):
    program = plain_program()
    write(program, path)
    artifact = Artifact.open(path)
    loaded = load_all(artifact)
    arrays = [weights.codes for weights in loaded.weights.values()]
    arrays += [array for factors in loaded.factors.values() for array in factors.affine.values()]
    assert not any(array.flags.writeable for array in arrays)
    assert all(array.flags.c_contiguous for array in arrays)
    loaded.weights.clear()
    loaded.factors["1"].affine.clear()
    loaded.provenance["accuracy"].clear()
    loaded.nodes[1].attrs["stride"][0] = 9
    assert_equal(load_all(artifact), program)


def test_a_failed_load_changes_nothing_and_can_be_repeated(path):
    program = plain_program()
    write(program, path)
    files = files_of(path)
    source = MemorySource(dict(files))
    artifact = Artifact.open(source)
    artifact.load({"1"}, 1)
    before = artifact.reads
    source.files["stratum-3.safetensors"] = files["stratum-3.safetensors"][:-1] + b"\x80"
    with pytest.raises(ArtifactError, match=r"stratum-3\.safetensors: sha256 is"):
        artifact.load({"2", "3"}, 3)
    assert artifact.reads == before
    again = artifact.load({"1"}, 1)
    assert artifact.reads == before
    assert_same_weights(again.weights, program.weights, {"mid": 1, "head": 1})
    assert_same_factors(again.factors, program.factors, {"1"})
    source.files = files
    assert_equal(load_all(artifact), program)


@pytest.mark.parametrize("prefix", ["", "a_layer_name." * 150])
def test_sizes_stay_in_budget_whatever_the_names(prefix, path):
    program = plain_program(prefix=prefix)
    write(program, path)
    artifact = Artifact.open(path)
    strata = {stratum.file for stratum in artifact.manifest.strata}
    channels = sum(affine.channels for affine in program.affines.values())
    for name, tensors in artifact.manifest.layouts.items():
        size = (path / name).stat().st_size
        if name in strata:
            assert size <= sum(tensor.size for tensor in tensors) + 128 * len(tensors)
        elif name.startswith("factors"):
            assert size <= 16 * channels + 256 * len(program.layers)
    planes = sum((weights.codes.size + 7) // 8 * 4 for name, weights in program.weights.items() if "mid" in name)
    planes += sum((weights.codes.size + 7) // 8 * 2 for name, weights in program.weights.items() if "head" in name)
    assert info(path).plane_payload == planes


def test_plane_files_stay_in_budget_with_very_many_layers():
    tensors = [layout.Tensor(str(index), "U8", (1, 1 << 25)) for index in range(10_000)]
    assert len(layout.header(tensors)) <= 128 * len(tensors)
    assert len(layout.header(tensors[:1])) <= 128
    for count in (1, 2, 300):
        factors = (layout.Tensor("affine", "F64", (2, 1 << 16)), layout.Tensor("step", "F64", (count,)))
        assert layout.file_size(factors) <= 16 * (1 << 16) + 256 * count


def test_info_adds_up(path):
    written = write(residual_program(), path)
    found = info(path)
    assert found == written
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    assert {row.name: row.size for row in found.files} == sizes
    assert found.total == sum(sizes.values())
    strata = [row for row in found.files if row.name.startswith(("base", "stratum"))]
    assert found.plane_payload == 576
    assert found.plane_overhead == sum(row.size for row in strata) - 576
    assert [row.name for row in found.precisions] == ["2", "4", "8", "mixed"]
    assert [row.weight_bits for row in found.precisions] == [2, 4, 8, 4]
    assert sum(row.added for row in found.precisions) == found.total
    artifact = Artifact.open(path)
    for row, precision in zip(found.precisions, (2, 4, 8, "mixed"), strict=True):
        fresh = Artifact.open(path)
        fresh.load(*fresh.needs(precision))
        assert row.total == artifact.total_bytes(precision) == sum(size for _, size in fresh.reads)
    assert [(row.name, row.weights, row.planes) for row in found.layers] == [
        ("stem", 144, False),
        ("block.conv", 576, True),
        ("head", 32, False),
    ]
    assert found.sha256 == artifact.manifest.sha256
    assert found.version == 1


def test_an_artifact_without_planes_has_no_strata(path):
    program = chain_program([3, 4], [8], (8,), resident=True)
    written = write(program, path)
    assert [row.name for row in written.files] == ["manifest.json", "resident.safetensors", "factors-8.safetensors"]
    assert (written.plane_payload, written.plane_overhead, written.precisions[0].weight_bits) == (0, 0, 0)
    assert_equal(load_all(Artifact.open(path)), program)


def test_numpy_scalars_and_tuples_become_json(path):
    program = plain_program()
    program.provenance = {"a": np.float64(0.1), "b": (np.int64(3), np.bool_(True)), "c": float("1e22"), "d": -0.0}
    write(program, path)
    loaded = load_all(Artifact.open(path))
    assert repr(loaded.provenance) == "{'a': 0.1, 'b': [3, True], 'c': 1e+22, 'd': -0.0}"


def test_weights_not_in_c_order_are_written_as_their_values(path):
    program = plain_program()
    expected = {name: Weights(weights.codes.copy(), weights.bits) for name, weights in program.weights.items()}
    for name, weights in program.weights.items():
        program.weights[name] = Weights(np.asfortranarray(weights.codes), weights.bits)
    write(program, path)
    assert_same_weights(load_all(Artifact.open(path)).weights, expected, {})


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda a: a.load({"5"}, 1), "no factors '5' in this artifact, it has 1, 2, 3, 4"),
        (lambda a: a.load({"../1"}, 1), r"no factors '\.\./1' in this artifact"),
        (lambda a: a.load({"1"}, 9), "bit-planes is an integer from 0 to 8, got 9"),
        (lambda a: a.load({"1"}, -1), "from 0 to 8, got -1"),
        (lambda a: a.load({"1"}, True), "from 0 to 8, got True"),
        (lambda a: a.needs(5), r"precision 5: the artifact serves \(1, 2, 3, 4\), maps of all its layers"),
        (lambda a: a.needs(True), "precision True: the artifact serves"),
        (lambda a: a.needs("mixed"), "precision 'mixed': the artifact serves"),
        (lambda a: a.total_bytes({"stem": 1}), r"precision \{'stem': 1\}: the artifact serves"),
    ],
)
def test_asking_for_what_is_not_there(path, ask, message):
    write(plain_program(), path)
    artifact = Artifact.open(path)
    with pytest.raises(ArtifactError, match=message):
        ask(artifact)
    assert names(artifact.reads) == ["manifest.json"]


def test_the_directory_itself_may_be_a_link(path, tmp_path):
    write(plain_program(), path)
    os.symlink(path, tmp_path / "link.strata")
    assert_equal(load_all(Artifact.open(tmp_path / "link.strata")), plain_program())


def test_codes_are_held_once_and_files_not_at_all(path):
    program = chain_program([1024, 1024], [8], (4, 8), resident=False)
    write(program, path)
    del program
    artifact = Artifact.open(path)
    tracemalloc.start()
    try:
        artifact.load({"4"}, 4)
        artifact.load({"8"}, 8)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1.1 * (1 << 20)
    assert peak < 3.3 * (1 << 20)  # the codes held, for the case of failure, and two arrays to widen them


def test_layers_narrower_than_a_stratum_are_absent_from_it(path):
    write(plain_program(), path)
    assert set(safetensors.numpy.load_file(path / "stratum-2.safetensors")) == {"1", "2"}
    assert set(safetensors.numpy.load_file(path / "stratum-3.safetensors")) == {"1"}


def test_a_plan_that_re_estimates_nothing_or_everything(path):
    program = residual_program()
    program.factors["mixed"].affine.clear()
    program.plans["all"] = dict.fromkeys(program.layers, 2)
    program.factors["all"] = dataclasses.replace(program.factors["2"], step={})
    write(program, path)
    assert_equal(load_all(Artifact.open(path)), program)


def test_affines_of_different_widths_come_back_apart(path):
    program = plain_program()
    assert [info.channels for info in program.affines.values()] == [7, 5, 10]
    assert program.affines["mid.bn"] == AffineInfo("mid", 5)
    write(program, path)
    raw = safetensors.numpy.load_file(path / "factors-3.safetensors")["affine"]
    np.testing.assert_array_equal(raw[:, 7:12], program.factors["3"].affine["mid.bn"])
