"""verify finds what is wrong, names the first place, and allows exactly what rounding explains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_lowering import Net, images, normalised, prepared
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.lowering.rounding import rounding_bounds
from bitstrata_runtime import Factors, Program, Session, Weights, available_isas
from bitstrata_runtime.plan import Add, Clip, Requant, SumPool

Setup = tuple[nn.Module, Program, Tensor]


def residual() -> Net:
    def run(n: Net, x: Tensor) -> Tensor:
        x = F.relu(n.bn1(n.stem(x)))
        x = F.relu(n.bn3(n.conv2(F.relu(n.bn2(n.conv1(x))))) + x)
        return n.head(F.adaptive_avg_pool2d(x, 2).flatten(1))

    return Net(
        run,
        stem=nn.Conv2d(3, 6, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(6),
        conv1=nn.Conv2d(6, 6, 3, padding=1, bias=False),
        bn2=nn.BatchNorm2d(6),
        conv2=nn.Conv2d(6, 6, 3, padding=1, bias=False),
        bn3=nn.BatchNorm2d(6),
        head=nn.Linear(24, 5),
    )


@pytest.fixture(scope="module")
def setup() -> Setup:
    torch.manual_seed(0)
    codes = images((3, 8, 8), count=8)
    model = prepared(residual(), normalised(codes), bs.recipes.strata(w=(1, 2, 4)), pixels=True)
    return model, bs.lower(model, normalised(codes)), codes


def with_factor(program: Program, key: str, change: Callable[[Factors], None]) -> Program:
    old = program.factors[key]
    new = Factors({name: value.copy() for name, value in old.affine.items()}, dict(old.step))
    change(new)
    return dataclasses.replace(program, factors={**program.factors, key: new})


def with_code(program: Program, layer: str, flip: int) -> Program:
    old = program.weights[layer]
    codes = old.codes.copy()
    codes.flat[7] ^= flip
    return dataclasses.replace(program, weights={**program.weights, layer: Weights(codes, old.bits)})


def test_nothing_wrong(setup: Setup) -> None:
    report = bs.verify(*setup)
    assert report.ok
    assert report.first_difference == "none"
    assert report.isas == available_isas()
    assert set(report.top1_agreement.values()) == {1.0}
    assert [row.layer for row in report.rows if row.precision == 2] == ["stem", "conv1", "conv2", "head", ""]
    assert next(row for row in report.rows if row.layer == "head").sources == ("conv2", "stem")
    lines = str(report).splitlines()
    assert lines[0] == f"verified 8 inputs; engine: {', '.join(report.isas) or 'not built'}"
    total = sum(row.count for row in report.rows if row.layer and row.precision == 1)
    assert lines[1].startswith(f"precision 1: 0 of {total:,} codes differ from the model's (at most ")
    assert lines[1].endswith("same class 100.00%, engine values unequal to the reference's: 0")
    assert [line.split(":")[0] for line in lines] == [
        lines[0].split(":")[0],
        *(f"precision {p}" for p in (1, 2, 4)),
        "first difference",
    ]


@pytest.mark.parametrize("layer", ["stem", "conv1", "conv2", "head"])
def test_changed_weight_code(setup: Setup, layer: str) -> None:
    model, program, codes = setup
    report = bs.verify(model, with_code(program, layer, 1), codes, isas=())
    assert not report.ok
    widest = layer in ("conv1", "conv2")  # the lowest bit of inner layers is in use at 4 bits alone
    assert [label for label, name, count in report.weights] == ([4] if widest else [1, 2, 4])
    first = 4 if widest else 1
    assert report.first_difference == f"program and model differ at precision {first} in 1 weight codes of {layer!r}"
    bad = next(row for row in report.rows if not row.explained)
    assert layer in bad.sources  # the arithmetic shows it too, in what reads the layer
    assert bad.precision == first


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        ("stem", "the input of 'conv1', computed from 'stem'"),
        ("conv1", "the input of 'conv2', computed from 'conv1'"),
        ("conv2", "the input of 'head', computed from 'conv2', 'stem'"),
        ("head", "the output, computed from 'head'"),
    ],
)
@pytest.mark.parametrize("row", [0, 1], ids=["gain", "shift"])
def test_changed_affine_factor(setup: Setup, layer: str, place: str, row: int) -> None:
    model, program, codes = setup

    def change(factors: Factors) -> None:
        factors.affine[layer][row] *= 1.01

    report = bs.verify(model, with_factor(program, "2", change), codes, isas=())
    assert not report.ok
    assert report.weights == ()
    assert report.first_difference.startswith(f"program and model differ at precision 2 in {place}: ")
    assert "steps before rounding (explained: " in report.first_difference
    assert all(r.explained for r in report.rows if r.precision != 2)
    assert sum(not r.explained for r in report.rows) == 1 + (layer == "stem")  # the stem feeds two


@pytest.mark.parametrize("layer", ["conv1", "conv2", "head"])
def test_changed_step(setup: Setup, layer: str) -> None:
    model, program, codes = setup

    def change(factors: Factors) -> None:
        factors.step[layer] *= 1.01

    report = bs.verify(model, with_factor(program, "4", change), codes, isas=())
    bad = [r for r in report.rows if not r.explained]
    assert [(r.precision, r.layer) for r in bad] == [(4, layer)]
    assert bad[0].differing > 0


def test_changed_clip(setup: Setup) -> None:
    model, program, codes = setup
    nodes = tuple(
        dataclasses.replace(n, attrs={**n.attrs, "clip": [None, None]}) if n.op == "clip" else n for n in program.nodes
    )
    report = bs.verify(model, dataclasses.replace(program, nodes=nodes), codes, isas=())
    assert [r.layer for r in report.rows if not r.explained] == ["head"] * 3


@pytest.mark.parametrize("value", ["conv1", "add", "logits"])
def test_engine_with_a_wrong_result(setup: Setup, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    isas = available_isas()
    if not isas:
        pytest.skip("the engine is not built")
    from bitstrata_runtime.engine import EngineExecutor

    right = EngineExecutor.run_all

    def wrong(self: Any, codes: Any) -> dict[str, Any]:
        values = right(self, codes)
        if self.isa == isas[-1]:
            values[value] = values[value].copy()
            values[value].flat[3] -= 5
        return values

    monkeypatch.setattr(EngineExecutor, "run_all", wrong)
    report = bs.verify(*setup)
    assert not report.ok
    assert {(m.precision, m.isa, m.value, m.differing, m.difference) for m in report.mismatches} == {
        (p, isas[-1], value, 1, 5) for p in (1, 2, 4)
    }
    assert report.first_difference == (
        f"engine ({isas[-1]}) and reference differ at precision 1 in {value!r}: 1 integers, by up to 5"
    )
    assert str(report).splitlines()[1].endswith("engine values unequal to the reference's: 1")


def test_another_model(setup: Setup) -> None:
    _, program, codes = setup
    torch.manual_seed(1)
    other = prepared(residual(), normalised(codes), bs.recipes.strata(w=(1, 2, 4)), pixels=True)
    assert not bs.verify(other, program, codes, isas=()).ok
    with pytest.raises(ValueError, match="the model has no quantized layer 'conv1'; is it the one this program was"):
        bs.verify(
            prepared(nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten(), nn.Linear(2, 2)), normalised(codes)),
            program,
            codes,
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"data must be uint8 \(N, C, H, W\), got float32 \(2, 3, 8, 8\)"),
        (
            torch.zeros(2, 3, 8, 9, dtype=torch.uint8),
            r"the program takes \(N, 3, 8, 8\), got data of shape \(2, 3, 8, 9\)",
        ),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), r"got data of shape \(0, 3, 8, 8\)"),
    ],
)
def test_wrong_data(setup: Setup, data: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bs.verify(setup[0], setup[1], data)


def test_wrong_data_for_a_program_on_real_numbers() -> None:
    x = torch.randn(4, 6)
    model = prepared(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), x)
    program = bs.lower(model, x)
    assert bs.verify(model, program, x).ok
    with pytest.raises(ValueError, match=r"data must be floating point, got uint8"):
        bs.verify(model, program, x.byte())


# --- the tolerance ---------------------------------------------------------------------------------------------------


def test_tolerance_is_met_and_not_vacuous(setup: Setup) -> None:
    """Errors are there (integers cannot hold the factors exactly), below the bound and not far below it."""
    rows = [row for row in bs.verify(*setup, isas=()).rows if row.layer not in ("stem", "")]
    assert len(rows) == 9
    for row in rows:
        assert row.tolerance / 1000 < row.distance <= row.tolerance < 2e-6, row


def test_output_error_is_within_the_bound_and_near_it(setup: Setup) -> None:
    report = bs.verify(*setup, isas=())
    for row in (row for row in report.rows if not row.layer):
        assert 0.25 < row.distance <= row.tolerance < 2.0


def test_bounds_of_single_operations(setup: Setup) -> None:
    """Half a unit a rounding, scaled by what follows: worked by hand for a sum, its clip and its pool."""
    plan = Session.from_program(setup[1], 2, executor="reference").plan
    bounds = rounding_bounds(plan)
    for op in plan.ops:
        before = [bounds[plan.values[i].name] for i in op.inputs]
        after = bounds[plan.values[op.output].name]
        if isinstance(op, Add):
            expected = sum(
                b / 2**s + (0.5 if s > 0 else 0) for b, s in zip(before, (op.shift_a, op.shift_b), strict=True)
            )
        elif isinstance(op, Clip):
            expected = before[0] + 0.5
        elif isinstance(op, SumPool):
            expected = before[0] * 16 / 2**op.shift + (0.5 if op.shift else 0)
        elif isinstance(op, Requant) and plan.values[op.output].scale is not None:
            assert 0.5 < after < 1.51  # its own rounding, and a unit at most for the multiplier's 31 bits
            continue
        else:
            continue
        assert after == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("layer", ["stem", "conv1", "conv2", "head"])
@pytest.mark.parametrize("relative", [1e-5, 1e-6])
def test_smallest_change_that_is_seen(setup: Setup, layer: str, relative: float) -> None:
    """No code needs to differ: the numbers in front of the rounding show a factor that is a millionth off."""
    model, program, codes = setup

    def change(factors: Factors) -> None:
        factors.affine[layer][0] *= 1 + relative

    report = bs.verify(model, with_factor(program, "4", change), codes, isas=())
    bad = [row for row in report.rows if not row.explained]
    assert bad
    assert all(layer in row.sources for row in bad)
