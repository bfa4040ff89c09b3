"""First and last layers with weights of their own at every precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bitstrata.nn.layers import QuantizedLayer, convert
from bitstrata.nn.norm import PrecisionBatchNorm
from bitstrata.nn.own import OwnLayer, collapse_own_
from bitstrata.quantizers import build

PRECISIONS = (1, 2, 4)
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def quantized(inputs: int = 4, outputs: int = 4, *, edge: bool = False) -> QuantizedLayer:
    """A quantized layer for all precisions; an edge layer has 8 bits at each."""
    if edge:
        weight = build("lsq", "weight", {}, bits=dict.fromkeys(PRECISIONS, 8))
    else:
        weight = build("nested", "weight", {}, bits={p: p for p in PRECISIONS})
    return convert(nn.Linear(inputs, outputs), weight, None, edge=edge)


class Network(nn.Module):
    """A first layer of its own at every precision, a normalization, and a middle layer that tells the precision."""

    def __init__(self, *, of_floats: bool = False) -> None:
        super().__init__()
        self.middle = quantized()
        levels = {p: nn.Linear(4, 4) if of_floats else quantized(edge=True) for p in PRECISIONS}
        self.first = OwnLayer(levels, self.middle)
        self.norm = PrecisionBatchNorm(nn.BatchNorm1d(4), PRECISIONS, "first", self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(self.norm(self.first(x)))


def set_all(model: nn.Module, precision: int) -> None:
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.set_precision(precision)


@pytest.mark.parametrize("of_floats", [False, True])
def test_the_level_of_the_followed_layers_precision_runs(of_floats):
    model = Network(of_floats=of_floats)
    outputs = []
    for p in PRECISIONS:
        set_all(model, p)
        assert model.first.precision == model.norm.precision == p
        assert model.first.level is model.first.levels[str(p)]
        outputs.append(model.first(X))
        assert torch.equal(outputs[-1], model.first.levels[str(p)](X))
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == 3
    assert model.first.precisions == PRECISIONS
    assert "precision=4" in repr(model.first)


def test_only_the_running_level_gets_a_gradient():
    model = Network()
    set_all(model, 2)
    model.first(X).square().sum().backward()
    for p, level in model.first.levels.items():
        assert (level.weight.grad is not None) == (p == "2")


def test_parameters_belong_to_their_precision():
    first = Network().first
    found = first.precision_parameters()
    assert sorted(found) == list(PRECISIONS)
    for p, parameters in found.items():
        level = first.levels[str(p)]
        assert {id(q) for q in parameters} == {id(level.weight), id(level.bias), id(level.weight_quant.step)}


def test_the_followed_layer_is_no_part_of_it():
    model = Network()
    assert model.middle not in list(model.first.modules())
    assert {key.split(".")[0] for key in model.first.state_dict()} == {"levels"}
    assert model.first.followed is model.middle


@pytest.mark.parametrize("of_floats", [False, True])
def test_a_float_state_loads_into_every_level(of_floats):
    first, plain = Network(of_floats=of_floats).first, nn.Linear(4, 4)
    with torch.no_grad():
        plain.weight.mul_(5)
    state = plain.state_dict()
    first.load_state_dict(state, strict=True)
    assert set(state) == {"weight", "bias"}  # the caller's dictionary is left as it was
    for level in first.levels.values():
        assert torch.equal(level.weight, plain.weight)
        assert torch.equal(level.bias, plain.bias)
        if not of_floats:  # the steps are those of the new weight
            steps = level.weight_quant.step.clone()
            level.init_weight_steps_()
            assert torch.equal(level.weight_quant.step, steps)
    pointers = {level.weight.data_ptr() for level in first.levels.values()}
    assert len(pointers) == 3


def test_its_own_state_round_trips():
    model, twin = Network(), Network()
    twin.load_state_dict(model.state_dict(), strict=True)
    for p in PRECISIONS:
        for network in (model, twin):
            set_all(network, p)
        assert torch.equal(twin.eval()(X), model.eval()(X))
    broken = model.state_dict()
    del broken["first.levels.2.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*first.levels.2.weight"):
        twin.load_state_dict(broken)


def test_a_copy_follows_its_own_layer():
    model = Network()
    twin = copy.deepcopy(model)
    set_all(twin, 1)
    assert (twin.first.precision, model.first.precision) == (1, 4)
    assert twin.first.followed is twin.middle


def test_training_mode():
    model = Network().eval()
    assert not any(module.training for module in model.first.modules())
    layers = {p: nn.Linear(4, 4).eval() for p in PRECISIONS}
    assert not OwnLayer(layers, model.middle).training


# ---- collapsing


@pytest.mark.parametrize("of_floats", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_collapse_keeps_the_level_under_the_old_name(precision, of_floats):
    model = Network(of_floats=of_floats).eval()
    set_all(model, precision)
    expected, level = model(X), model.first.level
    assert collapse_own_(model, precision) is model
    assert model.first is level
    assert torch.equal(model(X), expected)
    assert not any(isinstance(module, OwnLayer) for module in model.modules())
    assert "first.weight" in model.state_dict()


@pytest.mark.parametrize("kind", ["own layer", "one of its levels"])
def test_what_followed_the_own_layer_follows_the_level_that_stays(kind):
    model = Network()
    if kind == "one of its levels":
        model.norm.follow_(model.first.levels["4"])
    collapse_own_(model, 1)
    assert model.norm.followed is model.first
    set_all(model, 2)
    assert model.norm.precision == 2


def test_what_followed_a_float_level_follows_what_it_followed():
    model = Network(of_floats=True)
    collapse_own_(model, 1)
    assert model.norm.followed is model.middle


def test_a_float_own_layer_behind_a_level_of_another():
    model = Network()
    model.last = OwnLayer({p: nn.Linear(4, 2) for p in PRECISIONS}, model.first.levels["4"])
    model.last_norm = PrecisionBatchNorm(nn.BatchNorm1d(2), PRECISIONS, "last", model.last)
    collapse_own_(model, 2)
    assert model.last_norm.followed is model.first
    assert type(model.last) is nn.Linear


def test_other_normalizations_keep_what_they_follow():
    model = Network()
    model.other = PrecisionBatchNorm(nn.BatchNorm1d(4), PRECISIONS, "middle", model.middle)
    collapse_own_(model, 4)
    assert model.other.followed is model.middle


def test_a_layer_under_two_names():
    model = Network()
    model.again = model.first
    level = model.first.levels["2"]
    collapse_own_(model, 2)
    assert model.again is model.first is level


def test_a_model_without_own_layers_stays():
    model = nn.Sequential(quantized())
    before = list(model.modules())
    assert list(collapse_own_(model, 7).modules()) == before


# ---- errors


def test_a_level_that_is_missing():
    with pytest.raises(
        ValueError, match=r"OwnLayer: no level for precision 2 of the followed layer, .*levels: \(1, 4\)"
    ):
        OwnLayer({1: nn.Linear(4, 4), 4: nn.Linear(4, 4)}, quantized())
    with pytest.raises(ValueError, match=r"OwnLayer: levels must name at least one precision"):
        OwnLayer({}, quantized())


def test_collapse_errors_leave_the_model():
    model = Network()
    with pytest.raises(
        ValueError, match=r"collapse_own_: 3 is not among the precisions \(1, 2, 4\) of own layer 'first'"
    ):
        collapse_own_(model, 3)
    assert isinstance(model.first, OwnLayer)
    with pytest.raises(ValueError, match=r"collapse_own_: the model is a bare OwnLayer; wrap it in nn.Sequential"):
        collapse_own_(model.first, 1)
