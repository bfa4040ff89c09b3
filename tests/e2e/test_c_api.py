"""The shared library with the C interface: what it exports, its example program, and results equal to `Session`'s."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_artifact import files_of, manifest_of, seal
from helpers_capi import (
    READ,
    ROOT,
    SIZE,
    CallbackSource,
    CError,
    CSession,
    File,
    build,
    capi,
    choice_of,
    find,
    run,
    succeed,
)
from helpers_programs import plain_program, residual_program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.random_programs import choices, programs

from bitstrata_runtime import Program, Session, available_isas, load
from bitstrata_runtime.artifact import write

pytestmark = pytest.mark.native

HEADER = ROOT / "engine" / "include" / "bitstrata.h"
EXAMPLE = ROOT / "examples" / "c"
PROGRAMS = {"plain": plain_program, "residual": residual_program}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody needs these artifacts after a power failure."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.strata"
    write(plain_program(), path)
    return path


def images(program: Program, count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    shape = (count, *program.input_shape)
    if program.input_kind == "pixels":
        return rng.integers(0, 256, shape).astype(np.uint8)
    return rng.normal(0, 1, shape).astype(np.float32)


# What is built


def test_exports() -> None:
    nm, readelf = find("nm"), find("readelf")
    if not (nm and readelf):
        pytest.skip("no nm and readelf (binutils)")
    library = build() / "libbitstrata.so"
    names = {line.split()[-1] for line in succeed(nm, "-D", "--defined-only", library).splitlines()}
    declared = set(re.findall(r"\b(bs_\w+)\(", re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)))
    assert names == declared
    assert len(names) > 20
    assert "[libbitstrata.so.1]" in succeed(readelf, "-d", library)


@pytest.mark.parametrize(
    "command", [("cc", "gcc", "-std=c99", "-xc"), ("c++", "g++", "-std=c++11", "-xc++")], ids=["c99", "c++"]
)
def test_header_alone(command: tuple[str, str, str, str]) -> None:
    compiler = find(*command[:2])
    if compiler is None:
        pytest.skip(f"no {command[0]}")
    succeed(compiler, *command[2:], "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", HEADER)


def test_installed(tmp_path: Path, plain: Path) -> None:
    """The example, built against an installed library by its Makefile and by CMake."""
    cmake, make = find("cmake"), find("make")
    prefix = tmp_path / "prefix"
    succeed(cmake or "", "--install", build().parents[1], "--prefix", prefix, "--component", "bitstrata")
    (pc,) = prefix.rglob("bitstrata.pc")
    assert "-lbitstrata" in pc.read_text()
    assert [path.name for path in (prefix / "include").iterdir()] == ["bitstrata.h"]
    image = tmp_path / "image.raw"
    image.write_bytes(images(plain_program(), 1).tobytes())
    expected = succeed(build() / "classify", plain, image)
    consumer = tmp_path / "consumer"
    succeed(cmake or "", "-S", EXAMPLE, "-B", consumer, f"-DCMAKE_PREFIX_PATH={prefix}")
    succeed(cmake or "", "--build", consumer)
    assert succeed(consumer / "classify", plain, image) == expected
    if make is None:
        pytest.skip("no make")
    succeed(make, "-C", EXAMPLE, f"PREFIX={prefix}", f"OUT={tmp_path}")
    assert succeed(tmp_path / "classify", plain, image) == expected


# The example program


def assert_as_session(printed: str, path: Path, x: np.ndarray[Any, Any]) -> None:
    """Every precision ascending and the first again, the integers being the session's."""
    rows = re.findall(r"precision (\d+): class (\d+), logit \S+, integers (.*)", printed)
    session = load(path, executor="reference")
    precisions = session.program.precisions
    assert [int(row[0]) for row in rows] == [*precisions, precisions[0]]
    for precision, best, integers in rows:
        session.set_precision(int(precision))
        (expected,) = session.run_raw(x, floats=x.dtype == np.float32)
        assert list(map(int, integers.split())) == expected.reshape(-1).tolist()
        assert int(best) == expected.argmax()


