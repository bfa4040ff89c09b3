"""The writer: what it refuses, and that a path never holds half an artifact."""

import os
from pathlib import Path

import numpy as np
import pytest
from helpers_artifact import files_of
from helpers_programs import plain_program, residual_program

from bitstrata_runtime import writer
from bitstrata_runtime.artifact import Artifact, write
from bitstrata_runtime.errors import ArtifactError
from bitstrata_runtime.program import Weights


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.strata"


def test_an_existing_path_is_kept(path):
    write(plain_program(), path)
    before = files_of(path)
    with pytest.raises(ArtifactError, match=r"net\.strata: exists already; overwrite=True replaces an artifact"):
        write(plain_program(seed=3), path)
    assert files_of(path) == before


def test_overwriting_replaces_every_file(path, tmp_path):
    write(plain_program(), path)
    write(residual_program(), path, overwrite=True)
    assert Artifact.open(path).precisions == (2, 4, 8)
    assert {file.name for file in path.iterdir()} == {"manifest.json", *Artifact.open(path).manifest.files}
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.strata"]


def test_overwriting_where_nothing_is(path):
    write(plain_program(), path, overwrite=True)
    assert Artifact.open(path).precisions == (1, 2, 3, 4)


def make_foreign(kind, path):
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        path.with_name("target").mkdir()
        path.symlink_to("target")
    else:
        path.mkdir()
        (path / "manifest.json").write_text("{}")
        if kind == "document":
            (path / "thesis.txt").write_text("mine")
        elif kind == "folder":
            (path / "more.safetensors").mkdir()
        else:
            (path / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("file", "is not a directory, so it is no artifact and is not replaced"),
        ("link", "is not a directory, so it is no artifact and is not replaced"),
        ("document", r"it holds 'thesis\.txt', so it is no artifact and is not replaced"),
        ("folder", r"it holds 'more\.safetensors', so it is no artifact and is not replaced"),
        ("empty", r"it has no manifest\.json, so it is no artifact and is not replaced"),
    ],
)
def test_what_is_no_artifact_is_never_replaced(kind, message, path):
    make_foreign(kind, path)
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(ArtifactError, match=message):
        write(plain_program(), path, overwrite=True)
    assert sorted(path.parent.rglob("*")) == before


def test_the_parent_must_exist(tmp_path):
    with pytest.raises(ArtifactError, match="the directory it would be in does not exist"):
        write(plain_program(), tmp_path / "none" / "net.strata")


@pytest.mark.parametrize("step", range(12))
def test_a_failure_at_any_file_leaves_nothing(step, path, monkeypatch):
    count = iter(range(100))

    def fsync(descriptor):
        if next(count) == step:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    if step < 11:  # 9 tensor files, the manifest, the directory
        with pytest.raises(OSError, match="No space left"):
            write(plain_program(), path)
        assert list(path.parent.iterdir()) == []
    else:  # the parent directory's, after the rename: the artifact is there, whole
        with pytest.raises(OSError, match="No space left"):
            write(plain_program(), path)
        assert Artifact.open(path).load({"1"}, 1).precisions == (1, 2, 3, 4)
        assert [entry.name for entry in path.parent.iterdir()] == ["net.strata"]


def test_a_failing_rename_puts_the_old_artifact_back(path, monkeypatch):
    write(plain_program(), path)
    before = files_of(path)
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".new"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        write(residual_program(), path, overwrite=True)
    assert files_of(path) == before
    assert [entry.name for entry in path.parent.iterdir()] == ["net.strata"]


def test_a_path_taken_while_writing_is_kept(path, monkeypatch):
    encode = writer.manifest.encode

    def slow(program, held, files):
        if "0" * 64 not in {entry.sha256 for entry in files.values()}:
            path.mkdir()
        return encode(program, held, files)

    monkeypatch.setattr(writer.manifest, "encode", slow)
    with pytest.raises(ArtifactError, match="exists already"):
        write(plain_program(), path)
    assert [entry.name for entry in path.parent.iterdir()] == ["net.strata"]
    assert list(path.iterdir()) == []


def narrow(program):
    program.weights["mid"] = Weights(program.weights["mid"].codes >> 1, 3)


def not_finite(program):
    program.factors["2"].affine["mid.bn"][0, 0] = np.nan


def plan_named(name):
    def change(program):
        program.plans[name] = dict.fromkeys(program.layers, 2)
        program.factors[name] = type(program.factors["2"])()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (narrow, "layer 'mid': an artifact needs all 4 bit-planes, the program holds 3"),
        (not_finite, "not finite"),
        (lambda p: p.factors.pop("3"), "has no entry for '3', has"),
        (lambda p: p.factors["3"].step.pop("mid"), "missing.*'mid'"),
        (lambda p: p.provenance.update(x=float("nan")), r"provenance\.x: numbers are finite, got nan"),
        (lambda p: p.provenance.update(x=1 << 63), r"provenance\.x: integers have 64 bits, got one of 64"),
        (lambda p: p.provenance.update(x=object()), r"provenance\.x: object is not a JSON value"),
        (lambda p: p.provenance.update(x={1: 2}), r"provenance\.x: keys are strings, got 1"),
        (lambda p: p.provenance.update(x="\ud800"), r"provenance\.x: text holds half of a surrogate pair"),
        (plan_named("../x"), r"plans\[0\]\.name: expected a letter a-z.*got '\.\./x'"),
        (plan_named("Fast"), r"plans\[0\]\.name: expected a letter a-z.*got 'Fast'"),
        (plan_named("x" * 65), r"plans\[0\]\.name: expected a letter a-z"),
    ],
)
def test_programs_that_cannot_be_stored(change, message, path):
    program = plain_program()
    change(program)
    with pytest.raises(ArtifactError, match=message):
        write(program, path)
    assert list(path.parent.iterdir()) == []


def test_deep_provenance(path):
    program = plain_program()
    nested: list = []
    for _ in range(40):
        nested = [nested]
    program.provenance["x"] = nested
    with pytest.raises(ArtifactError, match="nested deeper than 32"):
        write(program, path)
    assert list(path.parent.iterdir()) == []


def test_a_relative_path(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    write(plain_program(), "net.strata")
    write(plain_program(), "net.strata/", overwrite=True)
    assert Artifact.open("net.strata").precisions == (1, 2, 3, 4)
