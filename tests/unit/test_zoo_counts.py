"""Parameter counts of the networks, against published numbers and against what their docstrings say."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import nn

from bitstrata import zoo

UNIQ_MOBILENET = {"first_expansion": True, "conv_classifier": True}
LITERAL = {"stem": "literal", "final_act": False}

# classes, options, all parameters
COUNTS: list[tuple[str, int, dict[str, Any], int]] = [
    ("digits_cnn", 10, {}, 15_418),
    ("digits_resnet", 10, {}, 20_666),
    ("resnet20", 10, {}, 269_722),
    ("resnet20", 10, {"shortcut": "B"}, 269_722 + 16 * 32 + 64 + 32 * 64 + 128),
    ("resnet32", 10, {}, 464_154),
    ("resnet44", 10, {}, 658_586),
    ("resnet56", 10, {}, 853_018),
    ("preact_resnet20", 10, {}, 272_282),
    ("preact_resnet32", 100, {}, 472_564),
    ("preact_resnet32", 100, {"proj_input": "raw"}, 472_564),
    ("preact_resnet56", 10, {}, 855_578),
    ("resnet18", 1000, {}, 11_689_512),
    ("resnet18", 10, {"stem": "cifar"}, 11_173_962),
    ("resnet34", 1000, {}, 21_797_672),
    ("resnet34", 10, {"stem": "cifar"}, 21_282_122),
    ("resnet50", 1000, {}, 25_557_032),
    ("resnet50", 10, {"stem": "cifar"}, 23_520_842),
    ("preact_resnet18", 1000, {}, 11_687_848),
    ("preact_resnet18", 10, {"stem": "cifar"}, 11_172_170),
    ("preact_resnet34", 1000, {}, 21_796_008),
    ("preact_resnet50", 1000, {}, 25_549_480),
    ("preact_resnet50", 1000, {"proj_input": "preact"}, 25_549_480),
    ("mobilenet_v1", 1000, {}, 4_231_976),
    ("mobilenet_v2", 1000, {}, 3_504_872),
    ("mobilenet_v2", 1000, {"relu6": False}, 3_504_872),
    ("mobilenet_v2", 1000, UNIQ_MOBILENET, 3_504_960),
    ("mobilenet_v2", 1000, {"first_expansion": True}, 3_504_872 + 32 * 32 + 2 * 32),
    ("mobilenet_v2", 1000, {"conv_classifier": True}, 3_504_872 - 1000),
    ("vgg16_bn", 1000, {}, 138_365_992),
    ("vgg16_bn", 10, {"stem": "cifar"}, 14_728_266),
    ("vgg16_bn", 10, {"stem": "cifar", "hidden": 8}, 14_728_266),
    ("maqd_vgg", 10, {}, 20_024_000 + 11_028),
    ("maqd_vgg", 100, {}, 20_070_080 + 11_208),
    ("maqd_preact_resnet", 10, {}, 21_088_960 + 26_772),
    ("maqd_preact_resnet", 10, LITERAL, 21_048_192 + 25_504),
    ("maqd_cnn9", 100, {}, 2_324_160 + 2_816 + 25_700),
    ("vit_cifar", 10, {}, 48 * 192 + 192 + 64 * 192 + 6 * (12 * 192**2 + 13 * 192) + 2 * 192 + 1_930),
]

# classes, options, weights of convolutions, of their batch norms' affine maps
PARTS: list[tuple[str, int, dict[str, Any], int, int]] = [
    ("maqd_vgg", 10, {}, 20_024_000, 11_028),
    ("maqd_vgg", 100, {}, 20_070_080, 11_208),
    ("maqd_preact_resnet", 10, {}, 21_088_960, 26_772),
    ("maqd_preact_resnet", 10, LITERAL, 21_048_192, 25_504),
    ("maqd_preact_resnet", 10, {"stem": "literal"}, 21_048_192, 25_504 + 2 * 512),
    ("maqd_preact_resnet", 10, {"final_act": False}, 21_088_960, 26_772 - 2 * 512),
    (
        "maqd_preact_resnet",
        10,
        {"shortcut_kernel": 3},
        21_088_960 + 8 * 64 * (64 + 2 * 64 + 8 * 64 + 16 * 64 + 32 * 64 + 3 * 64 * 64),
        26_772,
    ),
    ("maqd_cnn9", 100, {}, 9 * (3 * 64 + 64**2 + 64 * 128 + 128**2 + 128 * 256 + 3 * 256**2), 2 * 1408),
    ("resnet18", 1000, {}, 11_166_912, 2 * 4800),
    ("resnet34", 1000, {}, 21_267_648, 2 * 8512),
    ("resnet50", 1000, {}, 23_454_912, 53_120),
]


def build(name: str, classes: int, options: dict[str, Any]) -> nn.Module:
    """The network without storage: shapes are all that counting needs."""
    with torch.device("meta"):
        return zoo.create(name, classes, **options)


def parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(("name", "classes", "options", "count"), COUNTS)
def test_all_parameters(name: str, classes: int, options: dict[str, Any], count: int) -> None:
    assert parameters(build(name, classes, options)) == count


@pytest.mark.parametrize(("name", "classes", "options", "convolutions", "affine"), PARTS)
def test_convolutions_and_affine_maps(
    name: str, classes: int, options: dict[str, Any], convolutions: int, affine: int
) -> None:
    modules = list(build(name, classes, options).modules())
    assert parameters(*(m for m in modules if isinstance(m, nn.Conv2d))) == convolutions
    assert parameters(*(m for m in modules if isinstance(m, nn.BatchNorm2d))) == affine


def test_counts_cover_every_network() -> None:
    assert {name for name, *_ in COUNTS} == set(zoo.names())
    assert all(zoo.get(name).description and zoo.get(name).name == name for name in zoo.names())


@pytest.mark.parametrize("name", zoo.names())
def test_docstrings_tell_counts(name: str) -> None:
    """Every number of five digits or more in a builder's docstring is one of the counts above."""
    said = re.findall(r"\d+(?:,\d{3})+", inspect.getdoc(zoo.get(name).build) or "")
    numbers = {int(number.replace(",", "")) for number in said} - {1000}
    assert numbers
    assert numbers <= {count for known, *_, count in COUNTS if known == name}


def test_widths_of_mobilenets_are_multiples_of_eight() -> None:
    for name in ("mobilenet_v1", "mobilenet_v2"):
        with torch.device("meta"):
            model = zoo.create(name, 10, width=0.3)
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert all(m.out_channels % 8 == 0 for m in convolutions)
        assert convolutions[0].out_channels == 16  # 9.6 rounds to 8, which is under nine tenths of it