@pytest.mark.parametrize("name", PROGRAMS)
def test_example(name: str, tmp_path: Path) -> None:
    program = PROGRAMS[name]()
    path, raw = tmp_path / "net.strata", tmp_path / "image.raw"
    write(program, path)
    x = images(program, 1)
    raw.write_bytes(x.tobytes())
    assert_as_session(succeed(build() / "classify", path, raw), path, x)


def test_example_on_a_picture(plain: Path, tmp_path: Path) -> None:
    x = images(plain_program(), 1)
    picture = tmp_path / "image.ppm"
    picture.write_bytes(b"P6\n# made by hand\n6 6\n255\n" + x[0].transpose(1, 2, 0).tobytes())
    assert_as_session(succeed(build() / "classify", plain, picture), plain, x)
    picture.write_bytes(b"P6\n6 5\n255\n" + x[0].transpose(1, 2, 0).tobytes()[:90])
    refused = run(build() / "classify", plain, picture)
    assert refused.returncode == 1
    assert "not an image of the network's size" in refused.stderr


def test_example_adds_planes_that_arrive_later(plain: Path, tmp_path: Path) -> None:
    device, raw = tmp_path / "device.strata", tmp_path / "image.raw"
    device.mkdir()
    for name in ("manifest.json", "base.safetensors", "resident.safetensors", "factors-1.safetensors"):
        shutil.copy(plain / name, device)
    x = images(plain_program(), 1)
    raw.write_bytes(x.tobytes())
    printed = succeed(build() / "classify", device, raw, plain)
    assert_as_session(printed, plain, x)
    added = re.findall(r"added (\S+),", printed)
    assert added == [f"{kind}-{b}.safetensors" for b in (2, 3, 4) for kind in ("stratum", "factors")]
    alone = run(build() / "classify", device, raw)
    assert alone.returncode == 1
    assert "BS_UNREADABLE: bs_session_upgrade: stratum-2.safetensors" in alone.stderr


def test_the_page_shows_the_example() -> None:
    code = (EXAMPLE / "classify.c").read_text()
    shown = re.findall(r"```c\n(.*?)```", (ROOT / "docs" / "c-api.md").read_text(), flags=re.DOTALL)
    assert len(shown) > 5
    for block in shown:
        assert block in code


# Bad input


def bad_input(folder: Path, sanitize: bool) -> str:
    good, truncated, newer = (folder / f"{name}.strata" for name in ("good", "truncated", "newer"))
    write(plain_program(), good)
    shutil.copytree(good, truncated)
    last = truncated / "stratum-4.safetensors"
    last.write_bytes(last.read_bytes()[:-3])
    shutil.copytree(good, newer)
    (newer / "manifest.json").write_bytes(seal({**manifest_of(files_of(good)), "version": 2}))
    pixels = int(np.prod(plain_program().input_shape))
    return succeed(build(sanitize) / "capi_test", good, truncated, newer, str(pixels), "10")


def test_bad_input(tmp_path: Path) -> None:
    printed = bad_input(tmp_path, sanitize=False).split("\n")
    assert "ok" in printed
    if os.confstr("CS_GNU_LIBC_VERSION"):
        assert "allocations counted" in printed


def test_bad_input_with_sanitizers(tmp_path: Path) -> None:
    assert "ok" in bad_input(tmp_path, sanitize=True).split("\n")


# Equality with Session


def assert_equal_runs(found: CSession, expected: Session, x: np.ndarray[Any, Any]) -> None:
    logits, integers = found.run(x)
    floats = x.dtype == np.float32
    np.testing.assert_array_equal(integers, expected.run_raw(x, floats=floats))
    np.testing.assert_array_equal(logits, expected.run(x, floats=floats))


