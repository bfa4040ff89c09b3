"""The engine's own tests, built with sanitizers: kernels and whole graphs, on buffers that touch unmapped pages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZERS = {
    "addresses and undefined behaviour": ("address,undefined", ("kernel_test", "graph_test")),
    "threads": ("thread", ("graph_test",)),  # the kernels' test has one thread
}


def find(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)


def flags_of(sanitize: str) -> str:
    return f"-O1 -g -fsanitize={sanitize} -fno-sanitize-recover=all"


def compiler(sanitize: str, folder: Path) -> str:
    """A C++ compiler that can link the sanitizers, and whose programs then run."""
    (folder / "probe.cc").write_text(
        "#include <thread>\nint main() { int x = 1; std::thread([&] { x = 0; }).join(); return x; }\n"
    )
    probe = str(folder / "probe")
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = find(name) if name else None
        if path is None:
            continue
        built = run(path, *flags_of(sanitize).split(), "-pthread", str(folder / "probe.cc"), "-o", probe)
        if built.returncode == 0 and run(probe).returncode == 0:
            return path
    pytest.skip(f"no C++ compiler whose programs run with -fsanitize={sanitize}")


@pytest.mark.parametrize("kind", SANITIZERS)
def test_native_tests_with_sanitizers(kind: str, tmp_path: Path) -> None:
    sanitize, tests = SANITIZERS[kind]
    path, cmake = compiler(sanitize, tmp_path), find("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    build = str(tmp_path / "build")
    options = ["-DBITSTRATA_PYTHON=OFF", "-DBITSTRATA_ENGINE_TESTS=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    flags = [f"-DCMAKE_CXX_COMPILER={path}", f"-DCMAKE_CXX_FLAGS={flags_of(sanitize)} -Werror"]
    for command in (
        (cmake, "-S", str(ROOT), "-B", build, *options, *flags),
        (cmake, "--build", build, "--parallel", "2", "--target", *tests),
    ):
        result = run(*command)
        assert result.returncode == 0, result.stdout + result.stderr
    for test in tests:
        result = run(str(Path(build) / test))
        assert result.returncode == 0, result.stdout + result.stderr
        assert "generic: ok" in result.stdout
        assert "amx-emulated: ok" in result.stdout
