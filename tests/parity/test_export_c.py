"""Exported C gives the reference executor's integers: compiled here, with sanitizers, and for Cortex-M in qemu."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from helpers_export import (
    ALLOCATION,
    BOARDS,
    RUNTIME,
    SANITIZE,
    SOFT_FLOAT,
    STRICT,
    Native,
    c_compiler,
    links,
    missing_arm_tools,
    run,
    run_on_board,
)
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from property.random_programs import choices, input_codes, programs

import bitstrata as bs
from bitstrata.export import export_c
from bitstrata_runtime import derive
from bitstrata_runtime.reference import OracleExecutor

SHAPES = {"resnet20": (3, 32, 32), "mobilenet_v2": (3, 32, 32), "digits_cnn": (1, 8, 8), "digits_resnet": (1, 8, 8)}
OPTIONS = {"mobilenet_v2": {"stem": "cifar", "width": 0.25}}
BITS = (1, 2, 3, 4, 8)


@pytest.fixture(scope="module")
def compiler():
    found = c_compiler()
    if found is None:
        pytest.skip("no C compiler (cc, gcc or clang)")
    return found


@pytest.fixture(scope="module")
def native(compiler, tmp_path_factory):
    """With the sanitizers that the compiler has."""
    folder = tmp_path_factory.mktemp("native")
    flags = ["-O1", *SANITIZE]
    return Native(compiler, flags if links(compiler, flags, folder) else ["-O1"], folder)


@pytest.fixture(scope="module")
def program_of():
    """Random weights, with statistics of random images."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            channels = SHAPES[name][0]
            example = torch.randn(4, *SHAPES[name])
            model = bs.zoo.create(name, 10, **({} if channels == 3 else {"in_channels": 1}), **OPTIONS.get(name, {}))
            pixels = bs.Pixels((0.5,) * channels, (0.25,) * channels)
            bs.quantize_(model, bs.recipes.strata(w=BITS), example, input=pixels)
            bs.calibrate_(model, [example])
            made[name] = bs.lower(model.eval(), example[:1])
        return made[name]

    return make


def codes_of(plan, count, number=0):
    value = plan.values[plan.input]
    dtype = np.uint8 if value.dtype == "u8" else np.int8
    return np.random.default_rng(number).integers(value.lo, value.hi + 1, (count, *value.shape)).astype(dtype)


def mixed(program):
    """Every layer at another precision than the one before it."""
    return {name: program.precisions[i % len(program.precisions)] for i, name in enumerate(program.layers)}


# On this machine


@pytest.mark.filterwarnings("ignore:.*fraction bits")
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_networks(native, program_of, name):
    program = program_of(name)
    for choice in BITS if name == "digits_resnet" else (1, 3, mixed(program)):
        plan = derive(program, choice)
        native.check(plan, codes_of(plan, 2))


@pytest.mark.filterwarnings("ignore:.*fraction bits")
def test_networks_without_sanitizers(compiler, program_of, tmp_path):
    optimized = Native(compiler, ["-O3"], tmp_path)
    for choice in (1, 2, 8):
        plan = derive(program_of("digits_resnet"), choice)
        optimized.check(plan, codes_of(plan, 3))


def check_random(native, count, number):
    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data):
        program = data.draw(programs(blocks=4))
        plan = derive(program, data.draw(choices(program)))
        value = plan.values[plan.input]
        native.check(plan, input_codes(program, value.lo, value.hi, 5, data.draw(st.integers(0, 2**32 - 1))))

    check()


def test_random_programs(native):
    check_random(native, 20, 1)


@pytest.mark.soak
def test_many_random_programs(native):
    check_random(native, 1000, 2)


def test_no_allocation_and_no_floats(compiler, program_of, tmp_path):
    """No symbol of an allocator; and the code compiles where floating-point registers may not be used."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    export_c(derive(program_of("digits_resnet"), 2), tmp_path)
    probe = subprocess.run(
        [compiler, "-mgeneral-regs-only", "-E", "-x", "c", "/dev/null"], capture_output=True, check=False
    )
    flags = ["-mgeneral-regs-only"] if probe.returncode == 0 else []
    for source in ("model.c", RUNTIME):
        run(compiler, *STRICT, "-O2", *flags, "-c", source, folder=tmp_path)
    symbols = run("nm", "-u", "model.o", "bitstrata_mcu.o", folder=tmp_path).decode().split()
    assert not [name for name in symbols if ALLOCATION.search(name) or SOFT_FLOAT.search(name)]
    allowed = {"U", "model.o:", "bitstrata_mcu.o:", "memcpy", "memset", "memmove", "_GLOBAL_OFFSET_TABLE_"}
    assert {name for name in symbols if not name.startswith(("bs_", "__stack_chk"))} <= allowed
    for source in ("model.c", "model.h", RUNTIME, "bitstrata_mcu.h"):
        code = re.sub(r"/\*.*?\*/", "", (tmp_path / source).read_text(), flags=re.DOTALL)
        assert not re.search(r"\b(float|double|malloc)\b", code)
        includes = set(re.findall(r"#include <(.*)>", code))
        assert includes <= {"stdint.h", "string.h", "arm_acle.h"}


def test_main_tells_whether_the_output_is_as_expected(compiler, program_of, tmp_path):
    plan = derive(program_of("digits_cnn"), 2)
    export_c(plan, tmp_path, name="digits", vector=codes_of(plan, 1)[0])
    files = sorted(path.name for path in tmp_path.glob("*.c"))
    assert files == ["bitstrata_mcu.c", "digits.c", "main.c"]
    run(compiler, *STRICT, *files, "-o", "demo", folder=tmp_path)
    expected = OracleExecutor(plan).run(codes_of(plan, 1)).reshape(-1)
    lines = run(tmp_path / "demo").decode().splitlines()
    assert lines == [*(f"{i}: {x}" for i, x in enumerate(expected)), "all integers as expected"]
    wrong = (tmp_path / "main.c").read_text().replace(f" {expected[0]},", f" {expected[0] + 1},", 1)
    (tmp_path / "main.c").write_text(wrong)
    run(compiler, *STRICT, *files, "-o", "demo", folder=tmp_path)
    result = subprocess.run([tmp_path / "demo"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "1 integers differ" in result.stdout


# On Cortex-M


@pytest.mark.filterwarnings("ignore:.*fraction bits")
@pytest.mark.parametrize("cpu", sorted(BOARDS))
def test_boards(program_of, tmp_path, cpu):
    missing = missing_arm_tools()
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    cases = [("resnet20", 2), ("mobilenet_v2", 4), *(("digits_resnet", bits) for bits in (1, 3, 8))]
    for name, bits in cases:
        plan = derive(program_of(name), bits)
        codes = codes_of(plan, 1 if name != "digits_resnet" else 3)
        folder = tmp_path / f"{name}{bits}"
        made = export_c(plan, folder)
        result = run_on_board(folder, codes, plan.values[plan.output].shape, cpu)
        np.testing.assert_array_equal(result.outputs, OracleExecutor(plan).run(codes), err_msg=f"{name} {bits}")
        symbols = run("arm-none-eabi-nm", "board.elf", folder=folder).decode().split()
        assert not [symbol for symbol in symbols if ALLOCATION.search(symbol) or SOFT_FLOAT.search(symbol)]
        assert made.arena_bytes <= result.ram <= made.arena_bytes + 64
        assert made.table_bytes < result.flash
        assert 0 < result.stack < 1024
        assert result.instructions > 0
