"""Random graphs on every instruction set and 1, 2, 3 threads: the reference's integers, on guarded memory.

The long form prints what it ran, and writes it to the file that BITSTRATA_EXACTNESS names. BITSTRATA_GRAPHS is how many
graphs it draws.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_guarded import POSSIBLE, guarded_copy, guarded_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.random_programs import choices, input_codes, programs

import bitstrata_runtime as runtime
from bitstrata_runtime import Plan, as_tables, as_thresholds, derive
from bitstrata_runtime.machine import cpu_name
from bitstrata_runtime.plan import Conv
from bitstrata_runtime.reference import ReferenceExecutor
from bitstrata_runtime.tuning import Choice

needs_engine = pytest.mark.skipif(not runtime.available_isas(), reason="the engine is not built")
THREADS = (1, 2, 3)
GRAPHS = int(os.environ.get("BITSTRATA_GRAPHS", "4000"))  # of the long form; hypothesis draws some several times
LEAST = 1000
QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
SHORT = settings(max_examples=80, deadline=None, suppress_health_check=QUIET)
LONG = settings(max_examples=GRAPHS, deadline=None, suppress_health_check=QUIET, database=None)


@dataclass
class Case:
    """A plan, what it runs at, and inputs that include the extremes."""

    plan: Plan
    choice: Any
    codes: np.ndarray
    rng: random.Random  # chooses kernels

    def digest(self) -> str:
        """Of everything that decides what is computed, but for the inputs' numbers."""
        text = repr([(value.shape, value.dtype, value.lo, value.hi) for value in self.plan.values])
        text += repr(self.plan.ops) + repr(self.codes.shape)
        weights = b"".join(op.codes.tobytes() for op in self.plan.ops if isinstance(op, Conv))
        return hashlib.sha256(text.encode() + weights).hexdigest()


@dataclass
class Counts:
    """What was run, and what differed."""

    graphs: set[str] = field(default_factory=set)
    runs: int = 0
    values: int = 0
    mismatches: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    per_layer: int = 0

    def add(self, case: Case) -> None:
        self.graphs.add(case.digest())
        self.operations.update(type(op).__name__.lower() for op in case.plan.ops)
        self.per_layer += isinstance(case.choice, dict) and len(set(case.choice.values())) > 1


@st.composite
def cases(draw: Any) -> Case:
    program = draw(programs(wide=True))
    choice = draw(choices(program))
    plan = derive(program, choice)
    for change in draw(st.sampled_from(((), (as_thresholds,), (as_thresholds, as_tables)))):
        plan = change(plan)
    value, count = plan.values[plan.input], draw(st.sampled_from((1, 2, 3, 5, 8, 67)))
    seed = draw(st.integers(0, 2**32 - 1))
    return Case(plan, choice, input_codes(program, value.lo, value.hi, count, seed), random.Random(seed))


def isas() -> tuple[str, ...]:
    from bitstrata_runtime.engine import available_isas, emulated_isas

    return (*available_isas(), *emulated_isas())


def check(case: Case, counts: Counts) -> None:
    """Every value of the plan, computed by every instruction set and thread count, twice: kept, and in the arena.

    With the most threads, kernels are drawn from all that can compute a convolution; else the engine chooses.
    """
    from bitstrata_runtime.engine import EngineExecutor

    counts.add(case)
    plan, codes = case.plan, guarded_copy(case.codes)
    expected = ReferenceExecutor(plan).run_all(case.codes)
    output = plan.values[plan.output].name
    with guarded_engine():
        for isa in isas():
            for threads in THREADS:
                executor = EngineExecutor(plan, isa=isa, threads=threads)
                if threads == THREADS[-1]:
                    chosen = {name: case.rng.choice(names) for name, names in executor.candidates.items()}
                    executor = EngineExecutor(plan, isa=isa, threads=threads, choice=Choice(chosen))
                assert executor.isa == isa
                found = {**executor.run_all(codes), "the output alone": executor.run(codes)}
                wanted = {**expected, "the output alone": expected[output]}
                assert found.keys() == wanted.keys()
                differing = [name for name in wanted if not same(found[name], wanted[name])]
                counts.runs, counts.values = counts.runs + 1, counts.values + len(wanted)
                counts.kernels.update(f"{isa}: {kernel}" for kernel in executor.kernels.values())
                counts.mismatches += len(differing)
                assert not differing, f"{isa}, {threads} threads: {differing} are not the reference's"


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b)


@needs_engine
@SHORT
@given(cases())
def test_engine_equals_reference(case: Case) -> None:
    check(case, Counts())


@pytest.mark.soak
@needs_engine
def test_many_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    counts, begun = Counts(), time.monotonic()

    @LONG
    @given(cases())
    def run(case: Case) -> None:
        check(case, counts)

    run()
    report = {
        "command": "BITSTRATA_EXACTNESS=FILE python -m pytest -m soak tests/property/test_exactness.py",
        "cpu": cpu_name(),
        "bitstrata": runtime.__version__,
        "graphs": len(counts.graphs),
        "with several precisions": counts.per_layer,
        "isas": list(isas()),
        "threads": list(THREADS),
        "runs": counts.runs,
        "values compared": counts.values,
        "mismatches": counts.mismatches,
        "guarded memory": POSSIBLE,
        "operations": dict(sorted(counts.operations.items())),
        "convolutions by kernel": dict(sorted(counts.kernels.items())),
        "seconds": round(time.monotonic() - begun),
    }
    with capsys.disabled():
        print(
            f"\n{report['graphs']} graphs x {len(report['isas'])} instruction sets x {len(THREADS)} thread counts: "
            f"{counts.runs} runs, {counts.values} values, {counts.mismatches} mismatches"
        )
    if target := os.environ.get("BITSTRATA_EXACTNESS"):
        Path(target).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    assert len(counts.graphs) >= LEAST
    assert counts.mismatches == 0


# The guard itself


@needs_engine
@pytest.mark.skipif(not POSSIBLE, reason="this operating system has no pages to guard memory with")
@pytest.mark.parametrize("past_end", [0, 1])
def test_a_byte_too_far_ends_the_process(past_end: int) -> None:
    code = f"""
import ctypes, numpy as np
from helpers_guarded import guarded_copy, guarded_engine
from bitstrata_runtime import _engine
graph = _engine.Graph("generic", _engine.Resources(1, 1))
graph.finish(graph.requant("r", graph.input((3, 3, 1), "u8", 0, 255), np.ones(1, np.int32), np.zeros(1, np.int64),
                           np.zeros(1, np.uint8), 0, 255, "u8"))
with guarded_engine():
    (result,) = graph.run(guarded_copy(np.zeros((1, 3, 3, 1), np.uint8)), [1])
for array in (result, guarded_copy(result)):
    ctypes.string_at(array.ctypes.data + array.nbytes - 1)
print("alive", flush=True)
ctypes.string_at(result.ctypes.data + result.nbytes - 1 + {past_end}, 1)
print("still alive")
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert found.stdout.startswith("alive"), found.stderr
    assert ("still alive" in found.stdout) == (past_end == 0)
    assert (found.returncode == 0) == (past_end == 0)
