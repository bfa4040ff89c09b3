"""The native reader of artifacts under a fuzzer, whose inputs grow from small artifacts."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_artifact import Files, files_of
from helpers_native import SANITIZE, build, compiler_for, run
from helpers_programs import chain_program, conv, fill, layer, plain_program, pool, rescale, residual_program

from bitstrata_runtime.artifact import write
from bitstrata_runtime.program import AffineInfo, Node, Program

pytestmark = pytest.mark.native


def moving_program() -> Program:
    """Slices of codes and of fixed point, sums of codes, padding, clipping and an addition, around one layer."""
    cut = {"c": [0, 2, 1], "h": [0, 4, 2], "w": [1, 4, 1]}
    nodes = (
        Node("x", "input"),
        Node("cut", "slice", ("x",), cut),
        pool("sums", "avgpool", "cut", 2, 1),
        conv("acc", "sums", "only"),
        rescale("y", "acc", "only.bn"),
        Node("wide", "pad", ("y",), {"c": [1, 0], "h": [0, 1], "w": [1, 1]}),
        Node("bounded", "clip", ("wide",), {"clip": [-1.5, None]}),
        Node("sum", "add", ("bounded", "wide")),
        Node("part", "slice", ("sum",), {"c": [1, 4, 1], "h": [0, 1, 1], "w": [0, 3, 2]}),
    )
    program = Program(
        input_shape=(2, 4, 4),
        input_kind="codes",
        nodes=nodes,
        output="part",
        layers={"only": layer("only", (3, 2, 1, 1), precisions=(1, 2))},
        affines={"only.bn": AffineInfo("only", 3)},
        precisions=(1, 2),
        weights={},
        factors={},
        plans={"same": {"only": 2}},
    )
    return fill(program, 4)


FUZZER = "-fsanitize=fuzzer"
ENTRY = '#include <cstddef>\nextern "C" int LLVMFuzzerTestOneInput(const unsigned char*, size_t) { return 0; }\n'
SEEDS: dict[str, Callable[[], Program]] = {
    "plain": plain_program,
    "residual": residual_program,
    "chain": lambda: chain_program([3, 5, 2], [3, 8], (1, 3), resident=False),
    "moving": moving_program,
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
