"""The native reader of artifacts under a fuzzer, whose inputs grow from small artifacts."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_artifact import Files, files_of
from helpers_native import SANITIZE, build, compiler_for, run
from helpers_programs import chain_program, plain_program, residual_program

from bitstrata_runtime.artifact import write
from bitstrata_runtime.program import Program

FUZZER = "-fsanitize=fuzzer"
ENTRY = '#include <cstddef>\nextern "C" int LLVMFuzzerTestOneInput(const unsigned char*, size_t) { return 0; }\n'
SEEDS: dict[str, Callable[[], Program]] = {
    "plain": plain_program,
    "residual": residual_program,
    "chain": lambda: chain_program([3, 5, 2], [3, 8], (1, 3), resident=False),
    "tiny": lambda: chain_program([1, 1], [1], (1,), resident=False),
}


def packed(files: Files, options: int) -> bytes:
    """An artifact as an input of the fuzzer; see fuzz_artifact.cc."""
    parts = [bytes([options])]
    for name, data in files.items():
        parts += [bytes([len(name)]), name.encode(), struct.pack("<I", len(data)), data]
    return b"".join(parts)


def write_corpus(folder: Path) -> None:
    """Each seed as it is, and to be mended after each mutation, in several orders of loading."""
    folder.mkdir()
    for name, make in SEEDS.items():
        write(make(), folder.parent / f"{name}.strata")
        files = files_of(folder.parent / f"{name}.strata")
        for options in (0, 1, 7, 13):
            (folder / f"{name}-{options}").write_bytes(packed(files, options))


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    names = (os.environ.get("CXX"), "clang++", *(f"clang++-{version}" for version in range(22, 10, -1)))
    compiler = compiler_for(names, f"{SANITIZE} {FUZZER}", folder, ENTRY)
    if compiler is None:
        pytest.skip("no clang++ with the runtimes of libFuzzer and of the address and undefined-behaviour sanitizers")
    return build("fuzz_artifact", folder, compiler, "-DBITSTRATA_FUZZ=ON")


def fuzz(fuzzer: Path, folder: Path, *options: str) -> int:
    """Run the fuzzer from the seeds; returns how many inputs it tried. Whatever it finds is a failure."""
    write_corpus(folder / "corpus")
    limits = ("-max_len=32768", "-timeout=20", "-rss_limit_mb=2048", f"-artifact_prefix={folder}/")
    result = run(str(fuzzer), *limits, "-print_final_stats=1", *options, str(folder / "corpus"))
    assert result.returncode == 0, result.stderr[-8000:]
    found = [line for line in result.stderr.splitlines() if line.startswith("stat::number_of_executed_units:")]
    return int(found[0].split()[-1])


def test_a_few_thousand_inputs(fuzzer: Path, tmp_path: Path) -> None:
    assert fuzz(fuzzer, tmp_path, "-seed=1", "-runs=4000") >= 4000


@pytest.mark.soak
def test_minutes_of_inputs(fuzzer: Path, tmp_path: Path) -> None:
    assert fuzz(fuzzer, tmp_path, "-max_total_time=480") > 20000
