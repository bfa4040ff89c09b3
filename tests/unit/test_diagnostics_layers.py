"""Signals, training rules, objectives and code flips, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.diagnostics import (
    CodeFlips,
    layer_signals,
    nonzero_activations,
    nonzero_weights,
    objective_geometry,
    training_rules,
)
from bitstrata.prepare.precision import quantized_layers


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(n: int = 16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(n, 3, 8, 8), torch.arange(n) % 10


def network(recipe: bs.Recipe | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, bias=False),
        nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip
    if recipe is not None:
        bs.quantize_(model, recipe, batch()[0])
        bs.calibrate_(model, [batch()[0]])
    return model


def test_kappas_of_a_float_chain_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(8, 6, bias=False), nn.Linear(6, 4, bias=False)
    model = nn.Sequential(first, second)
    data = torch.randn(32, 8), torch.arange(32) % 4
    found = training_rules(model, loss, data)
    loss(model, data).backward()
    assert first.weight.grad is not None
    assert second.weight.grad is not None
    v1, v2 = (float(w.detach().double().square().mean()) for w in (first.weight, second.weight))
    g1, g2 = (float(w.grad.double().square().mean()) for w in (first.weight, second.weight))
    assert found.kappa0 == pytest.approx(6 * v2)
    assert found.layers["0"].kappa1 == pytest.approx(8 * v1 / (4 * v2) * g1 / g2)
    assert found.layers["1"].kappa1 is None
    assert found.layers["0"].ratio == 1


@pytest.mark.parametrize(("features", "expected"), [(512, 0.010449), (2048, 0.041796)])
def test_kappa0_of_the_papers_last_layers(features: int, expected: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, features, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 1000))
    nn.init.normal_(model[3].weight, 0, 1000**-0.5)
    found = training_rules(model, loss, (torch.rand(2, 1, 7, 7), torch.tensor([1, 2])))
    assert found.kappa0 == pytest.approx(expected, rel=0.01)
    assert found.first
    assert "Rule I holds" in found.explain()
    with torch.no_grad():
        model[3].weight.mul_(20)
    broken = training_rules(model, loss, (torch.rand(2, 1, 7, 7), torch.tensor([1, 2])))
    assert not broken.first
    assert "saturate the softmax" in broken.explain()


def test_rules_of_a_quantized_network_use_its_quantized_weights_and_leave_it_alone() -> None:
    model = network(bs.recipes.uniq(2)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = training_rules(model, loss, batch())
    w = model[3].quantized_weight().detach().double()
    assert found.layers["3"].variance == pytest.approx(float(w.square().mean()))
    assert found.layers["3"].ratio == pytest.approx(
        float(w.square().mean() / model[3].weight.detach().double().square().mean())
    )
    assert found.layers["3"].pool == 36  # 6x6 positions averaged to one
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(q.grad is None for q in model.parameters())


def test_signals_are_those_of_the_grid() -> None:
    model = network(bs.recipes.lsq(3))
    layer = model[3]
    with torch.no_grad():
        layer.weight.fill_(0.25)
        layer.weight[0] = 10.0
        layer.weight[1] = -0.26
        layer.weight_quant.step.fill_(0.25)
    found = layer_signals(model, [batch()[0]])["3"]
    assert found.weight.lo == -4
    size = layer.weight.numel() // 12
    assert found.weight.counts == (0, 0, 0, size, 0, 10 * size, 0, size)
    assert found.weight.clipped == pytest.approx(1 / 12)
    assert found.weight.nonzero == 1
    assert found.weight.step == 0.25
    values = torch.cat([torch.full((size,), v, dtype=torch.float64) for v in (10.0, -0.26, *[0.25] * 10)])
    error = (9.25**2 + 0.01**2) / 12
    assert found.weight.sqnr == pytest.approx(10 * math.log10(float(values.var(correction=0)) / error), rel=1e-5)
    assert found.input is not None
    assert sum(found.input.counts) == 16 * 8 * 64
    assert not math.isnan(found.input.sqnr)


def test_flips_name_the_planes_that_change() -> None:
    model = network(bs.recipes.strata(w=(1, 2, 3)))
    flips = CodeFlips(model)
    assert all(shares == (0, 0, 0) or set(shares) == {0.0} for shares in flips.update().values())
    layer = model[3]
    with torch.no_grad():
        step = float(layer.weight_quant.step)
        layer.weight.fill_(0.5 * step)
    flips.update()
    with torch.no_grad():
        layer.weight.fill_(1.5 * step)  # code 0 becomes 1: of the planes of c + 4, only the last changes
    assert flips.update()["3"] == (0, 0, 1)
    with torch.no_grad():
        layer.weight.fill_(-0.5 * step)  # 101 becomes 011
    assert flips.update()["3"] == (1, 1, 0)


def test_geometry_is_that_of_the_shared_gradients() -> None:
    model = network(bs.recipes.strata(w=(1, 2))).train()
    found = objective_geometry(model, loss, batch())
    assert found.precisions == (1, 2)
    assert sum(found.factors) == pytest.approx(1)
    assert found.cosines.diagonal().tolist() == pytest.approx([1, 1])
    shared = [
        q for q in model.parameters() if all(q is not o for g in bs.precision_parameters(model).values() for o in g)
    ]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with bs.precision(model, 1):
        grads = torch.autograd.grad(loss(model, batch()), shared, allow_unused=True)
    model.load_state_dict(state)
    norm = sum(float(g.double().square().sum()) for g in grads if g is not None) ** 0.5
    assert found.norms[0] == pytest.approx(norm, rel=1e-5)


@pytest.mark.filterwarnings("ignore:quantize_")
def test_nonzero_ratios_of_ternary_weights() -> None:
    model = network(bs.recipes.maqd(3, 2, norm="batch"))
    found = nonzero_weights(model)
    codes = {name: layer.weight_codes() for name, layer in quantized_layers(model).items()}
    total = sum(c.numel() for c in codes.values())
    assert found.pooled == pytest.approx(sum(int(c.count_nonzero()) for c in codes.values()) / total)
    inputs = nonzero_activations(model, [batch()[0]])
    assert set(inputs.layers) == {"3", "8"}
    assert 0 < inputs.pooled < 1


def test_models_that_tell_nothing() -> None:
    plain = network(None)
    with pytest.raises(ValueError, match="layer_signals: the model has no quantized layers"):
        layer_signals(plain)
    with pytest.raises(ValueError, match="CodeFlips: the model has no quantized layers"):
        CodeFlips(plain)
    with pytest.raises(ValueError, match="several precisions, it has \\(\\)"):
        objective_geometry(plain, loss, batch())
    with pytest.raises(ValueError, match="has no Linear, Conv1d or Conv2d layer"):
        nonzero_weights(nn.ReLU())
    with pytest.raises(ValueError, match="no batches"):
        nonzero_activations(plain, [])
