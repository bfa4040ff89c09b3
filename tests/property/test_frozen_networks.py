"""Random networks that train in integers: frozen and lowered, program, engine and network agree in every code."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_lowering import randomize_
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from property.random_networks import Case, cases
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.lowering import LowerError
from bitstrata.prepare import freezable_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:lower. .* fraction bits:UserWarning", "ignore:Using padding='same'", "ignore:.*inputs below zero meet"
)
QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
SHORT = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=QUIET)
LONG = settings(max_examples=400, deadline=None, suppress_health_check=QUIET)
OPTIONS = st.fixed_dictionaries(
    {
        "w": st.integers(2, 8),
        "a": st.integers(2, 8),
        "g": st.just(8),
        "groups": st.integers(1, 8),
        "edge_bits": st.integers(2, 8),
        "norm": st.sampled_from(["l1_quantized", "l2_quantized", "l1", "batch"]),
        "unsigned_nonneg": st.booleans(),
    }
)


def spread_(model: nn.Module, generator: torch.Generator) -> None:
    """Output channels of very different sizes, so that the layers behind have exponents."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
                places = torch.randint(0, 6, (len(layer.weight),), generator=generator)
                layer.weight.mul_(torch.exp2(-places.float()).reshape(-1, *[1] * (layer.weight.dim() - 1)))


def check_frozen(case: Case, options: dict[str, object]) -> None:
    note(f"{case!r}\n{options}")
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(6, *case.shape, generator=generator)
    model = randomized(case, x, options, generator)
    bs.freeze_(model, [x])
    try:
        program = bs.lower(model, x)
    except LowerError as error:
        assume("its input was zero in every batch" not in str(error))
        raise
    report = bs.verify(model, program, x.double())
    assert report.ok, str(report)
    twin, exact = bs.lowering.double_copy(model), model.double()
    with torch.no_grad():
        ours, theirs = twin(x.double()), exact(x.double())
    # the same sums in another order: a code may flip where a quotient falls on a tie
    same = torch.isclose(ours, theirs, rtol=1e-9, atol=1e-9 * max(float(theirs.abs().max()), 1e-9))
    assert math.isclose(float(same.double().mean()), 1.0, abs_tol=0.05)


def randomized(case: Case, x: Tensor, options: dict[str, object], generator: torch.Generator) -> nn.Module:
    model = case.model
    randomize_(model, case.seed)
    spread_(model, generator)
    bs.integer_(model, x[:2], **options)
    model.train()
    with torch.no_grad():
        model(x)
    assume(bool(freezable_layers(model)))
    return model.eval()


@SHORT
@given(cases(), OPTIONS)
def test_frozen_networks(case: Case, options: dict[str, object]) -> None:
    check_frozen(case, options)


@pytest.mark.soak
@LONG
@given(cases(), OPTIONS)
def test_many_frozen_networks(case: Case, options: dict[str, object]) -> None:
    check_frozen(case, options)
