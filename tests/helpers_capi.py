"""The shared library with the C interface: building it, and calling it from Python."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
SANITIZE = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"


def find(*tools: str) -> str | None:
    """Path of the first of these programs that is there, perhaps in Python's own environment."""
    for tool in tools:
        path = shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))
        if path:
            return path
    return None


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=900, **options)


def succeed(*command: str | Path, **options: Any) -> str:
    """What a command prints that must end well."""
    result = run(*command, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else is at work in `folder`, which is made: test processes build there, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def build(sanitize: bool = False) -> Path:
    """Folder with the library and its test programs; kept between runs, so that only changes are compiled."""
    cmake = find("cmake")
    cc, cxx = os.environ.get("CC") or find("cc", "gcc"), os.environ.get("CXX") or find("c++", "g++")
    if not (cmake and cc and cxx):
        pytest.skip(f"the C interface needs cmake, a C and a C++ compiler; found {cmake}, {cc}, {cxx}")
    folder = ROOT / "build" / ("native-sanitized" if sanitize else "native")
    with alone(folder):
        _build(folder, cmake, cc, cxx, SANITIZE if sanitize else "")
    return folder / "engine" / "capi"


def _build(folder: Path, cmake: str, cc: str, cxx: str, flags: str) -> None:
    sanitize = bool(flags)
    if sanitize:
        (folder / "probe.cc").write_text("int main() { return 0; }\n")
        if run(cxx, *flags.split(), folder / "probe.cc", "-o", folder / "probe").returncode:
            pytest.skip(f"{cxx} has no address and undefined-behaviour sanitizers")
    options = [
        "-DBITSTRATA_PYTHON=OFF",
        "-DBITSTRATA_CAPI=ON",
        "-DBITSTRATA_ENGINE_TESTS=ON",
        f"-DCMAKE_BUILD_TYPE={'Debug' if sanitize else 'Release'}",
        f"-DCMAKE_C_COMPILER={cc}",
        f"-DCMAKE_CXX_COMPILER={cxx}",
        f"-DCMAKE_C_FLAGS={flags} -Werror",
        f"-DCMAKE_CXX_FLAGS={flags} -Werror",
    ]
    if sanitize:  # the portable kernels alone, which are built soon; the others have their own tests
        options += [f"-DCMAKE_SYSTEM_NAME={platform.system()}", "-DCMAKE_SYSTEM_PROCESSOR=any"]
    succeed(cmake, "-S", ROOT, "-B", folder, *options)
    targets = ["capi_test", "classify"] if sanitize else ["capi_test", "classify", "derive_dump"]
    succeed(cmake, "--build", folder, "--parallel", "2", "--target", *targets)


class Choice(ctypes.Structure):
    """bs_choice."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("precision", ctypes.c_int32),
        ("plan", ctypes.c_char_p),
        ("map", ctypes.POINTER(ctypes.c_int32)),
        ("map_count", ctypes.c_size_t),
    )


class Options(ctypes.Structure):
    """bs_options."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("choice", ctypes.POINTER(Choice)),
        ("isa", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
        ("callers_memory", ctypes.c_int32),
    )


class Output(ctypes.Structure):
    """bs_output."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("logits", ctypes.c_void_p),
        ("integers", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("scale", ctypes.c_double),
    )


class File(ctypes.Structure):
    """bs_file."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


SIZE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64))
READ = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64)


class CallbackSource(ctypes.Structure):
    """bs_source."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("user", ctypes.c_void_p),
        ("size", SIZE),
        ("read", READ),
        ("close", ctypes.c_void_p),
    )


class CError(Exception):
    """A status that is not BS_OK: its name, and the message."""


class CApi:
    """Calls into the library, whose statuses become CError."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(build() / "libbitstrata.so"))
        self.library.bs_last_error.restype = ctypes.c_char_p
        self.library.bs_status_name.restype = ctypes.c_char_p

    def call(self, function: str, *arguments: Any) -> None:
        status = getattr(self.library, function)(*arguments)
        if status:
            raise CError(self.library.bs_status_name(status).decode(), self.library.bs_last_error().decode())

    def open(self, path: Path) -> ctypes.c_void_p:
        artifact = ctypes.c_void_p()
        self.call("bs_artifact_open", str(path).encode(), ctypes.byref(artifact))
        return artifact


@functools.cache
def capi() -> CApi:
    return CApi()


def choice_of(precision: int | str | Mapping[str, int], layers: Sequence[str]) -> Choice:
    """A bs_choice; layers: names in the artifact's order."""
    choice = Choice(ctypes.sizeof(Choice), 0, None, None, 0)
    if isinstance(precision, Mapping):
        choice.map = (ctypes.c_int32 * len(layers))(*(precision[name] for name in layers))
        choice.map_count = len(layers)
    elif isinstance(precision, str):
        choice.plan = precision.encode()
    else:
        choice.precision = precision
    return choice


class CSession:
    """A bs_session on a bs_artifact, with the shapes of numpy."""

    def __init__(
        self,
        artifact: ctypes.c_void_p,
        choice: Choice,
        out_shape: tuple[int, ...],
        *,
        threads: int = 1,
        isa: str | None = None,
    ) -> None:
        self.out_shape = out_shape
        self.handle = ctypes.c_void_p()
        name = isa.encode() if isa else None
        options = Options(ctypes.sizeof(Options), ctypes.pointer(choice), name, threads, 0)
        capi().call("bs_session_create", artifact, ctypes.byref(options), ctypes.byref(self.handle))

    def change(self, function: str, choice: Choice) -> None:
        capi().call(function, self.handle, ctypes.byref(choice))

    def run(self, x: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Logits and integers of uint8 or float32 images (N, C, H, W)."""
        x = np.ascontiguousarray(x)
        logits = np.zeros((len(x), *self.out_shape), np.float32)
        integers = np.zeros(logits.shape, np.int32)
        output = Output(ctypes.sizeof(Output), logits.ctypes.data, integers.ctypes.data, logits.size, 0.0)
        function = {"uint8": "bs_run_u8", "float32": "bs_run_f32"}[x.dtype.name]
        arguments = (ctypes.c_void_p(x.ctypes.data), ctypes.c_size_t(x.size), ctypes.c_size_t(len(x)))
        capi().call(function, self.handle, *arguments, ctypes.byref(output), None, ctypes.c_size_t(0))
        return logits, integers

    def close(self) -> None:
        capi().library.bs_session_free(self.handle)
