"""The engine's own kernel test, built with sanitizers: its buffers touch unmapped pages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
SANITIZE_THREADS = "-O1 -g -fsanitize=thread"


def find(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def compiler(flags: str, folder: Path, what: str) -> str:
    """A C++ compiler whose programs run with these flags; skips the test if there is none."""
    (folder / "probe.cc").write_text("int main() { return 0; }\n")
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path, probe = find(name) if name else None, str(folder / "probe")
        if (
            path
            and run(path, *flags.split(), f"{probe}.cc", "-o", probe).returncode == 0
            and run(probe).returncode == 0
        ):
            return path
    pytest.skip(f"no C++ compiler with the {what}")


def build(flags: str, what: str, folder: Path, *targets: str) -> None:
    """Build the engine's own tests with these flags."""
    cmake = find("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    options = ["-DBITSTRATA_PYTHON=OFF", "-DBITSTRATA_ENGINE_TESTS=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    options += [f"-DCMAKE_CXX_COMPILER={compiler(flags, folder, what)}", f"-DCMAKE_CXX_FLAGS={flags} -Werror"]
    for command in (
        (cmake, "-S", str(ROOT), "-B", str(folder / "build"), *options),
        (cmake, "--build", str(folder / "build"), "--parallel", "2", "--target", *targets),
    ):
        result = run(*command)
        assert result.returncode == 0, result.stdout + result.stderr


def test_kernels_on_guarded_buffers(tmp_path: Path) -> None:
    build(SANITIZE, "address and undefined-behaviour sanitizers", tmp_path, "kernel_test", "graph_test")
    for test, isas in (("kernel_test", ("generic", "amx-emulated")), ("graph_test", ("generic",))):
        result = run(str(tmp_path / "build" / test))
        assert result.returncode == 0, result.stdout + result.stderr
        for isa in isas:
            assert f"{isa}: ok" in result.stdout


def test_callers_of_one_graph_with_the_thread_sanitizer(tmp_path: Path) -> None:
    build(SANITIZE_THREADS, "thread sanitizer", tmp_path, "graph_test")
    result = run(str(tmp_path / "build" / "graph_test"), "12", "generic")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "generic: ok" in result.stdout
    assert "WARNING: ThreadSanitizer" not in result.stderr
