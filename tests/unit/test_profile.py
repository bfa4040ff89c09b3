"""Profiles: what is counted, against the plan; what follows from the numbers; what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from helpers_programs import plain_program, residual_program

import bitstrata_runtime as runtime
from bitstrata_runtime import Session
from bitstrata_runtime.plan import Conv, Requant, Slice
from bitstrata_runtime.profile import Level, Machine, OpProfile, Profile, profile

ENGINE = bool(runtime.available_isas())
needs_engine = pytest.mark.skipif(not ENGINE, reason="the engine is not built")
SIZE = {"u8": 1, "s8": 1, "i32": 4}


def isas() -> list[str]:
    if not ENGINE:
        return []
    from bitstrata_runtime.engine import emulated_isas

    return [*runtime.available_isas(), *emulated_isas()]


def pixels(program, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *program.input_shape)).astype(np.uint8)


def reals(program, count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, (count, *program.input_shape))


@needs_engine
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("threads", [1, 2])
def test_counts_are_those_of_the_plan(isa, threads):
    program = residual_program()
    session = Session.from_program(program, 2, executor="engine", isa=isa, threads=threads)
    found = runtime.profile(session, reals(program, 3), repeats=3, floats=True)
    plan, batch = session.plan, 3
    assert [op.name for op in found.ops] == [op.name for op in plan.ops]
    assert (found.machine.isa, found.machine.threads, found.batch, found.repeats) == (isa, threads, batch, 3)
    for before, got, op in zip((None, *plan.ops), found.ops, plan.ops, strict=False):
        result, sources = plan.values[op.output], [plan.values[i] for i in op.inputs]
        assert got.shape == result.shape
        assert got.output_bytes == batch * math.prod(result.shape) * SIZE[result.dtype]
        read = [result] if isinstance(op, Slice) else sources
        assert got.input_bytes == batch * sum(math.prod(v.shape) * SIZE[v.dtype] for v in read)
        in_convolution = isinstance(op, Requant) and isinstance(before, Conv)
        assert got.seconds > 0 or in_convolution
        if isinstance(op, Conv):
            assert got.operations == 2 * batch * math.prod(result.shape[:2]) * op.codes.size
            assert got.kernel
            assert got.peak in found.machine.peaks
            assert got.weight_bytes > 0
            assert got.compute_seconds == pytest.approx(
                got.operations / 2 / found.machine.peaks[got.peak] / threads, rel=1e-12
            )
        else:
            assert (got.kernel, got.peak, got.compute_seconds, got.share_of_peak) == ("", "", 0.0, None)
        assert got.memory_seconds > 0
    # Every operation's least time is within the fastest run; the clocks' units agree to a part in a hundred.
    assert sum(op.seconds for op in found.ops) <= found.seconds * 1.01
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["ops"][0]["name"] == plan.ops[0].name


@needs_engine
def test_operations_that_run_in_tiles_share_a_group():
    session = Session.from_program(plain_program(), 2, executor="engine")
    found = profile(session, pixels(plain_program(), 1), repeats=1)
    groups = [op.group for op in found.ops]
    assert groups == sorted(groups)
    assert groups[0] == 0
    first = next(i for i, op in enumerate(found.ops) if op.kind == "conv")
    assert found.ops[first + 1].kind == "requant"
    assert groups[first] == groups[first + 1]


@needs_engine
def test_a_profiled_session_computes_what_it_did():
    program = residual_program()
    session = Session.from_program(program, 2, executor="engine", threads=2)
    x = reals(program, 5)
    before = session.run_all(x, floats=True)
    profile(session, x, repeats=2, floats=True)
    for name, array in session.run_all(x, floats=True).items():
        np.testing.assert_array_equal(array, before[name])


@needs_engine
def test_what_cannot_be_profiled_is_refused():
    program = plain_program()
    session = Session.from_program(program, 2, executor="engine")
    x = pixels(program, 1)
    with pytest.raises(ValueError, match=r"profile: repeats = 0: must be a positive integer"):
        profile(session, x, repeats=0)
    with pytest.raises(ValueError, match=r"profile: at least one image is needed, the batch has shape \(0, 6, 6, 3\)"):
        profile(session, x[:0])
    with pytest.raises(ValueError, match=r"run: input must be uint8 pixels, is int64"):
        profile(session, x.astype(np.int64))
    reference = Session.from_program(program, 2, executor="reference")
    with pytest.raises(ValueError, match=r"only the engine can be profiled, the session runs on ReferenceExecutor"):
        profile(reference, x)


# What follows from the numbers


def op(name: str, seconds: float, compute: float, memory: float) -> OpProfile:
    sizes = {"operations": 100, "input_bytes": 10, "output_bytes": 20, "weight_bytes": 30, "scratch_bytes": 5}
    return OpProfile(name, "conv", (1, 1, 1), "k", seconds, group=0, peak="p", **sizes,
                     compute_seconds=compute, memory_seconds=memory)  # fmt: skip


LEVELS = (Level("L1", 32, 4.0), Level("L2", 64, 2.0), Level("memory", None, 1.0))
MACHINE = Machine("generic", 1, {"p": 1.0}, LEVELS)


def test_a_limit_is_what_takes_longer():
    fast, slow = op("a", 8.0, 6.0, 2.0), op("b", 8.0, 1.0, 4.0)
    assert (fast.bound, fast.limit_seconds, fast.share_of_limit, fast.share_of_peak) == ("compute", 6.0, 0.75, 0.75)
    assert (slow.bound, slow.limit_seconds, slow.share_of_limit, slow.share_of_peak) == ("memory", 4.0, 0.5, 0.125)
    assert fast.bytes == 10 + 20 + 30 + 2 * 5
    assert fast.gops == pytest.approx(100 / 8 / 1e9)
    assert fast.gbps == pytest.approx(70 / 8 / 1e9)
    assert replace(fast, seconds=0.0).share_of_limit == 0.0


def test_the_worst_lose_most_time():
    ops = (op("a", 5.0, 4.5, 0.0), op("b", 9.0, 6.0, 0.0), op("c", 2.0, 0.5, 0.0), op("d", 1.0, 1.0, 0.0))
    found = Profile(MACHINE, 1, 1, 20.0, ops)
    assert [o.name for o in found.worst()] == ["b", "c", "a"]
    assert found.share_of_time(ops[1]) == 9 / 20
    assert found.outside_seconds == 3.0
    assert found.as_dict()["worst"] == ["b", "c", "a"]


def test_bytes_come_from_the_smallest_level_that_holds_them():
    assert [MACHINE.level(n).name for n in (0, 32, 33, 64, 65, 1 << 40)] == ["L1", "L1", "L2", "L2", "memory", "memory"]
