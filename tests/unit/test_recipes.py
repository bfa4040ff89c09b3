"""Recipes: what they hold, how they are found by name, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest

from bitstrata import objectives, recipes
from bitstrata.recipes import Part, Recipe, base
from bitstrata.train import TrainConfig


def test_names_are_listed_with_descriptions():
    assert recipes.names() == tuple(sorted(recipes.names()))
    assert {"strata", "lsq"} <= set(recipes.names())
    for name in recipes.names():
        recipe = recipes.get(name)
        assert recipe.name == name
        assert recipe.description == base.describe(name).description
        assert f"{name}: {recipe.description}" in str(recipe)


def test_strata_defaults():
    recipe = recipes.strata()
    assert recipe == recipes.get("strata")
    assert recipe.precisions == (1, 2, 3, 4)
    assert recipe.activation_bits == {1: 1, 2: 2, 3: 3, 4: 4}
    assert (recipe.weight.name, recipe.activation.name) == ("nested", "uniq")
    assert (recipe.edge_weight.name, recipe.edge_activation.name, recipe.edge_bits) == ("lsq", "lsq", 8)
    assert (recipe.objective.distill, recipe.per_channel) == ("cosine", False)


def test_widths_in_any_order():
    assert recipes.strata(w=[4, 2, 2]).precisions == (2, 4)


@pytest.mark.parametrize(
    ("a", "expected"), [("same", {2: 2, 4: 4}), (8, {2: 8, 4: 8}), ({2: 3, 4: 8}, {2: 3, 4: 8}), (None, {})]
)
def test_activation_widths(a, expected):
    recipe = recipes.strata(w=(2, 4), a=a)
    assert recipe.activation_bits == expected
    assert (recipe.activation is None) == (a is None)


def test_lsq_has_one_precision():
    recipe = recipes.lsq(3, a=8)
    assert (recipe.precisions, recipe.activation_bits, recipe.objective.distill) == ((3,), {3: 8}, None)
    assert recipes.lsq(a=None).activation is None


def test_the_text_names_everything():
    text = str(recipes.strata(w=(1, 4), a=8, per_channel=True, edges="float", distill=None))
    for line in (
        "precisions   w1a8, w4a8",
        "weights      nested(scales='free', target_db=25.0), one step an output channel",
        "activations  uniq()",
        "edges        float",
        "batch norm   statistics and affine of its own at every precision",
        "objective    cross_entropy, mean over precisions by scalarization",
        "schedule     90 epochs of 128, sgd lr 0.02 cosine, weight decay 0.0005 on all",
    ):
        assert line in text
    text = str(recipes.lsq(2, a=None))
    assert "precisions   w2af" in text
    assert "activations  float" in text
    assert "edges        8 bits, lsq() x lsq(numel='sample', init='lsq')" in text
    assert "weights      lsq(init='lsq'), one step a tensor" in text


def test_recipes_are_frozen_and_replaceable():
    recipe = recipes.strata()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.edge_bits = 4
    assert dataclasses.replace(recipe, edge_bits=4).edge_bits == 4
    mixed = dataclasses.replace(recipe, activation=Part("lsq", "activation", {"numel": "batch"}))
    assert "activations  lsq(numel='batch')" in str(mixed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: recipes.strata(w=()),
            r"Recipe 'strata': precisions must be ascending whole numbers within 1\.\.8, got \(\)",
        ),
        (lambda: recipes.strata(w=(0, 2)), r"Recipe 'strata': precisions must be .* within 1\.\.8, got \(0, 2\)"),
        (lambda: recipes.strata(w=(2, 9)), r"Recipe 'strata': precisions must be .* within 1\.\.8, got \(2, 9\)"),
        (lambda: recipes.strata(w=(2,), a=9), r"Recipe 'strata': activation width must be 1\.\.8, got 9 at 2"),
        (lambda: recipes.strata(w=(2,), a=0), r"Recipe 'strata': activation width must be 1\.\.8, got 0 at 2"),
        (lambda: recipes.strata(w=(2,), a={2: 2.5}), r"activation width must be 1\.\.8, got 2\.5 at 2"),
        (
            lambda: recipes.strata(w=(2, 4), a={2: 2}),
            r"Recipe 'strata': activation_bits must have the keys \(2, 4\), got \[2\]",
        ),
        (lambda: recipes.strata(a="half"), r"recipe: a must be 'same', a width, a map .* or None, got 'half'"),
        (lambda: recipes.strata(a=True), r"recipe: a must be 'same', a width, a map .* or None, got True"),
        (lambda: recipes.strata(edge_bits=1), r"Recipe 'strata': edge_bits must be 2\.\.8, got 1"),
        (lambda: recipes.lsq(edge_bits=9), r"Recipe 'lsq': edge_bits must be 2\.\.8, got 9"),
        (lambda: recipes.strata(distill="l2"), r"Objective: distill must be one of 'cosine', 'kl', None, got 'l2'"),
        (lambda: recipes.get("stratum"), r"no recipe named 'stratum'; there are: .*strata.*; did you mean 'strata'\?"),
        (lambda: recipes.get("qqq"), r"no recipe named 'qqq'; there are: adabits, .*, vertical$"),
        (
            lambda: recipes.get("lsq", bits=4, w=(1, 2)),
            r"recipe 'lsq' has no field 'w'; it has: bits, a, per_channel, numel, init, edges, edge_bits",
        ),
        (
            lambda: Part("nested", "weight", {"depth": 1}),
            r"'nested' has no option 'depth'; it has: scales, target_db$",
        ),
        (lambda: Part("pixel", "input"), r"no input quantizer named 'pixel'; .* did you mean 'pixels'\?"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match=r"register: a recipe named 'lsq' exists"):
        recipes.register("lsq", "again")(recipes.lsq)


def test_precisions_must_ascend():
    fields = {f.name: getattr(recipes.strata(), f.name) for f in dataclasses.fields(Recipe)}
    with pytest.raises(ValueError, match=r"precisions must be ascending whole numbers within 1\.\.8, got \(4, 2\)"):
        Recipe(**{**fields, "precisions": (4, 2)})


def changed(**fields):
    return lambda: dataclasses.replace(recipes.strata(w=(2, 4)), **fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed(weight=Part("lsq", "activation")), r"weight must be a part for weights, got lsq\(\) for activations"),
        (changed(transform=Part("constant", "rescale")), r"transform must be a part for transforms, got constant"),
        (changed(weight=Part("maqd", "weight")), r"'maqd' weight quantizer .* needs transform='standardize', got None"),
        (
            changed(weight=Part("dorefa", "weight"), transform=Part("tanh", "transform")),
            r"'dorefa' weight quantizer clamps by tanh itself; leave transform='tanh' out",
        ),
        (changed(edge_weight=Part("maqd", "weight")), r"needs transform='standardize', got None"),
        (changed(placement="activation"), r"puts the quantizer in the ReLU's place, but 'uniq' is no quantizer of"),
        (
            changed(placement="activation", activation=None, activation_bits={}),
            r"placement='activation' needs an activation quantizer, and activation is None",
        ),
        (changed(placement="output"), r"Recipe 'strata': placement must be one of 'input', 'activation', got 'output'"),
        (changed(edges="none"), r"edges must be one of 'int8', 'inner', 'float', got 'none'"),
        (changed(norm="group"), r"norm must be one of 'batch', 'layer_batch', 'l1', .* got 'group'"),
        (changed(norm_levels="own"), r"norm_levels must be one of 'individual', 'statistics', 'shared', got 'own'"),
        (changed(weight=Part("lsq", "weight")), r"LSQWeight: one width for all precisions, got \[2, 4\]"),
        (lambda: recipes.lsq(1), r"LSQWeight: undefined at 1 bit"),
        (lambda: recipes.vertical(bits=(1, 2)), r"2"),
        (lambda: recipes.maqd(4), r"states must be an odd integer of at least 3, got 4"),
        (lambda: recipes.maqd(3, 1), r"maqd: m_a must be a whole number of states, 2\.\.256, or None, got 1"),
        (lambda: recipes.maqd(3, 257), r"maqd: m_a must be .* got 257"),
        (lambda: recipes.maqd(3, 2.5), r"maqd: m_a must be .* got 2\.5"),
        (lambda: recipes.maqd(3, "3"), r"maqd: m_a must be .* got '3'"),
        (lambda: recipes.strata(0), r"strata: weight widths must be several numbers of bits such as \(2, 4\), got 0"),
        (lambda: recipes.vertical("234"), r"vertical: weight widths must be several numbers .* got '234'"),
        (
            lambda: dataclasses.replace(recipes.lsq(4), own_edges=True),
            r"own_edges gives every precision its edge layers, but there is one precision only",
        ),
        (lambda: recipes.Objective(gamma=2.0), r"Objective: gamma must lie in 0\.\.1, got 2\.0"),
        (lambda: recipes.Objective(combine="sum"), r"Objective: combine must be one of 'scalarization', 'mgd'"),
    ],
)
def test_compositions_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_trains_by_its_own_settings(name):
    """Objective and schedule are fields of TrainConfig, and weight-only forms exist."""
    config = TrainConfig.from_recipe(recipes.get(name), epochs=7)
    assert config.epochs == 7
    for key, value in recipes.get(name).training.items():
        if key != "epochs":
            assert getattr(config, key) == value
    if not recipes.get(name).integers:
        only = {"m_a": None} if name == "maqd" else {"a": None}
        assert recipes.get(name, **only).activation is None


def test_one_bit_uniq_warms_up_with_adam():
    assert recipes.uniq(1).schedule.warmup_lr == 0.001
    assert recipes.uniq(1).schedule.optimizer == "adam"
    assert recipes.uniq(1, warmup=False).schedule.optimizer == "sgd"
    assert recipes.uniq(2).schedule.warmup == 0


def test_names_of_objectives_are_those_that_exist():
    for loss in objectives.LOSSES:
        recipes.Objective(loss=loss)
    for distill in objectives.DISTILLATIONS:
        recipes.Objective(distill=distill)
