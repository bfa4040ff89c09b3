"""Tuning: any choice gives the same integers; the file is found, written whole, and never trusted."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers_programs import plain_program, residual_program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.random_programs import choices, input_codes, programs

import bitstrata_runtime as runtime
from bitstrata_runtime import Session, derive, tuning
from bitstrata_runtime.artifact import write
from bitstrata_runtime.plan import Conv
from bitstrata_runtime.reference import ReferenceExecutor
from bitstrata_runtime.tuning import Choice, conv_key, lookup, machine_key, read, store, tune, tune_path

needs_engine = pytest.mark.skipif(not runtime.available_isas(), reason="the engine is not built")


def pixels(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 6, 6)).astype(np.uint8)


def first_conv(plan) -> Conv:
    return next(op for op in plan.ops if isinstance(op, Conv))


# Choices


@needs_engine
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(programs(wide=True), st.data())
def test_any_choice_gives_the_integers_of_the_reference(program, data):
    from bitstrata_runtime.engine import EngineExecutor, available_isas, emulated_isas

    plan = derive(program, data.draw(choices(program)))
    value = plan.values[plan.input]
    codes = input_codes(program, value.lo, value.hi, 3, 0)
    expected = ReferenceExecutor(plan).run(codes)
    for isa in (*available_isas(), *emulated_isas()):
        candidates = EngineExecutor(plan, isa=isa).candidates
        kernels = {name: data.draw(st.sampled_from(names)) for name, names in candidates.items()}
        choice = Choice(kernels, data.draw(st.sampled_from((4096, 5000, *tuning.TILE_BYTES, 64 << 20))))
        executor = EngineExecutor(plan, isa=isa, threads=2, choice=choice)
        outputs = {op.name: plan.values[op.output].name for op in plan.ops}
        assert {name: executor.kernels[outputs[name]] for name in kernels} == kernels
        np.testing.assert_array_equal(executor.run(codes), expected)


@needs_engine
def test_the_engines_own_choice_is_the_first_candidate():
    from bitstrata_runtime.engine import EngineExecutor

    plan = derive(plain_program(), 2)
    for isa in runtime.available_isas():
        executor = EngineExecutor(plan, isa=isa)
        for op in plan.ops:
            if isinstance(op, Conv):
                names = executor.candidates[op.name]
                assert names[0] == executor.kernels[plan.values[op.output].name]
                assert len(set(names)) == len(names)
                assert names[-1] == "generic"


@needs_engine
def test_a_kernel_that_is_none_is_refused():
    from bitstrata_runtime.engine import EngineExecutor

    plan = derive(plain_program(), 2)
    name = first_conv(plan).name
    with pytest.raises(ValueError, match=rf"'{name}': kernel 'fast' cannot compute .* on generic, which has generic"):
        EngineExecutor(plan, isa="generic", choice=Choice({name: "fast"}))
    with pytest.raises(ValueError, match=r"tile_bytes is 1, not in 4096\.\.67108864"):
        EngineExecutor(plan, choice=Choice({}, 1))


# Tuning


@needs_engine
def test_tuned_sessions_compute_the_same(tmp_path):
    write(plain_program(), tmp_path / "net.strata")
    plain, file = runtime.load(tmp_path / "net.strata", 2), tmp_path / "cache" / "tune.json"
    report = tune(plain, pixels(1), path=file, repeats=2)
    assert report.path == file
    assert 0 < report.tuned_seconds <= report.default_seconds
    assert (report.tuned_seconds == report.default_seconds) == (report.choice == Choice())
    assert machine_key(runtime.available_isas()[-1]) in read(file)
    tuned = runtime.load(tmp_path / "net.strata", 2, tune=file)
    np.testing.assert_array_equal(tuned.run_raw(pixels()), plain.run_raw(pixels()))
    assert [entry.name for entry in file.parent.iterdir()] == ["tune.json"]


@needs_engine
def test_what_the_file_says_is_used(tmp_path):
    program, file = plain_program(), tmp_path / "tune.json"
    plan, isa = derive(program, 2), runtime.available_isas()[-1]
    kernels = {op.name: "generic" for op in plan.ops if isinstance(op, Conv)}
    store(file, plan, isa, threads=1, batch=1, choice=Choice(kernels, 24 << 10))
    assert lookup(file, plan, isa, 1) == Choice(kernels, 24 << 10)
    assert lookup(file, plan, isa, 2) == lookup(file, plan, "another", 1) == Choice()
    wider = lookup(file, derive(program, 3), isa, 1)  # only what is as wide at both precisions
    assert wider.tile_bytes is None
    assert wider.kernels.keys() < kernels.keys()
    tuned = Session.from_program(program, 2, tune=file)
    assert set(tuned.executor.kernels.values()) == {"generic"}
    plain = Session.from_program(program, 2)
    np.testing.assert_array_equal(tuned.run_raw(pixels()), plain.run_raw(pixels()))
    store(file, plan, isa, threads=1, batch=1, choice=Choice())  # a later measurement replaces an earlier one
    assert lookup(file, plan, isa, 1) == Choice()


@needs_engine
def test_what_cannot_be_tuned_is_refused(tmp_path):
    session = Session.from_program(plain_program(), 2)
    with pytest.raises(ValueError, match=r"tune: repeats = 0: must be a positive integer"):
        tune(session, pixels(), path=tmp_path / "t.json", repeats=0)
    with pytest.raises(ValueError, match=r"tune: at least one image is needed"):
        tune(session, pixels(0), path=tmp_path / "t.json")
    oracle = Session.from_program(plain_program(), 2, executor="oracle")
    with pytest.raises(ValueError, match=r"only the engine can be tuned, the session runs on OracleExecutor"):
        tune(oracle, pixels(), path=tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"tune = True: only the engine can be tuned, the executor is 'oracle'"):
        Session.from_program(plain_program(), 2, executor="oracle", tune=True)
    assert not list(tmp_path.iterdir())


# The file


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[]",
        b"\xff\xfe",
        b'{"format": 2, "machines": {}}',
        b'{"format": 1}',
        b'{"format": 1, "machines": []}',
        b'{"format": 1, "machines": {"x": {"convs": {"k": 3}, "tiles": {}}}}',
        b'{"format": 1, "machines": {"x": {"convs": {}, "tiles": {"k": "3"}}}}',
        b"[" * 100000,
    ],
)
def test_a_file_that_is_not_ours_is_ignored_with_a_warning(content, tmp_path):
    file = tmp_path / "tune.json"
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"tune\.json is ignored, it is not a tuning file of this version"):
        assert read(file) == {}


@needs_engine
@pytest.mark.parametrize("foreign", ["kernel", "tile", "corrupt"])
def test_a_foreign_file_changes_nothing(foreign, tmp_path):
    program, file, isa = plain_program(), tmp_path / "tune.json", runtime.available_isas()[-1]
    plan = derive(program, 2)
    if foreign == "corrupt":
        file.write_text("{")
    else:
        choice = Choice({first_conv(plan).name: "avx9"}) if foreign == "kernel" else Choice({}, 7)
        store(file, plan, isa, threads=1, batch=1, choice=choice)
    with pytest.warns(UserWarning, match=r"tune: .*tune\.json is ignored"):
        session = Session.from_program(program, 2, tune=file)
    plain = Session.from_program(program, 2)
    assert session.executor.kernels == plain.executor.kernels
    np.testing.assert_array_equal(session.run_raw(pixels()), plain.run_raw(pixels()))


def test_keys_tell_precisions_and_sizes_apart():
    program = residual_program()
    keys = set()
    for bits in program.precisions:
        plan = derive(program, bits)
        op = [op for op in plan.ops if isinstance(op, Conv)][1]  # the first is as wide at every precision
        keys |= {conv_key(plan, op, threads, batch) for threads in (1, 2) for batch in (1, 4)}
    assert len(keys) == 4 * len(program.precisions)
    assert conv_key(plan, replace(op, groups=op.groups + 1), 1, 1) != conv_key(plan, op, 1, 1)


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tune_path() == tmp_path / "bitstrata" / "tune.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tune_path(True) == tmp_path / "home" / ".cache" / "bitstrata" / "tune.json"
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "here.json"))
    assert tune_path() == tmp_path / "here.json"
    assert tune_path("mine.json").name == "mine.json"


def test_a_file_that_cannot_be_written_leaves_the_old_one(monkeypatch, tmp_path):
    file, plan = tmp_path / "tune.json", derive(plain_program(), 2)
    store(file, plan, "generic", threads=1, batch=1, choice=Choice({}, 24 << 10))
    before = file.read_bytes()

    def fail(*args):
        raise OSError("full")

    monkeypatch.setattr(tuning.os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        store(file, plan, "generic", threads=1, batch=1, choice=Choice())
    assert file.read_bytes() == before
    assert json.loads(before)["format"] == 1
    assert list(tmp_path.iterdir()) == [file]
