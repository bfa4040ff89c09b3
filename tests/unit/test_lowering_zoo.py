"""The networks of the zoo, lowered: the integer program is the fake-quantized model, on every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_lowering import assert_equal, images, logits, normalised, prepared
from torch import nn

import bitstrata as bs
from bitstrata_runtime import Program

pytestmark = pytest.mark.filterwarnings("ignore:lower. .* fraction bits:UserWarning")
STRATA = bs.recipes.strata(w=(1, 2, 3, 4))
RECIPES = {
    "strata": STRATA,
    "8 bits, per channel": bs.recipes.strata(w=(2, 4, 8), per_channel=True),
    "wide activations": bs.recipes.strata(w=(1, 2), a=8),
    "lsq": bs.recipes.lsq(4),
    "lsq, per channel": bs.recipes.lsq(3, per_channel=True),
}
NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int]]] = {
    "digits_cnn": ("digits_cnn", {}, (1, 8, 8)),
    "digits_resnet": ("digits_resnet", {"shortcut": "A"}, (1, 8, 8)),
    "resnet20 A": ("resnet20", {"width": 8}, (3, 16, 16)),
    "resnet20 B": ("resnet20", {"width": 8, "shortcut": "B"}, (3, 16, 16)),
    "preact_resnet20": ("preact_resnet20", {"width": 8}, (3, 16, 16)),
    "resnet18": ("resnet18", {"width": 8}, (3, 32, 32)),
    "mobilenet_v2": ("mobilenet_v2", {"width": 0.1, "stem": "cifar"}, (3, 16, 16)),
}


def make(name: str, recipe: bs.Recipe = STRATA) -> tuple[nn.Module, Program, torch.Tensor]:
    torch.manual_seed(0)
    network, options, shape = NETWORKS[name]
    codes = images(shape, count=2)
    model = prepared(bs.zoo.create(network, **options), normalised(codes), recipe, pixels=True)
    return model, bs.lower(model, normalised(codes)), codes


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str) -> None:
    assert_equal(*make(name))


@pytest.mark.parametrize("recipe", list(RECIPES)[1:])
def test_recipe(recipe: str) -> None:
    model, program, codes = make("digits_resnet", RECIPES[recipe])
    assert program.precisions == RECIPES[recipe].precisions
    assert_equal(model, program, codes)


@pytest.mark.parametrize("name", ["digits_resnet", "preact_resnet20"])
@pytest.mark.parametrize("seed", [0, 1])
def test_precisions_of_layers_mixed(name: str, seed: int) -> None:
    """A per-layer map means in the program what `set_precision` with the same map means in the model."""
    model, program, codes = make(name)
    drawn = torch.randint(1, 5, (len(program.layers),), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = dict(zip(program.layers, drawn, strict=True))
    report = bs.verify(model, program, codes, at=[chosen])
    assert report.ok, str(report)
    mine, theirs = logits(model, program, codes, chosen)
    assert abs(mine - theirs).max() < 1e-6 * max(1.0, abs(theirs).max())
    uniform, _ = logits(model, program, codes, 1)
    assert abs(mine - uniform).max() > 1e-3


def test_values_are_named_by_modules() -> None:
    _, program, _ = make("digits_resnet")
    names = [node.name for node in program.nodes]
    assert names == [
        "input", "conv1", "layer1.0.conv1.input", "layer1.0.conv1", "layer1.0.conv2.input", "layer1.0.conv2",
        "layer1.0.conv2.fixed", "conv1.fixed", "layer1.0.add", "layer2.0.conv1.input", "layer2.0.conv1",
        "layer2.0.conv2.input", "layer2.0.conv2", "layer1.0.add.clip", "layer2.0.shortcut.slice",
        "layer2.0.shortcut.pad", "layer2.0.conv2.fixed", "layer2.0.add", "layer2.0.add.clip", "pool", "flatten",
        "linear.input", "linear", "logits",
    ]  # fmt: skip
    assert program.output == "logits"


def test_summary_of_a_program() -> None:
    _, program, _ = make("digits_cnn")
    lines = bs.program_summary(program).splitlines()
    assert lines[0].split() == [
        "layer",
        "kind",
        "weight",
        "shape",
        "grid",
        "stored",
        *(f"headroom@{p}" for p in (1, 2, 3, 4)),
    ]
    assert [line.split()[0] for line in lines[1:-1]] == ["0", "3", "6", "11"]
    assert lines[1].split()[1:6] == ["conv", "16x1x3x3", "LSQWeight", "8", "bit"]
    assert lines[-1].startswith("12 integer operations, 15,248 weights, input pixels 1x8x8; accumulators proved within")
