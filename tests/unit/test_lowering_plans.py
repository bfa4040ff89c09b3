"""add_plan: a per-layer precision map with normalizations fitted to it, beside the precisions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_lowering import Net, images, normalised, prepared
from torch import Tensor, nn

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata.lowering import LowerError, add_plan, reestimated
from bitstrata_runtime import Program, Session

Setup = tuple[nn.Module, Program, list[Tensor]]
MAP = {"stem": 4, "conv1": 1, "conv2": 4, "plain": 2, "head": 4}


def network() -> Net:
    def run(n: Net, x: Tensor) -> Tensor:
        x = n.stem(x)
        x = n.conv2(F.relu(n.bn2(n.conv1(F.relu(n.bn1(x)))))) + x
        return n.head(F.adaptive_avg_pool2d(F.relu(n.plain(F.relu(n.bn3(x)))), 1).flatten(1))

    return Net(
        run,
        stem=nn.Conv2d(3, 6, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(6),  # reads a value that is read elsewhere too: an affine of its own, conv1's precision
        conv1=nn.Conv2d(6, 6, 3, padding=1, bias=False),
        bn2=nn.BatchNorm2d(6),  # folded into conv1
        conv2=nn.Conv2d(6, 6, 3, padding=1, bias=False),
        bn3=nn.BatchNorm2d(6),  # after a sum: plain's precision
        plain=nn.Conv2d(6, 6, 3, padding=1),
        head=nn.Linear(6, 5),
    )


@pytest.fixture(scope="module")
def setup() -> Setup:
    torch.manual_seed(0)
    batches = [normalised(images((3, 8, 8), count=8, seed=s)).float() for s in range(3)]
    model = prepared(network(), batches[0], bs.recipes.strata(w=(1, 2, 4)), pixels=True)
    return model, bs.lower(model, batches[0]), batches


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_plan_holds_the_affines_with_normalization(setup: Setup) -> None:
    model, program, batches = setup
    before, factors = state(model), dict(program.factors)
    planned = add_plan(program, model, "mixed", MAP, batches)
    assert planned.plans == {"mixed": MAP}
    assert list(planned.factors) == ["1", "2", "4", "mixed"]
    assert set(planned.factors["mixed"].affine) == {"conv1", "bn1", "bn3"}
    assert planned.factors["mixed"].step == {}
    assert program.plans == {}
    assert program.factors == factors
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert planned.factors["1"] is program.factors["1"]


def test_affines_are_those_of_the_statistics_of_the_batches(setup: Setup) -> None:
    """bn3 is estimated on what conv2 gives at 4 bits behind conv1 at 1 bit."""
    model, program, batches = setup
    planned = add_plan(program, model, "mixed", MAP, batches)
    seen: list[Tensor] = []
    twin = copy.deepcopy(model)
    bs.set_precision(twin, MAP)
    twin.bn3.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    twin.train()
    with torch.no_grad():
        for x in batches:
            twin(x)
    level = model.bn3.levels["2"]
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0)
    gain = (level.weight / torch.sqrt(var + level.eps)).detach().double().numpy()
    found = planned.factors["mixed"].affine["bn3"]
    np.testing.assert_allclose(found[0], gain, rtol=1e-5)
    shift = level.bias.detach().double().numpy() - mean.double().numpy() * gain
    np.testing.assert_allclose(found[1], shift, rtol=1e-4, atol=1e-5)
    assert not np.allclose(found, program.factors["2"].affine["bn3"], rtol=0.01)


def test_session_equals_the_model_with_the_same_statistics(setup: Setup) -> None:
    model, program, batches = setup
    planned = add_plan(program, model, "mixed", MAP, batches)
    fitted = reestimated(model, MAP, batches)
    codes = images((3, 8, 8), count=6, seed=9)
    report = bs.verify(fitted, planned, codes, at=["mixed"])
    assert report.ok, str(report)
    assert not bs.verify(model, planned, codes, at=["mixed"], isas=()).ok  # the model's own statistics are others
    assert bs.verify(model, planned, codes, at=[1, 2, 4, MAP], isas=()).ok  # a map without the plan's name uses them
    session = Session.from_program(planned, 1, executor="reference")
    session.set_precision("mixed")
    twin = copy.deepcopy(fitted).double().eval()
    with torch.no_grad():
        expected = twin(normalised(codes)).numpy()
    np.testing.assert_allclose(session.run(codes.numpy()), expected, rtol=1e-5, atol=1e-6)


def test_artifact_reads_the_plans_factors_and_what_is_missing(setup: Setup, tmp_path: Path) -> None:
    model, program, batches = setup
    planned = add_plan(program, model, "mixed", MAP, batches)
    planned = add_plan(planned, model, "low.first", {**MAP, "conv1": 2, "plain": 1}, batches)
    bs.pack(planned, tmp_path / "n.strata")
    codes = images((3, 8, 8)).numpy()
    session = runtime.load(tmp_path / "n.strata", 1, executor="reference")
    start = [name for name, _ in session.reads]
    session.set_precision("mixed")
    added = [name for name, _ in session.reads[len(start) :]]
    assert sorted(added) == sorted(
        ["factors-mixed.safetensors", "factors-2.safetensors", "factors-4.safetensors"]
        + [f"stratum-{plane}.safetensors" for plane in (2, 3, 4)]
    )
    expected = Session.from_program(planned, "mixed", executor="reference").run_raw(codes)
    np.testing.assert_array_equal(session.run_raw(codes), expected)
    count = len(session.reads)
    session.set_precision("low.first")
    assert [name for name, _ in session.reads[count:]] == ["factors-low.first.safetensors"]
    assert runtime.load(tmp_path / "n.strata", "mixed", executor="reference").precision_map == MAP


def test_uniform_plan_at_a_precision_differs_in_statistics_alone(setup: Setup) -> None:
    model, program, batches = setup
    planned = add_plan(program, model, "two", dict.fromkeys(MAP, 2), batches)
    fitted = reestimated(model, dict.fromkeys(MAP, 2), batches)
    direct = copy.deepcopy(model)
    bs.reestimate_batchnorm_(direct, batches, precisions=[2])
    for name, value in fitted.state_dict().items():
        torch.testing.assert_close(value, direct.state_dict()[name], rtol=0, atol=0)
    assert bs.verify(fitted, planned, images((3, 8, 8)), at=["two"], isas=()).ok


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("mixed", {k: v for k, v in MAP.items() if k != "plain"}, r"plan 'mixed': .*missing \['plain'\]"),
        ("mixed", {**MAP, "other": 1}, r"plan 'mixed': .*unknown \['other'\]"),
        ("mixed", {**MAP, "conv1": 3}, r"plan 'mixed': .*layer 'conv1': no precision 3"),
        ("My plan", MAP, r"plan 'My plan': file name 'factors-My plan.safetensors' is not allowed"),
        ("2", MAP, r"plan '2': its name must be a non-empty string and not a number"),
    ],
)
def test_what_a_plan_cannot_be(setup: Setup, name: str, chosen: dict[str, int], message: str) -> None:
    with pytest.raises(LowerError, match=message):
        add_plan(setup[1], setup[0], name, chosen, setup[2])


def test_name_that_is_taken_no_batches_another_model(setup: Setup) -> None:
    model, program, batches = setup
    planned = add_plan(program, model, "mixed", MAP, [(x, None) for x in batches])
    with pytest.raises(LowerError, match="the program has a plan 'mixed' already"):
        add_plan(planned, model, "mixed", MAP, batches)
    with pytest.raises(LowerError, match="no batches given to estimate the normalizations' statistics on"):
        add_plan(program, model, "empty", MAP, [])
    other: Any = prepared(nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten(), nn.Linear(2, 2)), batches[0])
    with pytest.raises(LowerError, match="no quantized layer named 'stem'"):
        add_plan(program, other, "mixed", MAP, batches)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.bn3.levels["2"].weight += 1e-4
    with pytest.raises(
        LowerError, match="not the one the program was lowered from: its affine 'bn3' at precision 2 is"
    ):
        add_plan(program, trained, "mixed", MAP, batches)
