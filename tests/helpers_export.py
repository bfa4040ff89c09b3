"""Exported C, compiled by the machine's own compiler and by the one for Arm, and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
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


# Arm

BOARDS = {"cortex-m4": "mps2-an386", "cortex-m7": "mps2-an500"}  # qemu's machines
ARM = ["-mthumb", "-mfloat-abi=soft", "-O2", "-ffunction-sections", "-fdata-sections", "-fstack-usage"]
INSTRUCTIONS_A_TICK = 40  # with -icount shift=0 an instruction takes 1 ns, and the board's timer runs at 25 MHz
SOFT_FLOAT = re.compile(r"__aeabi_(f|d|i2f|i2d|ui2f|ui2d|l2f|l2d|ul2f|ul2d|cf|cd)|__\w+[sd]f\d?$")
ALLOCATION = re.compile(r"\b_*(malloc|calloc|realloc|free|sbrk)(_r)?$")


@dataclass(frozen=True)
class BoardRun:
    """outputs: (N, H, W, C). Bytes: flash (code and constants), ram (static), stack (touched by the runs)."""

    outputs: NDArray[np.int32]
    flash: int
    flash_code: int
    ram: int
    stack: int
    instructions: int  # of the last run


def missing_arm_tools() -> list[str]:
    """What is needed for Arm and not installed."""
    needed = ("arm-none-eabi-gcc", "arm-none-eabi-nm", "qemu-system-arm")
    return [tool for tool in needed if shutil.which(tool) is None]


def run_on_board(folder: Path, codes: NDArray[Any], shape: tuple[int, ...], cpu: str) -> BoardRun:
    """Build the network exported to `folder` for a processor, and run it in qemu on inputs (N, H, W, C)."""
    ctype = "uint8_t" if codes.dtype == np.uint8 else "int8_t"
    values = ", ".join(map(str, codes.reshape(-1).tolist()))
    (folder / "vectors.h").write_text(
        f"enum {{ COUNT = {len(codes)} }};\nstatic const {ctype} inputs[] = {{{values}}};\n"
    )
    flags = [f"-mcpu={cpu}", *ARM, "-I."]
    for source in ("model.c", RUNTIME):
        run("arm-none-eabi-gcc", *STRICT, *flags, "-c", source, folder=folder)
    run("arm-none-eabi-gcc", *STRICT, *flags, "-c", FOLDER / "board.c", folder=folder)
    script = f"-Wl,-T,{FOLDER / 'mps2.ld'},--gc-sections,-Map=board.map"
    objects = ("model.o", "bitstrata_mcu.o", "board.o")
    run(
        "arm-none-eabi-gcc",
        *flags,
        "-nostartfiles",
        "-specs=nano.specs",
        script,
        *objects,
        "-o",
        "board.elf",
        folder=folder,
    )
    machine = ("-M", BOARDS[cpu], "-nographic", "-semihosting", "-icount", "shift=0", "-kernel", "board.elf")
    command = ["qemu-system-arm", *machine]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    lines = [line.split() for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    said = {key: [int(word, 16) for word in words] for key, *words in lines if key in ("ticks", "stack")}
    outputs = [[int(word, 16) for word in words] for key, *words in lines if key == "out"]
    assert len(outputs) == len(codes), f"{cpu}: {result.stdout[-500:]}{result.stderr[-500:]}"
    code, constants, ram = map_sizes((folder / "board.map").read_text())
    return BoardRun(
        outputs=np.array(outputs, np.uint32).astype(np.int32).reshape(len(codes), *shape),
        flash=code + constants,
        flash_code=code,
        ram=ram,
        stack=said["stack"][0],
        instructions=said["ticks"][0] * INSTRUCTIONS_A_TICK,
    )


def map_sizes(text: str) -> tuple[int, int, int]:
    """Bytes of code, constants and static memory in a linker map: of all that is linked but the board's own file."""
    text = text[text.index("Linker script and memory map") :]
    sizes = {"text": 0, "rodata": 0, "bss": 0, "data": 0}
    for match in re.finditer(
        r"^ \.(text|rodata|bss|data)\S*\s+0x[0-9a-f]+\s+(0x[0-9a-f]+)\s+(\S+)$", text, re.MULTILINE
    ):
        if not match[3].endswith("board.o"):
            sizes[match[1]] += int(match[2], 16)
    return sizes["text"], sizes["rodata"] + sizes["data"], sizes["bss"] + sizes["data"]
