"""The engine's own kernel test, built with sanitizers: its buffers touch unmapped pages."""

from __future__ import annotations

from pathlib import Path

from helpers_native import build, run, sanitizing_compiler


def test_kernels_on_guarded_buffers(tmp_path: Path) -> None:
    program = build("kernel_test", tmp_path, sanitizing_compiler(tmp_path), "-DBITSTRATA_ENGINE_TESTS=ON")
    result = run(str(program))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "generic: ok" in result.stdout
    assert "amx-emulated: ok" in result.stdout
