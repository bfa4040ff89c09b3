"""Building and running the project's native test programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SANITIZE = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
SANITIZE_THREADS = "-O1 -g -fsanitize=thread"
_PROGRAM = "#include <thread>\nint main() { int x = 1; std::thread([&] { x = 0; }).join(); return x; }\n"


def find(tool: str) -> str | None:
    """Path of a program, which may be one of the Python environment's; None if there is none."""
    return shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and keep what it prints."""
    # Kernels take minutes to build with sanitizers, several times that where other tests have the processor too.
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, **options)  # type: ignore[call-overload,no-any-return]


def compiler_for(names: tuple[str | None, ...], flags: str, folder: Path, source: str) -> str | None:
    """The first of the compilers `names` that compiles and links `source` with `flags`, tried in `folder`."""
    (folder / "probe.cc").write_text(source)
    for name in names:
        path = find(name) if name else None
        if path and run(path, *flags.split(), str(folder / "probe.cc"), "-o", str(folder / "probe")).returncode == 0:
            return path
    return None


def sanitizing_compiler(folder: Path, flags: str = SANITIZE) -> str:
    """A C++ compiler whose programs run with the sanitizers of `flags`; without one, the test is skipped."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    found = compiler_for(names, f"{flags} -pthread", folder, _PROGRAM)
    if found is None or run(str(folder / "probe")).returncode != 0:
        pytest.skip(f"no C++ compiler whose programs run with {flags}")
    return found


def build(target: str, folder: Path, compiler: str, *options: str, flags: str = SANITIZE) -> Path:
    """Build one target of the project in `folder`, warnings being errors; returns the program's path."""
    cmake = find("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    configure = ["-DBITSTRATA_PYTHON=OFF", "-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_CXX_COMPILER={compiler}", *options]
    for command in (
        (cmake, "-S", str(ROOT), "-B", str(folder), *configure, f"-DCMAKE_CXX_FLAGS={flags} -Werror"),
        (cmake, "--build", str(folder), "--parallel", "2", "--target", target),
    ):
        result = run(*command)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder / target
