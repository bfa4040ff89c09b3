"""Sessions: input and output forms, changes of precision, what is read, which executor runs."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers_programs import PRECISIONS, plain_program, residual_program

import bitstrata_runtime
from bitstrata_runtime import ArtifactError, ProgramError, Session, derive, load
from bitstrata_runtime.artifact import write
from bitstrata_runtime.reference import OracleExecutor, ReferenceExecutor

ENGINE = bool(bitstrata_runtime.available_isas())
needs_engine = pytest.mark.skipif(not ENGINE, reason="the engine is not built")


def session(program, bits=None, executor="oracle"):
    return Session.from_program(program, bits, executor=executor)


def pixels(count: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 6, 6)).astype(np.uint8)


@pytest.fixture
def path(tmp_path):
    write(plain_program(), tmp_path / "net.strata")
    return tmp_path / "net.strata"


@pytest.fixture
def mixed_path(tmp_path):
    write(residual_program(), tmp_path / "mixed.strata")
    return tmp_path / "mixed.strata"


# Input and output


def test_pixels_in_logits_out():
    program, x = plain_program(), pixels()
    found = session(program, 2)
    plan = derive(program, 2)
    raw = ReferenceExecutor(plan).run(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))[:, 0, 0]
    assert raw.any()
    np.testing.assert_array_equal(found.run_raw(x), raw)
    logits = found.run(x)
    assert (logits.dtype, logits.shape) == (np.float32, (2, 10))
    np.testing.assert_array_equal(logits, (raw * plan.values[plan.output].scale).astype(np.float32))


def test_a_map_comes_out_as_nchw():
    program = replace(plain_program(), output="pooled")
    x = pixels()
    values = session(program, 3).run_all(x)
    assert values["pooled"].shape == (2, 3, 3, 5)
    np.testing.assert_array_equal(session(program, 3).run_raw(x), values["pooled"].transpose(0, 3, 1, 2))
    assert session(program, 3).run(x).shape == (2, 5, 3, 3)
    assert values["x"].dtype == np.uint8
    assert set(values) == {node.name for node in program.nodes}


def test_any_memory_layout_and_no_images():
    found, x = session(plain_program(), 2), pixels(3)
    expected = found.run_raw(x)
    np.testing.assert_array_equal(found.run_raw(np.asfortranarray(x)), expected)
    np.testing.assert_array_equal(found.run_raw(x[::-1])[::-1], expected)
    assert found.run(x[:0]).shape == (0, 10)


def test_real_pixels_are_rounded_to_codes():
    found, x = session(plain_program(), 2), pixels()
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(found.encode((x / 255).astype(dtype), floats=True), x.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(found.run_raw(x / 255.0, floats=True), found.run_raw(x))
    for real, code in ((1.4999, 1), (1.5001, 2)):
        assert (found.encode(np.full((1, 3, 6, 6), real / 255), floats=True) == code).all()


def test_floats_enter_through_step_offset_and_range():
    program = residual_program()
    offsets = {2: (0.0,), 4: (-1.5, 2.0), 8: (7.25,)}
    layers = {**program.layers, "stem": replace(program.layers["stem"], input_offset=offsets)}
    found = session(replace(program, layers=layers), 4)
    step = program.factors["4"].step["stem"]
    x = np.zeros((1, 2, 5, 5))
    x[0, :, 0, 0] = 3 * step
    x[0, :, 0, 1] = 1e9
    x[0, :, 0, 2] = -1e9
    x[0, :, 0, 3] = step
    codes = found.encode(x, floats=True)
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes[0, 0, :4], [[4, 1], [127, 127], [-128, -128], [2, -1]])  # 4.5 and 2.5 to even
    for bits in (2, 8):
        found.set_precision(bits)
        assert found.plan.input_offset == offsets[bits]
        step = program.factors[str(bits)].step["stem"]
        codes = found.encode(np.full((1, 2, 5, 5), 3 * step), floats=True)
        assert (codes == {2: 3, 8: -4}[bits]).all()  # 3 - 7.25 = -4.25


@pytest.mark.parametrize(
    ("make", "x", "floats", "message"),
    [
        (plain_program, np.zeros((2, 3, 6, 6)), False, "must be uint8 pixels, is float64; floats need floats=True"),
        (plain_program, np.zeros((2, 3, 6, 6), np.int8), False, "must be uint8 pixels, is int8"),
        (
            plain_program,
            np.zeros((2, 6, 6, 3), np.uint8),
            False,
            r"must be \(N, 3, 6, 6\), is \(2, 6, 6, 3\); channels seem to be last: pass x.transpose\(0, 3, 1, 2\)",
        ),
        (plain_program, np.zeros((6, 6, 3), np.uint8), False, r"is \(6, 6, 3\); .* x.transpose\(2, 0, 1\)\[None\]"),
        (
            plain_program,
            np.zeros((3, 6, 6), np.uint8),
            False,
            r"must be \(N, 3, 6, 6\), is \(3, 6, 6\); the batch is missing: pass x\[None\]",
        ),
        (plain_program, np.zeros((2, 3, 6, 7), np.uint8), False, r"is \(2, 3, 6, 7\)$"),
        (plain_program, [[1], [1, 2]], False, "run: input is no array: .*inhomogeneous"),
        (plain_program, np.zeros((2, 3, 6, 6), object), False, "must be uint8 pixels, is object"),
        (plain_program, np.zeros((2, 3, 6, 6), complex), True, "must be floating point, is complex128"),
        (plain_program, np.zeros((2, 3, 6, 6), np.uint8), True, "must be floating point, is uint8"),
        (plain_program, np.full((2, 3, 6, 6), 1.01), True, r"real pixels must lie in \[0, 1\], reach \[1.01, 1.01\]"),
        (plain_program, np.full((2, 3, 6, 6), -0.01), True, "real pixels must lie"),
        (plain_program, np.full((2, 3, 6, 6), np.nan), True, "values that are not finite"),
        (residual_program, np.full((2, 2, 5, 5), np.inf), True, r"not finite, the first is inf at \(0, 0, 0, 0\)"),
        (residual_program, np.zeros((2, 2, 5, 5), np.int8), False, "pass them with floats=True"),
        (residual_program, np.zeros((2, 2, 5, 5)), False, "pass them with floats=True"),
        (residual_program, np.zeros((2, 2, 5, 4)), True, r"must be \(N, 2, 5, 5\), is \(2, 2, 5, 4\)"),
    ],
)
def test_wrong_input_is_an_error(make, x, floats, message):
    found = session(make())
    for call in (found.run, found.run_raw, found.run_all):
        with pytest.raises(ValueError, match=message):
            call(x, floats=floats)


# Precision


def test_starts_at_the_narrowest_precision(path):
    assert session(plain_program()).precision_map == {"stem": 1, "mid": 1, "head": 1}
    assert load(path, executor="oracle").precision_map == {"stem": 1, "mid": 1, "head": 1}


def test_changes_of_precision_run_as_a_fresh_session_does(mixed_path):
    program = residual_program()
    x = np.random.default_rng(0).normal(0, 4, (3, 2, 5, 5))
    found = load(mixed_path, 4, executor="oracle")
    for bits in (8, "mixed", 2, {"stem": 2, "block.conv": 8, "head": 4}, 4, "mixed", 8):
        found.set_precision(bits)
        fresh = session(program, bits)
        assert found.precision_map == fresh.precision_map
        expected = fresh.run_raw(x, floats=True)
        np.testing.assert_array_equal(found.run_raw(x, floats=True), expected)
    assert len({session(program, bits).run_raw(x, floats=True).tobytes() for bits in (2, 4, 8, "mixed")}) == 4


def test_upgrades_read_what_is_missing_and_nothing_twice(path):
    found = load(path, 1, executor="oracle")
    names = [name for name, _ in found.reads]
    assert names == ["manifest.json", "base.safetensors", "resident.safetensors", "factors-1.safetensors"]
    assert all(size == (path / name).stat().st_size for name, size in found.reads)
    found.upgrade(3)
    assert [name for name, _ in found.reads][4:] == [
        "stratum-2.safetensors",
        "stratum-3.safetensors",
        "factors-3.safetensors",
    ]
    found.downgrade(2)
    assert [name for name, _ in found.reads][7:] == ["factors-2.safetensors"]
    found.upgrade(3)
    found.downgrade(1)
    assert len(found.reads) == 8
    np.testing.assert_array_equal(found.run_raw(pixels()), session(plain_program(), 1).run_raw(pixels()))


@pytest.mark.parametrize(
    ("start", "verb", "to", "message"),
    [
        (2, "upgrade", 2, "upgrade: 2 is no upgrade from the present precision 2"),
        (2, "upgrade", 1, "upgrade: 1 is no upgrade"),
        (2, "downgrade", 2, "downgrade: 2 is no downgrade"),
        (2, "downgrade", 3, "downgrade: 3 is no downgrade"),
        (2, "upgrade", 9, "there is no 9"),
        (2, "upgrade", {"stem": 3, "mid": 1, "head": 3}, "is no upgrade"),
        ({"stem": 1, "mid": 2, "head": 4}, "upgrade", 3, r"3 is no upgrade from the present precision \[1, 2, 4\]"),
        (2, "set_precision", 9, "there is no 9"),
        (2, "set_precision", "none", "no plan 'none'"),
        (2, "set_precision", {"stem": 1}, "missing"),
    ],
)
def test_refused_changes_leave_the_session_as_it_was(path, start, verb, to, message):
    found = load(path, start, executor="oracle")
    before = (found.run_raw(pixels()).tobytes(), found.precision_map, found.reads, found.plan)
    with pytest.raises(ProgramError, match=message):
        getattr(found, verb)(to)
    assert (found.run_raw(pixels()).tobytes(), found.precision_map, found.reads, found.plan) == before


def test_a_map_is_an_upgrade_if_no_layer_falls(path):
    found = load(path, {"stem": 1, "mid": 2, "head": 1}, executor="oracle")
    found.upgrade({"stem": 1, "mid": 2, "head": 4})
    found.upgrade(4)
    found.downgrade({"stem": 4, "mid": 3, "head": 4})
    assert found.precision_map == {"stem": 4, "mid": 3, "head": 4}


def test_a_file_that_fails_leaves_the_session_running_and_can_be_tried_again(path):
    found = load(path, 1, executor="oracle")
    expected = found.run_raw(pixels())
    file = path / "stratum-2.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="stratum-2"):
        found.upgrade(2)
    assert found.precision_map == {"stem": 1, "mid": 1, "head": 1}
    np.testing.assert_array_equal(found.run_raw(pixels()), expected)
    file.write_bytes(good)
    found.upgrade(2)
    np.testing.assert_array_equal(found.run_raw(pixels()), session(plain_program(), 2).run_raw(pixels()))


def test_an_overflow_at_a_wider_precision_leaves_the_session_running(path):
    program = plain_program()
    wide = replace(program.layers["stem"], integer_form={1: (1, 0), 2: (1, 0), 3: (1, 0), 4: (256, 0)})
    same = {"pad_code": dict.fromkeys(PRECISIONS, (0,)), "input_offset": dict.fromkeys(PRECISIONS, (0.0,))}
    program.layers["stem"] = replace(wide, shape=(7, 4000, 3, 3), **same)
    big = np.full((7, 4000, 3, 3), 127, np.int8)
    program.weights["stem"] = replace(program.weights["stem"], codes=big)
    program.input_shape = (4000, 6, 6)
    found = session(program, 3)
    x = np.full((1, 4000, 6, 6), 200, np.uint8)
    expected = found.run_raw(x)
    with pytest.raises(ProgramError, match=r"'stem.acc' .*accumulator overflow"):
        found.upgrade(4)
    assert found.precision_map["stem"] == 3
    np.testing.assert_array_equal(found.run_raw(x), expected)


def test_few_executors_are_kept_and_reused(monkeypatch):
    made = []

    class Counting(OracleExecutor):
        def __init__(self, plan):
            made.append(plan)
            super().__init__(plan)

    monkeypatch.setattr("bitstrata_runtime.backend.OracleExecutor", Counting)
    found = session(plain_program(), 1)
    for bits in (2, 1, 2, 3, 4, 1):
        found.set_precision(bits)
    assert len(made) == 4
    found.set_precision({"stem": 1, "mid": 1, "head": 2})
    for bits in (1, 4, 3):
        found.set_precision(bits)
    assert len(made) == 5
    found.set_precision(2)
    assert len(made) == 6


# Executors


@needs_engine
def test_the_engine_is_the_default():
    from bitstrata_runtime.engine import EngineExecutor

    x = pixels(5)
    for kwargs in (
        {},
        {"executor": "engine"},
        {"threads": 2},
        *({"isa": isa} for isa in bitstrata_runtime.available_isas()),
    ):
        found = Session.from_program(plain_program(), 2, **kwargs)
        assert isinstance(found.at().executor, EngineExecutor)
        np.testing.assert_array_equal(found.run_raw(x), session(plain_program(), 2, "reference").run_raw(x))


@needs_engine
def test_an_unknown_isa_is_an_error():
    with pytest.raises(ValueError, match="abacus"):
        Session.from_program(plain_program(), 2, isa="abacus")


def test_without_the_engine_the_reference_runs_with_a_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitstrata_runtime.engine", None)
    with pytest.warns(UserWarning, match=r"the engine is not available .* slow reference") as record:
        found = Session.from_program(plain_program(), 2)
    assert record[0].filename == __file__
    assert type(found.at().executor) is ReferenceExecutor
    assert bitstrata_runtime.available_isas() == ()
    for kwargs in ({"executor": "engine"}, {"isa": "avx2"}):
        with pytest.raises(ImportError, match="the engine is not available"):
            Session.from_program(plain_program(), 2, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"executor": "gpu"}, "executor = 'gpu': must be 'engine', 'reference', 'oracle' or None"),
        ({"executor": "reference", "isa": "avx2"}, "isa = 'avx2': only the engine has instruction sets"),
        ({"threads": 0}, "threads = 0: must be a positive integer"),
        ({"threads": 1.0}, "threads = 1.0"),
        ({"keep": 0}, "keep = 0: must be a positive integer"),
        ({"keep": True}, "keep = True"),
    ],
)
def test_wrong_arguments_are_errors(path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        load(path, **kwargs)
    with pytest.raises(ValueError, match=message):
        Session.from_program(plain_program(), **kwargs)


def test_what_is_no_artifact_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        load(tmp_path)
    program = plain_program()
    write(program, tmp_path / "net.strata")
    with pytest.raises(ArtifactError, match="7"):
        load(tmp_path / "net.strata", 7)
    with pytest.raises(ProgramError, match="there is no 7"):
        load(tmp_path / "net.strata", 1, executor="oracle").at(7)
