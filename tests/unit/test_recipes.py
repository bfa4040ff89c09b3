"""Recipes: what they hold, how they are found by name, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest

from bitstrata import recipes
from bitstrata.recipes import Part, Recipe, base


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
    assert (recipe.weight.quantizer, recipe.activation.quantizer) == ("nested", "uniq")
    assert (recipe.edge_weight.quantizer, recipe.edge_activation.quantizer, recipe.edge_bits) == ("lsq", "lsq", 8)
    assert (recipe.distill, recipe.per_channel) == ("cosine", False)


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
    assert (recipe.precisions, recipe.activation_bits, recipe.distill) == ((3,), {3: 8}, None)
    assert recipes.lsq(a=None).activation is None


def test_the_text_names_everything():
    text = str(recipes.strata(w=(1, 4), a=8, per_channel=True, edge_bits=None, distill=None))
    for line in (
        "precisions   w1a8, w4a8",
        "weights      nested(scales='free'), one step an output channel",
        "activations  uniq()",
        "edges        float",
        "distillation none",
    ):
        assert line in text
    text = str(recipes.lsq(2, a=None))
    assert "precisions   w2af" in text
    assert "activations  float" in text
    assert "edges        8 bits, lsq() x lsq()" in text
    assert "weights      lsq(), one step a tensor" in text


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
        (lambda: recipes.strata(w=()), r"Recipe 'strata': precisions must be ascending and within 1\.\.8, got \(\)"),
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
        (lambda: recipes.strata(edge_bits=1), r"Recipe 'strata': edge_bits must be 2\.\.8 or None, got 1"),
        (lambda: recipes.lsq(edge_bits=9), r"Recipe 'lsq': edge_bits must be 2\.\.8 or None, got 9"),
        (lambda: recipes.strata(distill="kl"), r"Recipe 'strata': distill must be 'cosine' or None, got 'kl'"),
        (lambda: recipes.get("stratum"), r"no recipe named 'stratum'; there are: .*strata.*; did you mean 'strata'\?"),
        (lambda: recipes.get("qqq"), r"no recipe named 'qqq'; there are: lsq, strata$"),
        (
            lambda: recipes.get("lsq", bits=4, w=(1, 2)),
            r"recipe 'lsq' has no field 'w'; it has: bits, a, per_channel, edge_bits",
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
    with pytest.raises(ValueError, match=r"precisions must be ascending and within 1\.\.8, got \(4, 2\)"):
        Recipe(**{**fields, "precisions": (4, 2)})
