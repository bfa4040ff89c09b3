"""The engine cross-built for 64-bit ARM, its tests run by an emulated processor with and without dot products."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_graph_file import write_graph_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.random_programs import choices, input_codes, programs

from bitstrata_runtime import derive

pytestmark = pytest.mark.native

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "aarch64"
CHECKS = list(HealthCheck)  # none of them matters where nothing is searched for
SYSROOT = "/usr/aarch64-linux-gnu"
ROWS = {"cortex-a53": ["generic", "neon"], "max": ["generic", "neon", "neon-dot"]}  # of the table; slowest first


def find(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def emulate(cpu: str, program: str, *arguments: str) -> str:
    return run("qemu-aarch64", "-L", SYSROOT, "-cpu", cpu, str(BUILD / program), *arguments)


@pytest.fixture(scope="module")
def built() -> None:
    """Programs of the engine's tests, in a folder that is kept, so that a later run builds only what changed."""
    for tool, package in (
        ("aarch64-linux-gnu-g++", "Debian's g++-aarch64-linux-gnu"),
        ("qemu-aarch64", "Debian's qemu-user"),
        ("cmake", "cmake"),
    ):
        if find(tool) is None:
            pytest.skip(f"no {tool} ({package}): the kernels for 64-bit ARM are not tested")
    options = ["-DBITSTRATA_PYTHON=OFF", "-DBITSTRATA_ENGINE_TESTS=ON", "-DCMAKE_CXX_FLAGS=-Werror"]
    cmake, toolchain = str(find("cmake")), ROOT / "cmake" / "aarch64-linux-gnu.cmake"
    run(cmake, "-S", str(ROOT), "-B", str(BUILD), f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", *options)
    run(cmake, "--build", str(BUILD), "--parallel", str(os.cpu_count()), "--target", "kernel_test", "graph_test")


def graph_files(folder: Path, count: int) -> list[str]:
    """Random programs, their plans' inputs and the reference executor's values, as files."""
    files: list[str] = []

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(program=programs(), data=st.data(), seed=st.integers(0, 2**32 - 1))
    def write(program: Any, data: Any, seed: int) -> None:
        plan = derive(program, data.draw(choices(program)))
        source = plan.values[plan.input]
        path = folder / f"{len(files)}.graph"
        write_graph_file(path, plan, input_codes(program, source.lo, source.hi, 3, seed))
        files.append(str(path))

    write()
    return files


def rows_of(output: str) -> list[str]:
    return [line.split(":")[0] for line in output.splitlines() if line.endswith("ok") and not line.startswith("amx")]


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("cpu", ROWS)
def test_graphs(cpu: str, tmp_path: Path) -> None:
    """Every row that the processor has, and no other, computes the reference's integers."""
    files = graph_files(tmp_path, 40)
    assert len(files) >= 40
    assert rows_of(emulate(cpu, "graph_test", "60", *files)) == ROWS[cpu]


@pytest.mark.usefixtures("built")
def test_kernels() -> None:
    assert rows_of(emulate("max", "kernel_test", "neon", "neon-dot")) == ["neon", "neon-dot"]


@pytest.mark.usefixtures("built")
def test_a_row_that_the_processor_lacks() -> None:
    command = ("qemu-aarch64", "-L", SYSROOT, "-cpu", "cortex-a53", str(BUILD / "kernel_test"), "neon-dot")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode != 0
    assert "isa=neon-dot: this processor or its operating system does not support it" in done.stderr


@pytest.mark.usefixtures("built")
def test_a_wrong_integer_is_found(tmp_path: Path) -> None:
    """The comparison with the reference's files is real: a file with one value changed fails."""
    (file,) = graph_files(tmp_path, 1)[:1]
    numbers = np.fromfile(file, "<i8")
    numbers[-1] += 1
    numbers.tofile(file)
    command = ("qemu-aarch64", "-L", SYSROOT, str(BUILD / "graph_test"), "0", file)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 1
    assert f"expected {numbers[-1]}" in done.stderr


@pytest.mark.soak
@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("cpu", ROWS)
def test_everything(cpu: str, tmp_path: Path) -> None:
    assert rows_of(emulate(cpu, "kernel_test")) == ROWS[cpu]
    assert rows_of(emulate(cpu, "graph_test", "1000", *graph_files(tmp_path, 300))) == ROWS[cpu]
