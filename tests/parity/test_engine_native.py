"""The engine's own tests, built with sanitizers: their buffers touch unmapped pages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"


def find(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A C++ compiler that can link both sanitizers."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cc").write_text("int main() { return 0; }\n")
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = find(name) if name else None
        if path and run(path, *SANITIZE.split(), str(folder / "probe.cc"), "-o", str(folder / "probe")).returncode == 0:
            return path
    pytest.skip("no C++ compiler with the address and undefined-behaviour sanitizers")


def test_kernels_and_graphs_on_guarded_buffers(compiler: str, tmp_path: Path) -> None:
    cmake = find("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    options = ["-DBITSTRATA_PYTHON=OFF", "-DBITSTRATA_ENGINE_TESTS=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    flags = [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_CXX_FLAGS={SANITIZE} -Werror"]
    for command in (
        (cmake, "-S", str(ROOT), "-B", str(tmp_path), *options, *flags),
        (cmake, "--build", str(tmp_path), "--parallel", "2"),
        (str(tmp_path / "graph_test"), "60"),
        (str(tmp_path / "kernel_test"),),
    ):
        result = run(*command)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "generic: ok" in result.stdout
    assert "amx-emulated: ok" in result.stdout
