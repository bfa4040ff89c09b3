"""The float network that a recipe starts from: clamped, standardized or layer-batch-normalized, nothing quantized."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bitstrata as bs
from bitstrata.functional import clamped_weight, tanh_normalize
from bitstrata.functional.sat import sat_gain
from bitstrata.quantizers import build_transform


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.bare = nn.Conv2d(4, 4, 3, padding=1)
        self.act2 = nn.ReLU()
        self.last = nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act2(self.bare(self.act(self.norm(self.first(x))))).flatten(1))


def net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(6, 3, 4, 4)


def test_sat_clamps_all_and_rescales_what_no_normalization_follows():
    model, x = net()
    raw = {name: p.detach().clone() for name, p in model.named_parameters()}
    bs.float_form_(model, bs.recipes.sat(4), x)
    assert torch.equal(model.first.weight, tanh_normalize(raw["first.weight"]))
    assert torch.equal(model.bare.weight, clamped_weight(raw["bare.weight"]))
    assert torch.equal(model.last.weight, clamped_weight(raw["last.weight"]))
    model, x = net()
    bs.float_form_(model, bs.recipes.sat(4, convs="all"), x)
    assert torch.equal(model.first.weight, clamped_weight(raw["first.weight"]))
    model, x = net()
    bs.float_form_(model, bs.recipes.sat(4, rescale="stddev"), x)
    torch.testing.assert_close(model.last.weight.square().mean(), raw["last.weight"].square().mean())
    assert torch.equal(model.first.weight, tanh_normalize(raw["first.weight"]))


def test_a_layer_that_a_sum_reads_too_is_rescaled():
    """The stem of a pre-activation network feeds a normalization and the residual stream."""
    model = bs.zoo.create("preact_resnet20", width=4)
    x = torch.randn(2, 3, 16, 16)
    bs.quantize_(model, bs.recipes.sat(4), x)
    rescaled = {n: m.weight_quant.applies(m.weight) for n, m in model.named_modules() if hasattr(m, "weight_quant")}
    assert rescaled["conv1"]
    assert rescaled["linear"]
    assert rescaled["layer1.0.conv2"]  # its sum with the shortcut is normalized, not its output
    assert not rescaled["layer1.0.conv1"]


def test_the_filter_leaves_layers_alone():
    model, x = net()
    bs.float_form_(model, bs.recipes.maqd(3, 2), x, filter=lambda name, layer: not isinstance(layer, nn.Linear))
    assert hasattr(model.first, "parametrizations")
    assert not hasattr(model.last, "parametrizations")


def test_maqd_standardizes_and_normalizes_over_layer_and_batch():
    model, x = net()
    raw = model.last.weight.detach().clone()
    bs.float_form_(model, bs.recipes.maqd(3, 2), x)
    assert isinstance(model.norm, bs.nn.LayerBatchNorm2d)
    assert torch.equal(model.last.weight, build_transform("standardize", {})(raw))
    torch.testing.assert_close(model.first.weight.std(dim=(1, 2, 3), correction=0), torch.ones(4), rtol=1e-3, atol=0)


def test_recipes_without_a_transform_leave_the_float_network_alone():
    for recipe in (bs.recipes.lsq(4), bs.recipes.strata(), bs.recipes.pact(2), bs.recipes.sat(4, rescale=None)):
        model, x = net()
        before = copy.deepcopy(model)
        bs.float_form_(model, recipe, x)
        assert model.state_dict().keys() == before.state_dict().keys()
        assert torch.equal(model.eval()(x), before.eval()(x))


@pytest.mark.parametrize("recipe", [bs.recipes.sat(3), bs.recipes.maqd(15, 4)], ids=lambda r: r.name)
def test_quantize_goes_on_from_the_same_parameters(recipe):
    model, x = net()
    bs.float_form_(model, recipe, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    trained = {
        name: module.parametrizations["weight"].original.detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "parametrizations")
    }
    assert set(trained) == {"first", "bare", "last"}
    bs.quantize_(model, recipe, x)
    for name, weight in trained.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
        assert type(model.get_submodule(name)).__name__.startswith("Quant")
    plain = net()[0]
    bs.quantize_(plain, recipe, x)
    assert model.state_dict().keys() == plain.state_dict().keys()
    bs.calibrate_(model, [x])
    assert bs.verify(model, bs.lower(model.eval(), x), x).ok


def test_eight_bit_sat_is_near_its_float_form():
    model, x = net()
    recipe = bs.recipes.sat(8, edges="inner", a=None)
    twin = copy.deepcopy(model)
    bs.float_form_(model, recipe, x)
    bs.quantize_(twin, recipe, x)
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), rtol=0.05, atol=0.02)


def test_foreign_reparametrizations_are_left_alone():
    model, x = net()
    parametrizations.weight_norm(model.bare)
    with pytest.raises(ValueError, match=r"float_form_: the weight of 'bare' is reparametrized already"):
        bs.float_form_(model, bs.recipes.sat(4), x)
    bs.quantize_(model, bs.recipes.sat(4), x)
    assert not isinstance(model.bare, bs.nn.QuantizedLayer)
    model, x = net()
    bs.float_form_(model, bs.recipes.sat(4), x)
    with pytest.raises(ValueError, match=r"reparametrized already"):
        bs.float_form_(model, bs.recipes.sat(4), x)


def test_float_edges_stay_as_they_are():
    model, x = net()
    recipe = dataclasses.replace(bs.recipes.sat(4), edges="float")
    bs.float_form_(model, recipe, x)
    assert not hasattr(model.first, "parametrizations")
    assert hasattr(model.bare, "parametrizations")


@pytest.mark.parametrize("prepare", [bs.float_form_, bs.quantize_])
def test_weights_that_rescaling_makes_learn_too_fast_are_warned_of(prepare):
    x, small, natural = torch.randn(2, 3, 32, 32), {}, {"head_std": 10**-0.5}
    with pytest.warns(UserWarning, match=f"{prepare.__name__}: .* weight of 'linear' by 3., .* deviation of 0.32"):
        prepare(bs.zoo.create("resnet20", width=4, **small), bs.recipes.sat(4), x)
    for recipe, options in ((bs.recipes.sat(4), natural), (bs.recipes.cg_pact(4), small)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prepare(bs.zoo.create("resnet20", width=4, **options), recipe, x)


def test_the_gain_is_that_of_the_gradient():
    torch.manual_seed(0)
    w = (torch.randn(10, 64) * 1e-3).requires_grad_()
    clamped_weight(w, detach_max=True).sum().backward()
    assert w.grad.mean() == pytest.approx(sat_gain(w), rel=1e-4)
    assert sat_gain(torch.zeros(3, 2)) == 1


def test_float_forms_that_differ_say_so():
    shown = set()
    recipes = [
        bs.recipes.sat(4),
        bs.recipes.sat(4, convs="all"),
        bs.recipes.sat(4, rescale="stddev"),
        bs.recipes.sat(4, var_mode="std"),
        bs.recipes.maqd(3, 4),
    ]
    for recipe in recipes:
        model, x = net()
        shown.add(str(bs.float_form_(model, recipe, x)))
    assert len(shown) == len(recipes)
