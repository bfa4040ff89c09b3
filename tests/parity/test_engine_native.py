"""The engine's own tests, built with sanitizers: kernels and whole graphs, on buffers that touch unmapped pages."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_native import SANITIZE_THREADS, build, run, sanitizing_compiler

pytestmark = pytest.mark.native
TESTS = "-DBITSTRATA_ENGINE_TESTS=ON"


def test_kernels_and_graphs_on_guarded_buffers(tmp_path: Path) -> None:
    compiler = sanitizing_compiler(tmp_path)
    for test in ("kernel_test", "memory_test"):
        result = run(str(build(test, tmp_path, compiler, TESTS)))
        assert result.returncode == 0, result.stdout + result.stderr
        assert "generic: ok" in result.stdout
        assert "amx-emulated: ok" in result.stdout


def test_callers_of_one_graph_with_the_thread_sanitizer(tmp_path: Path) -> None:
    compiler = sanitizing_compiler(tmp_path, SANITIZE_THREADS)
    program = build("callers_test", tmp_path, compiler, TESTS, flags=SANITIZE_THREADS)
    result = run(str(program), "12", "generic")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "generic: ok" in result.stdout
    assert "WARNING: ThreadSanitizer" not in result.stderr
