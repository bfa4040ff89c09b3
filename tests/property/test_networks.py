"""From a random torch network to an artifact and back: every stage computes the same integers."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_lowering import images, normalised, prepared
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from property.random_networks import Case, cases
from torch import Tensor, nn

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata.lowering import LowerError
from bitstrata_runtime import Program, Session
from bitstrata_runtime.plan import Conv

pytestmark = pytest.mark.filterwarnings(
    "ignore:lower. .* fraction bits:UserWarning", "ignore:Using padding='same'", "ignore:.*inputs below zero meet"
)
QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
SHORT = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=QUIET)
LONG = settings(max_examples=400, deadline=None, suppress_health_check=QUIET)


def check_network(case: Case, precision_map: st.DataObject) -> None:
    note(repr(case))
    codes = images(case.shape, count=3, seed=case.seed)
    data = codes if case.pixels else normalised(codes)
    model = prepared(case.model, normalised(codes), case.recipe, pixels=case.pixels, seed=case.seed % 1000)
    program = lower_or_skip(model, normalised(codes))
    chosen = {name: precision_map.draw(st.sampled_from(program.precisions), label=name) for name in program.layers}

    report = bs.verify(model, program, data, at=[*program.precisions, chosen])
    assert report.ok, str(report)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.strata"
        bs.pack(program, path)
        check_artifact(program, path, data, chosen)


def lower_or_skip(model: nn.Module, x: Tensor) -> Program:
    try:
        return bs.lower(model, x)
    except LowerError as error:
        assume("no step size" not in str(error))  # an activation that was zero throughout has no step
        raise


def check_artifact(program: Program, path: Path, data: Tensor, chosen: dict[str, int]) -> None:
    """Loaded anew or upgraded step by step, on every executor: the integers of the program in memory."""
    x, floats = data.numpy(), program.input_kind == "codes"
    executors: list[dict[str, Any]] = [{"executor": "reference"}]
    executors += [{"executor": "engine", "isa": isa} for isa in runtime.available_isas()]
    expected = {p: Session.from_program(program, p, executor="reference") for p in program.precisions}
    for options in executors:
        session = runtime.load(path, program.precisions[0], **options)
        for p in program.precisions:
            if p != program.precisions[0]:
                session.upgrade(p)
            np.testing.assert_array_equal(session.run_raw(x, floats=floats), expected[p].run_raw(x, floats=floats))
        session.set_precision(chosen)
        mixed = Session.from_program(program, chosen, executor="reference")
        np.testing.assert_array_equal(session.run_raw(x, floats=floats), mixed.run_raw(x, floats=floats))
    check_nesting(path, program.precisions)


def check_nesting(path: Path, precisions: tuple[int, ...]) -> None:
    """Weight codes at a precision are those of any wider one, halved and floored bit by bit."""
    weights = {p: weight_codes(runtime.load(path, p, executor="reference")) for p in precisions}
    for low, high in pairwise(precisions):
        layers = runtime.load(path, low, executor="reference").program.layers
        for name, codes in weights[low].items():
            wide = weights[high][name].astype(int)
            for _ in range(layers[name].weight_bits[high] - layers[name].weight_bits[low]):
                wide = np.floor(wide / 2).astype(int)
            np.testing.assert_array_equal(codes, wide)


def weight_codes(session: Session) -> dict[str, np.ndarray]:
    return {op.layer: op.codes for op in session.plan.ops if isinstance(op, Conv)}


@SHORT
@given(cases(), st.data())
def test_networks(case: Case, data: st.DataObject) -> None:
    check_network(case, data)


@pytest.mark.soak
@LONG
@given(cases(), st.data())
def test_many_networks(case: Case, data: st.DataObject) -> None:
    check_network(case, data)
