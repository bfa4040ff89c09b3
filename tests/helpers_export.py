"""Exported C, compiled by the machine's own compiler and by the one for Arm, and run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitstrata.export import export_c
from bitstrata_runtime import Plan
from bitstrata_runtime.reference import DTYPES, OracleExecutor

FOLDER = Path(__file__).parent / "mcu"
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-Wconversion"]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
RUNTIME = "bitstrata_mcu.c"


def run(*command: str | Path, folder: Path | None = None, feed: bytes = b"") -> bytes:
    """Standard output; AssertionError with what was said on failure."""
    result = subprocess.run(command, cwd=folder, input=feed, capture_output=True, check=False, timeout=600)
    said = (result.stdout[-2000:] + result.stderr[-4000:]).decode(errors="replace")
    assert result.returncode == 0, f"{' '.join(map(str, command))}: {said}"
    return result.stdout


def c_compiler() -> str | None:
    """The machine's C compiler."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def links(compiler: str, flags: list[str], folder: Path) -> bool:
    """Whether the compiler can make a program with these flags."""
    (folder / "probe.c").write_text("int main(void) { return 0; }\n")
    command = [compiler, *flags, "probe.c", "-o", "probe"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0


class Native:
    """Compiles exported networks; the runtime, which is the same for all, once."""

    def __init__(self, compiler: str, flags: list[str], folder: Path) -> None:
        self.compiler, self.flags, self.folder = compiler, flags, folder
        self.count = 0
        self.runtime: Path | None = None

    def build(self, plan: Plan) -> Path:
        """The folder of the exported plan, with the program `native` in it."""
        folder = self.folder / str(self.count)
        self.count += 1
        export_c(plan, folder)
        if self.runtime is None:
            self.runtime = self.folder / "bitstrata_mcu.o"
            run(self.compiler, *STRICT, *self.flags, "-c", RUNTIME, "-o", self.runtime, folder=folder)
        sources = ("model.c", FOLDER / "native.c")
        run(self.compiler, *STRICT, *self.flags, "-I.", *sources, self.runtime, "-o", "native", folder=folder)
        return folder

    def outputs(self, plan: Plan, codes: NDArray[Any]) -> NDArray[np.int32]:
        """The integers for codes (N, H, W, C)."""
        assert codes.dtype == DTYPES[plan.values[plan.input].dtype]
        folder = self.build(plan)
        found = run(folder / "native", feed=np.ascontiguousarray(codes).tobytes())
        return np.frombuffer(found, np.int32).reshape(len(codes), *plan.values[plan.output].shape)

    def check(self, plan: Plan, codes: NDArray[Any]) -> None:
        """The exported network gives the reference's integers."""
        np.testing.assert_array_equal(self.outputs(plan, codes), OracleExecutor(plan).run(codes))
