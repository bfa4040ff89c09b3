"""The native reader of artifacts against Python's: what they read, what they refuse, and which file they blame."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers_hostile as hostile
import numpy as np
import pytest
from helpers_artifact import Files, MemorySource, files_of, reseal
from helpers_dump import NativeReader, compare, expected_held
from helpers_lowering import lowered
from helpers_native import build, sanitizing_compiler
from helpers_programs import chain_program, plain_program, residual_program
from hypothesis import HealthCheck, given, settings
from property.random_programs import programs

import bitstrata as bs
from bitstrata_runtime.artifact import Artifact, write
from bitstrata_runtime.errors import ArtifactError
from bitstrata_runtime.program import Program

pytestmark = pytest.mark.native

BUILDERS: dict[str, Callable[[], Program]] = {
    "plain": plain_program,
    "residual": residual_program,
    "ragged": lambda: chain_program([5, 9, 3, 17], [3, 8, 1], (1, 3, 8), resident=False),
}
LIMITS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dump")
    return build("artifact_dump", folder, sanitizing_compiler(folder), "-DBITSTRATA_ENGINE_TESTS=ON")


@pytest.fixture(scope="module")
def reader(program: Path) -> Iterator[NativeReader]:
    reader = NativeReader(program)
    yield reader
    assert reader.close() == 0


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    folder = tmp_path_factory.mktemp("artifacts")
    for name, make in BUILDERS.items():
        write(make(), folder / name)
    return {name: files_of(folder / name) for name in BUILDERS}


def written(program: Program, folder: Path) -> Files:
    write(program, folder / "net.strata", overwrite=True)
    return files_of(folder / "net.strata")


# What is read


def test_whole_artifacts(reader: NativeReader, artifacts: dict[str, Files]) -> None:
    for files in artifacts.values():
        assert compare(reader, files)


def test_random_programs(reader: NativeReader, tmp_path: Path) -> None:
    operations = set()

    @LIMITS
    @given(programs())
    def check(program: Program) -> None:
        operations.update(node.op for node in program.nodes)
        assert compare(reader, written(program, tmp_path))

    check()
    assert operations >= {"conv", "requant", "rescale", "add", "clip", "maxpool", "avgpool", "slice", "pad", "flatten"}


@pytest.mark.parametrize(
    ("network", "recipe"),
    [("digits_cnn", "strata"), ("digits_resnet", "strata"), ("digits_resnet", "maqd"), ("digits_cnn", "int8")],
)
def test_lowered_networks(reader: NativeReader, tmp_path: Path, network: str, recipe: str) -> None:
    model = bs.zoo.create(network)
    program = lowered(model, (1, 8, 8), bs.recipes.get(recipe))
    assert compare(reader, written(program, tmp_path))


def keys_of(artifact: Artifact) -> list[Any]:
    maps = [dict.fromkeys(artifact.manifest.program.layers, p) for p in artifact.precisions]
    first, last = artifact.precisions[0], artifact.precisions[-1]
    mixed = {name: (first, last)[i % 2] for i, name in enumerate(artifact.manifest.program.layers)}
    return [*artifact.precisions, *artifact.plans, *maps[:1], mixed]


def step_of(artifact: Artifact, choice: Any) -> str:
    if isinstance(choice, dict):
        return f"map {','.join(str(choice[name]) for name in artifact.manifest.program.layers)}"
    return f"plan {choice}" if isinstance(choice, str) else f"precision {choice}"


@pytest.mark.parametrize("name", BUILDERS)
def test_any_order_of_precisions_reads_the_same_files(
    reader: NativeReader, artifacts: dict[str, Files], name: str
) -> None:
    files = artifacts[name]
    rng = np.random.default_rng(3)
    for _ in range(12):
        artifact = Artifact.open(MemorySource(files))
        choices = keys_of(artifact)
        order = [choices[i] for i in rng.permutation(len(choices))]
        answers = reader.ask(files, *(step_of(artifact, choice) for choice in order))[1:]
        for choice, answer in zip(order, answers, strict=True):
            program = artifact.load(*artifact.needs(choice))
            held, total = expected_held(program, files, artifact.reads), artifact.total_bytes(choice)
            assert answer == {"error": None, "total": total, "held": held}, (order, choice)


def test_a_failed_load_changes_nothing(reader: NativeReader, artifacts: dict[str, Files]) -> None:
    for files in artifacts.values():
        for name in files:
            if name == "manifest.json":
                continue
            broken = {**files, name: hostile.flip(files[name], 8 * len(files[name]) - 1)}
            artifact = Artifact.open(MemorySource(broken))
            order = [*artifact.precisions, *artifact.plans, *artifact.precisions[::-1]]
            answers = reader.ask(broken, *(step_of(artifact, choice) for choice in order))[1:]
            failures = 0
            program = artifact.manifest.program
            for choice, answer in zip(order, answers, strict=True):
                blamed = ""
                try:
                    program = artifact.load(*artifact.needs(choice))
                except ArtifactError as error:
                    blamed, failures = str(error).split(":")[0], failures + 1
                assert blamed in ("", name)
                assert (answer["error"] or {"file": ""})["file"] == blamed
                assert answer["held"] == expected_held(program, files, artifact.reads)
            assert failures > 0


def test_requests_for_what_is_not_there(reader: NativeReader, artifacts: dict[str, Files]) -> None:
    steps = {
        "precision 5": "there is no precision 5; there are 1, 2, 3, 4",
        "plan mixed": "there is no plan 'mixed'",
        "map 1,2": "the precision map leaves out layer 'head'",
        "load 9 1": "the number of bit-planes is from 0 to 8, got 9",
        "indices 0,0": "the selection is not one of this program",
        "indices 0,0,4": "the selection is not one of this program",
        "indices 0,-1,0": "the selection is not one of this program",
        "load 2 7": "factors -1: there are 4 of precisions and plans",
    }
    for step, message in steps.items():
        (_, answer) = reader.ask(artifacts["plain"], step)
        assert answer["error"] == {"kind": "request", "file": "", "message": message}
        assert [name for name, *_ in answer["held"]["reads"]] == ["manifest.json"]


# What is refused


def check_hostile(reader: NativeReader, cases: hostile.Cases, every: int) -> None:
    accepted = refused = 0
    for label, files in itertools.islice(cases, 0, None, every):
        try:
            verdict = compare(reader, files)
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from error
        accepted, refused = accepted + verdict, refused + (not verdict)
    assert refused >= 9, (accepted, refused)


@pytest.mark.parametrize("generator", hostile.ALL, ids=lambda generator: generator.__name__)
@pytest.mark.parametrize("name", ["plain", "residual"])
def test_hostile_artifacts(
    reader: NativeReader, artifacts: dict[str, Files], name: str, generator: Callable[[Files], hostile.Cases]
) -> None:
    few = generator in (hostile.swapped, hostile.missing, hostile.bad_json)
    check_hostile(reader, generator(artifacts[name]), 1 if few else 7)


@pytest.mark.soak
@pytest.mark.parametrize("generator", hostile.ALL, ids=lambda generator: generator.__name__)
@pytest.mark.parametrize("name", BUILDERS)
def test_all_hostile_artifacts(
    reader: NativeReader, artifacts: dict[str, Files], name: str, generator: Callable[[Files], hostile.Cases]
) -> None:
    check_hostile(reader, generator(artifacts[name]), 1)


def test_changes_to_single_fields(reader: NativeReader, artifacts: dict[str, Files]) -> None:
    for label, files in (*hostile.field_changes(artifacts["plain"]), *hostile.other_headers(artifacts["plain"])):
        assert not compare(reader, files), label


def test_factors_and_codes_that_no_program_may_have(reader: NativeReader, artifacts: dict[str, Files]) -> None:
    for tensor, index, value, _ in hostile.FACTORS:
        assert not compare(
            reader, hostile.with_factor(artifacts["plain"], "factors-2.safetensors", tensor, index, value)
        )
    for value in (1e-31, 1e31, 5e-324):
        assert not compare(reader, hostile.with_factor(artifacts["plain"], "factors-2.safetensors", "step", 0, value))
    files = artifacts["plain"]
    size = len(files["stratum-2.safetensors"])
    verdicts = [
        compare(reader, reseal({**files, "stratum-2.safetensors": hostile.flip(files["stratum-2.safetensors"], bit)}))
        for bit in range(8 * size - 8, 8 * size)  # the last weights of layer "head" and 6 bits of padding
    ]
    assert verdicts == [False] * 6 + [True] * 2
    value = hostile.manifest_of(files)
    value["program"]["layers"][0]["source_bits"] = 7
    value["program"]["layers"][0]["weight_bits"] = [7] * 4
    assert not compare(reader, reseal(files, value))  # resident codes of 8 bits


@pytest.mark.parametrize("index", [0, 1])
def test_huge_shapes_are_refused(reader: NativeReader, artifacts: dict[str, Files], index: int) -> None:
    for shape in hostile.HUGE:
        assert not compare(reader, hostile.huge(artifacts["plain"], shape, index))


def test_manifests_of_very_many_values(reader: NativeReader, artifacts: dict[str, Files]) -> None:
    files = artifacts["plain"]
    value = hostile.manifest_of(files)
    value["program"]["affines"] += [{"channels": 1, "name": f"a{index}", "owner": "mid"} for index in range(50_000)]
    for index in range(1024):
        value["program"]["plans"].append({"name": f"p{index}", "precisions": [1] * 3, "affines": ["mid.bn", "a49999"]})
    assert not compare(reader, {**files, "manifest.json": hostile.seal(value)})
    many = hostile.canonical({"format": "bitstrata.strata", "provenance": {"x": [[]] * 1_000_000}, "version": 1})
    assert not compare(reader, {**files, "manifest.json": many})
    assert not compare(reader, {**files, "manifest.json": b" " * ((1 << 24) + 1)})


def test_a_function_that_ignores_the_limit_is_caught(reader: NativeReader, artifacts: dict[str, Files]) -> None:
    files = artifacts["plain"]
    opened, loaded = reader.ask(files, "everything", careless=True)
    assert opened == reader.ask(files)[0]
    assert loaded["error"] is None
    _, loaded = reader.ask(
        {**files, "base.safetensors": files["base.safetensors"] + b"\0"}, "precision 1", careless=True
    )
    message = "base.safetensors: has 226 bytes, at most 225 are allowed"
    assert loaded["error"] == {"kind": "source", "file": "base.safetensors", "message": message}
    (opened,) = reader.ask({"manifest.json": b" " * ((1 << 24) + 1)}, careless=True)
    assert "has 16777217 bytes, at most 16777216 are allowed" in opened["error"]["message"]


def test_nesting_up_to_the_limit(reader: NativeReader, artifacts: dict[str, Files]) -> None:
    for levels, accepted in ((31, True), (32, False)):  # of arrays; the provenance itself has depth 1
        value = hostile.manifest_of(artifacts["plain"])
        nested: list[Any] = []
        for _ in range(levels - 1):
            nested = [nested]
        value["provenance"] = {"x": nested}
        assert compare(reader, reseal(artifacts["plain"], value)) == accepted


def test_multiply_accumulates_up_to_the_limit(reader: NativeReader, tmp_path: Path) -> None:
    for layers, accepted in ((4, True), (5, False)):  # 2^38 each
        files = written(chain_program([1024] * (layers + 1), [1] * layers, (1,), resident=False), tmp_path)
        value = hostile.manifest_of(files)
        value["program"]["input"]["shape"] = [1024, 512, 512]
        assert compare(reader, reseal(files, value)) == accepted


# Directories


def test_directories(reader: NativeReader, artifacts: dict[str, Files], tmp_path: Path) -> None:
    files = artifacts["plain"]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    opened, loaded = reader.ask(tmp_path, "everything")
    assert "program" in opened
    assert loaded["error"] is None
    (tmp_path / "link").symlink_to(tmp_path)
    assert "program" in reader.ask(tmp_path / "link")[0]
    for path in (tmp_path / "none", tmp_path / "manifest.json"):
        assert "no such directory" in reader.ask(path)[0]["error"]["message"]


@pytest.mark.parametrize("name", ["manifest.json", "base.safetensors", "factors-1.safetensors"])
def test_entries_that_are_no_regular_files(
    reader: NativeReader, artifacts: dict[str, Files], tmp_path: Path, name: str
) -> None:
    folder, outside = tmp_path / "net.strata", tmp_path / "outside"
    folder.mkdir()
    for file, data in artifacts["plain"].items():
        (folder / file).write_bytes(data)
    path = folder / name
    path.rename(outside)
    kinds: list[tuple[Callable[[], None], str]] = [
        (lambda: path.symlink_to(outside), "is a symbolic link; the files of an artifact are regular files"),
        (lambda: path.symlink_to(folder / "nowhere"), "is a symbolic link; the files of an artifact are regular files"),
        (lambda: os.mkfifo(path), "is a special file; the files of an artifact are regular files"),
        (lambda: None, "No such file or directory"),
    ]
    for make, message in kinds:
        make()
        opened, loaded = reader.ask(folder, "everything")
        error = opened.get("error") or loaded["error"]
        assert (error["kind"], error["file"]) == ("source", name)
        assert message in error["message"]
        path.unlink(missing_ok=True)
    path.mkdir()
    opened, loaded = reader.ask(folder, "everything")
    assert "is a directory" in (opened.get("error") or loaded["error"])["message"]
    path.rmdir()
    path.touch()
    os.truncate(path, 1 << 40)
    opened, loaded = reader.ask(folder, "everything")
    assert "has 1099511627776 bytes, at most" in (opened.get("error") or loaded["error"])["message"]


# Numbers


def test_floats_have_one_spelling(program: Path) -> None:
    rng = np.random.default_rng(11)
    bits = rng.integers(0, 1 << 64, 4000, dtype=np.uint64, endpoint=False)
    powers = np.ldexp(1.0, np.arange(-1074, 1024))
    decimals = [float(f"{digit}e{power}") for digit in (1, 9, 123, 99999) for power in range(-330, 305)]
    edges = np.array([0.0, -0.0, 5e-324, 1.7976931348623157e308, 2.2250738585072014e-308, *decimals])
    values = np.concatenate([bits.view(np.float64), powers, -powers, np.nextafter(powers, 0), edges])
    values = values[np.isfinite(values)]
    lines = "".join(f"{struct.unpack('<Q', struct.pack('<d', value))[0]:016x}\n" for value in values)
    result = subprocess.run([program, "floats"], input=lines, capture_output=True, text=True, check=True)
    answers = result.stdout.splitlines()
    assert len(answers) == len(values)
    for value, answer in zip(values, answers, strict=True):
        text = repr(float(value))
        assert answer == f"{text} {text} 1"