def out_shape(program: Program, expected: Session) -> tuple[int, ...]:
    return expected.run_raw(images(program, 1), floats=program.input_kind == "codes").shape[1:]


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / f"{number}.strata" for number in itertools.count())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_programs(folders: Iterator[Path], data: st.DataObject) -> None:
    """Any choice, and a change to any other; one image or many; every instruction set; one thread or two."""
    program = data.draw(programs())
    path = next(folders)
    write(program, path)
    layers, first, then = list(program.layers), data.draw(choices(program)), data.draw(choices(program))
    expected = Session.from_program(program, first, executor="reference")
    artifact = capi().open(path)
    isa, threads = data.draw(st.sampled_from(available_isas())), data.draw(st.sampled_from([1, 2]))
    session = CSession(artifact, choice_of(first, layers), out_shape(program, expected), threads=threads, isa=isa)
    capi().library.bs_artifact_free(artifact)
    x = images(program, data.draw(st.sampled_from([1, 2, 5])))
    assert_equal_runs(session, expected, x)
    expected.set_precision(then)
    session.change("bs_session_set", choice_of(then, layers))
    assert_equal_runs(session, expected, x)
    if program.input_kind == "pixels":
        assert_equal_runs(session, expected, (x / np.float32(255)).astype(np.float32))
    session.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_large_batches(threads: int, plain: Path) -> None:
    program = plain_program()
    expected = load(plain, 2, executor="reference")
    artifact = capi().open(plain)
    session = CSession(artifact, choice_of(2, list(program.layers)), (10,), threads=threads)
    for count in (1, 63, 200):
        assert_equal_runs(session, expected, images(program, count, seed=count))
    session.close()
    capi().library.bs_artifact_free(artifact)


def test_files_in_memory_and_functions(plain: Path) -> None:
    """Both other ways to open; each file is asked for once, and only what is needed."""
    program, x, asked = plain_program(), images(plain_program(), 2), []
    files = files_of(plain)
    table = (File * len(files))(
        *(File(name.encode(), ctypes.cast(data, ctypes.c_void_p), len(data)) for name, data in files.items())
    )
    in_memory = ctypes.c_void_p()
    capi().call("bs_artifact_open_files", table, ctypes.c_size_t(len(files)), ctypes.byref(in_memory))

    @SIZE
    def size(_: object, name: bytes, found: Any) -> int:
        asked.append(name.decode())
        found[0] = len(files.get(name.decode(), b""))
        return int(name.decode() not in files)

    @READ
    def read(_: object, name: bytes, data: int, count: int) -> int:
        ctypes.memmove(data, files[name.decode()], count)
        return 0

    source, by_functions = CallbackSource(ctypes.sizeof(CallbackSource), None, size, read, None), ctypes.c_void_p()
    capi().call("bs_artifact_open_source", ctypes.byref(source), ctypes.byref(by_functions))
    assert asked == ["manifest.json"]
    expected = load(plain, 2, executor="reference")
    for artifact in (in_memory, by_functions):
        session = CSession(artifact, choice_of(2, list(program.layers)), (10,))
        assert_equal_runs(session, expected, x)
        session.change("bs_session_upgrade", choice_of(3, list(program.layers)))
        session.close()
    assert sorted(asked) == sorted(set(asked))
    assert {"stratum-4.safetensors", "factors-1.safetensors", "factors-4.safetensors"}.isdisjoint(asked)
    del files["stratum-4.safetensors"]
    with pytest.raises(CError, match=r"BS_UNREADABLE.*stratum-4\.safetensors"):
        CSession(by_functions, choice_of(4, list(program.layers)), (10,))
    for artifact in (in_memory, by_functions):
        capi().library.bs_artifact_free(artifact)


def test_what_cannot_be_derived(tmp_path: Path) -> None:
    program = residual_program()
    program.factors["8"].affine["stem.scale"][0, 0] = 1e9
    path = tmp_path / "net.strata"
    write(program, path)
    artifact = capi().open(path)
    with pytest.raises(CError, match=r"BS_NOT_DERIVABLE.*node 'stream' \(rescale\): values up to"):
        CSession(artifact, choice_of(8, list(program.layers)), (4,))
    capi().library.bs_artifact_free(artifact)
