"""The recipe for training in integers, and gradient quantizers as parts of other recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bitstrata as bs
from bitstrata.cli import loading
from bitstrata.cli.common import CommandError
from bitstrata.cli.train import Train
from bitstrata.nn import IntegerLayer, L1BatchNorm2d, QuantizedL1BatchNorm2d
from bitstrata.prepare import integer_layers, noise_state
from bitstrata.recipes import Part

R = bs.recipes


def network() -> nn.Module:
    torch.manual_seed(0)
    return bs.zoo.create("digits_resnet", width=8)


def example() -> torch.Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_quantize_with_it_is_integer() -> None:
    recipe = R.shiftquant(5, 6, 3, groups=2, edge_bits=7, seed=11, unsigned_nonneg=True, act_rounding="stochastic")
    ours = bs.quantize_(network(), recipe, example())
    options = {"w": 5, "a": 6, "g": 3, "groups": 2, "edge_bits": 7, "seed": 11, "unsigned_nonneg": True}
    theirs = bs.integer_(network(), example(), **options, act_rounding="stochastic")
    assert noise_state(ours) == noise_state(theirs)
    assert repr(ours) == repr(theirs)
    layers = integer_layers(theirs)
    for name, layer in integer_layers(ours).items():
        assert layer.rule == layers[name].rule
        assert type(layer) is type(layers[name])
    assert isinstance(ours.bn1, QuantizedL1BatchNorm2d)
    x, grads = example(), []
    for model in (ours, theirs):
        torch.manual_seed(3)
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("norm", "kind", "l2"),
    [
        ("l1", QuantizedL1BatchNorm2d, False),
        ("l2", QuantizedL1BatchNorm2d, True),
        ("l1_float", L1BatchNorm2d, None),
        ("batch", nn.BatchNorm2d, None),
    ],
)
def test_normalizations(norm: str, kind: type[nn.Module], l2: bool | None) -> None:
    model = bs.quantize_(network(), R.shiftquant(norm=norm), example())
    assert type(model.bn1) is kind
    assert getattr(model.bn1, "l2", None) is l2


def test_every_option_reaches_the_layers() -> None:
    for field, value, attribute in (
        ("w", 3, "w"),
        ("a", 3, "a"),
        ("g", 3, "g"),
        ("groups", 1, "groups"),
        ("act_rounding", "stochastic", "act_rounding"),
        ("grad_rounding", "nearest", "grad_rounding"),
        ("unsigned_nonneg", True, "unsigned_nonneg"),
        ("on_nonfinite", "skip", "on_nonfinite"),
    ):
        model = bs.quantize_(network(), R.get("shiftquant", **{field: value}), example())
        rule = model.layer1[0].conv1.rule
        assert getattr(rule, attribute) == value
        assert getattr(bs.quantize_(network(), R.shiftquant(), example()).layer1[0].conv1.rule, attribute) != value
    edge = bs.quantize_(network(), R.shiftquant(edge_bits=5), example())
    assert {name for name, layer in integer_layers(edge).items() if layer.rule.g == 5} == {"conv1", "linear"}
    assert R.shiftquant(seed=4).gradient.options["seed"] == 4
    nearest = bs.quantize_(network(), R.shiftquant(grad_rounding="nearest"), example())
    assert nearest.bn1.rounding(torch.tensor([0.6])) == 1.0


def test_the_text_names_everything() -> None:
    recipe = R.get("shiftquant")
    assert recipe.integers
    text = str(recipe)
    for line in (
        "precisions   w4a4",
        "weights      shiftquant(), one step an output channel",
        "activations  shiftquant(groups=4, act_rounding='nearest', unsigned_nonneg=False, clip_ratio=1.0)",
        "gradients    shiftquant(g=4, groups=4, edge_bits=8, rounding='stochastic'",
        "edges        8 bits, shiftquant()",
        "l1-quantized norm",
        "164 epochs of 128, sgd lr 0.1",
    ):
        assert line in text
    mixed = dataclasses.replace(R.uniq(2), gradient=Part("shiftquant", "gradient", {"g": 6}))
    assert not mixed.integers
    assert "gradients    shiftquant(g=6)" in str(mixed)
    assert "gradients" not in str(R.uniq(2))


def changed(**fields: Any) -> Callable[[], bs.Recipe]:
    return lambda: dataclasses.replace(R.shiftquant(), **fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: R.shiftquant(norm="group"), r"shiftquant: norm must be one of 'l1', 'l2', .*, got 'group'"),
        (lambda: R.shiftquant(w=1), r"Recipe 'shiftquant': widths in integers are 2\.\.8, got w=\(1,\)"),
        (lambda: R.shiftquant(a=1), r"widths in integers are 2\.\.8, .* a=\{4: 1\}"),
        (lambda: R.shiftquant(w=9), r"precisions must be ascending whole numbers within 1\.\.8, got \(9,\)"),
        (lambda: R.shiftquant(a="same"), r"activation width must be 1\.\.8, got 'same' at 4"),
        (lambda: R.shiftquant(g=9), r"IntegerRule: g: bits must be an integer in 2\.\.8, got 9"),
        (lambda: R.shiftquant(groups=0), r"groups must be an integer in 1\.\.8, got 0"),
        (lambda: R.shiftquant(edge_bits=1), r"edge_bits must be 2\.\.8, got 1"),
        (lambda: R.shiftquant(act_rounding="up"), r"act_rounding must be one of nearest, stochastic, got 'up'"),
        (changed(gradient=None), r"layers that train in integers need a gradient quantizer, and gradient is None"),
        (
            changed(activation=Part("uniq", "activation")),
            r"quantize weights and activations themselves; .*got activation=",
        ),
        (changed(edge_weight=Part("lsq", "weight")), r"got edge_weight=lsq\(\)"),
        (changed(edge_activation=Part("shiftquant", "integer")), r"must have the same options in integers"),
        (
            changed(transform=Part("standardize", "transform")),
            r"training in integers needs transform=None, got standard",
        ),
        (changed(edges="float"), r"training in integers needs edges='int8', got float"),
        (changed(own_edges=True), r"training in integers needs own_edges=False, got True"),
        (changed(norm="layer_batch"), r"norm='layer_batch' has no form for training in integers"),
        (changed(precisions=(2, 4), activation_bits={2: 2, 4: 4}), r"has one precision, got \(2, 4\)"),
        (
            changed(gradient=Part("shiftquant", "gradient", {"groups": 2, "edge_bits": 8})),
            r"groups must be the same for activations and gradients, got \[2, 4\]",
        ),
        (changed(edge_bits=6), r"edge_bits must be one width, got 6 and the gradient's 8"),
        (
            lambda: dataclasses.replace(R.lsq(4), norm="l1_quantized"),
            r"Recipe 'lsq': norm='l1_quantized' follows the batch in evaluation; it is for recipes that train in",
        ),
        (
            lambda: dataclasses.replace(R.lsq(4), weight=Part("shiftquant", "integer")),
            r"all of weight, edge_weight, activation, edge_activation must be parts for integers",
        ),
        (
            lambda: dataclasses.replace(R.lsq(4), activation=Part("shiftquant", "integer")),
            r"activation=shiftquant\(\) quantizes inside layers that train in integers",
        ),
        (
            lambda: dataclasses.replace(R.lsq(4), gradient=Part("lsq", "weight")),
            r"gradient must be a part for gradients, got lsq\(\) for weights",
        ),
        (
            lambda: Part("shiftquan", "gradient"),
            r"no gradient quantizer named 'shiftquan'; .* did you mean 'shiftquant'",
        ),
    ],
)
def test_compositions_that_make_no_sense(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_pixels_and_quantized_models_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'shiftquant' trains in integers, whose first layer quantizes the normalized"
    ):
        bs.quantize_(network(), R.shiftquant(), example(), input=bs.prepare.Pixels((0.5,), (0.5,)))
    model = bs.quantize_(network(), R.shiftquant(), example())
    with pytest.raises(ValueError, match="the model is quantized or in integers already"):
        bs.quantize_(model, R.shiftquant(), example())


def test_there_is_nothing_to_calibrate() -> None:
    model = bs.quantize_(network(), R.shiftquant(), example())
    with pytest.raises(ValueError, match=r"calibrate_: the model trains in integers, .*; freeze_ fixes them after it"):
        bs.calibrate_(model, [example()])


def test_the_summary_shows_widths_groups_and_frozen_ranges() -> None:
    model = bs.quantize_(network(), R.shiftquant(w=3, a=5, g=6, groups=2), example())
    rows = {row.name: row for row in bs.summary(model).rows}
    row = rows["layer1.0.conv1"]
    assert (row.kind, row.weight, row.input) == ("IntegerConv2d", "ShiftQuant 3", "ShiftQuant 5, 2 groups")
    assert row.note == "trains in integers, gradients 6"
    bs.freeze_(model.eval(), [example()])
    assert "input range frozen" in str(bs.summary(model))
    mixed = dataclasses.replace(R.uniq(4), gradient=Part("shiftquant", "gradient"))
    assert "gradients from integer codes" in str(bs.summary(bs.quantize_(network(), mixed, example())))


def test_the_trainer_takes_it_from_recipe_to_accuracy() -> None:
    model = bs.quantize_(network(), R.shiftquant(), example())
    data = [(torch.randn(8, 1, 8, 8), torch.arange(8)) for _ in range(2)]
    config = bs.TrainConfig.from_recipe(R.shiftquant(), epochs=2)
    before = model.layer1[0].conv1.weight.detach().clone()
    accuracy = bs.Trainer(model, config, data, data).fit()
    assert set(accuracy) == {"float"}
    assert isinstance(model.layer1[0].conv1, IntegerLayer)
    assert not torch.equal(model.layer1[0].conv1.weight, before)


def test_widths_on_the_command_line() -> None:
    recipe = loading.make_recipe(Train(recipe="shiftquant", bits="6", a="5", set=("g=3", "norm=l2")))
    assert (recipe.precisions, recipe.activation_bits, recipe.gradient.options["g"]) == ((6,), {6: 5}, 3)
    assert recipe.norm == "l2_quantized"
    with pytest.raises(CommandError, match="--bits 2,4: recipe 'shiftquant' trains one bit-width at a time"):
        loading.make_recipe(Train(recipe="shiftquant", bits="2,4"))
    assert loading.make_recipe(Train(recipe="strata", bits="2,4")).precisions == (2, 4)
