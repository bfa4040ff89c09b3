"""Which parameters decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitstrata as bs


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    return bs.quantize_(model, bs.recipes.strata(w=(1, 2)), torch.randn(2, 2, 4, 4))


def decayed(model: nn.Module, decay: str) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    with_decay, without = bs.parameter_groups(model, 0.1, decay)
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.1, 0.0)
    assert len(with_decay["params"]) + len(without["params"]) == len(names)
    return {names[id(p)] for p in with_decay["params"]}


WEIGHTS = {"0.weight", "3.weight", "6.weight", "8.weight"}


def test_everything_but_grids_by_default():
    model = network()
    found = decayed(model, "all")
    assert found == {name for name, _ in model.named_parameters() if "_quant." not in name}
    assert {"1.levels.1.weight", "4.levels.2.bias", "0.bias", *WEIGHTS} <= found
    (first, _), (second, _) = bs.parameter_groups(model, 0.1), bs.parameter_groups(model, 0.1, "all")
    assert [id(p) for p in first["params"]] == [id(p) for p in second["params"]]


def test_weights_alone_and_without_depthwise_ones():
    assert decayed(network(), "weights") == WEIGHTS
    assert decayed(network(), "weights_no_depthwise") == WEIGHTS - {"3.weight"}  # groups=2 of 4 channels stays


def test_one_channel_is_no_depthwise_convolution():
    model = nn.Sequential(nn.Conv2d(1, 1, 3))
    decays, _ = bs.parameter_groups(model, 0.1, "weights_no_depthwise")
    assert [id(p) for p in decays["params"]] == [id(model[0].weight)]


def test_a_depthwise_convolution_with_several_outputs_a_channel():
    model = nn.Sequential(nn.Conv2d(2, 6, 3, groups=2, bias=False))
    (only,) = bs.parameter_groups(model, 0.1, "weights_no_depthwise")
    assert only["weight_decay"] == 0.0


def test_tied_parameters_come_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    groups = bs.parameter_groups(model, 0.1, "weights")
    assert sum(len(group["params"]) for group in groups) == 3


def test_steps_and_ratios_do_not_decay():
    model = network()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = bs.parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    found = {names[id(p)] for p in plain["params"]}
    assert found == {name for name in names.values() if "_quant." in name}
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - found
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_groups_hold_what_is_trained():
    model = network()
    for p in model[0].parameters():
        p.requires_grad_(False)
    grouped = [p for group in bs.parameter_groups(model, 0.1) for p in group["params"]]
    assert len(grouped) == sum(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in grouped)
    (only,) = bs.parameter_groups(nn.Linear(2, 2), 0.1)
    assert only["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, "norms"), r"decay must be one of \('all', 'weights', 'weights_no_depthwise'\), got 'norms'$"),
        ((-0.1,), r"^parameter_groups: weight_decay must not be negative, got -0.1$"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        bs.parameter_groups(nn.Linear(2, 2), *arguments)
