"""What quantize_ does with a recipe's placement, edges and normalization settings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitstrata as bs


@pytest.mark.parametrize("own_edges", [False, True])
def test_normalizations_behind_float_layers_still_have_levels(own_edges):
    """What a float layer hands on is quantized differently at every precision from there on, or before."""
    torch.manual_seed(0)
    model = bs.zoo.create("resnet18", width=4, stem="cifar")
    x = torch.randn(4, 3, 8, 8)
    bs.quantize_(model, bs.recipes.vertical(edges="float", own_edges=own_edges), x)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, bs.PrecisionBatchNorm)}
    assert "bn1" in norms
    assert not any(type(m) is nn.BatchNorm2d for name, m in model.named_modules() if ".levels." not in name)
    for p in (2, 3, 4):
        bs.set_precision(model, p)
        assert norms["bn1"].precision == p
        model(x)
    means = [norms["bn1"].levels[str(p)].running_mean for p in (2, 3, 4)]
    assert all(int(norms["bn1"].levels[str(p)].num_batches_tracked) == 1 for p in (2, 3, 4))
    if own_edges:
        with torch.no_grad():
            model.conv1.levels["2"].weight.mul_(3)
        bs.reestimate_batchnorm_(model, [x])
        assert not torch.allclose(means[0], means[2])
    before = {name: value.clone() for name, value in norms["bn1"].levels["4"].named_buffers()}
    with bs.precision(model, 2):
        model(x)
    assert all(torch.equal(value, before[name]) for name, value in norms["bn1"].levels["4"].named_buffers())


def test_one_precision_leaves_normalizations_of_float_layers_alone():
    model = bs.zoo.create("resnet18", width=4, stem="cifar")
    bs.quantize_(model, bs.recipes.uniq(2, edges="float"), torch.randn(4, 3, 8, 8))
    assert type(model.bn1) is nn.BatchNorm2d


def test_per_channel_steps_of_edges_are_a_choice():
    model = bs.zoo.create("resnet18", width=4, stem="cifar")
    x = torch.randn(4, 3, 8, 8)
    bs.quantize_(model, bs.recipes.uniq(1, per_channel=True), x)
    assert (model.conv1.weight_quant.step.numel(), model.layer1[0].conv1.weight_quant.step.numel()) == (1, 4)
    model = bs.zoo.create("resnet18", width=4, stem="cifar")
    bs.quantize_(model, bs.recipes.strata(per_channel=True), x)
    assert (model.conv1.weight_quant.step.numel(), model.layer1[0].conv1.weight_quant.step.numel()) == (4, 4)


def test_summary_names_transforms_and_moved_poolings():
    model = bs.zoo.create("maqd_vgg", width=4)
    bs.quantize_(model, bs.recipes.maqd(3, 2), torch.randn(2, 3, 32, 32))
    rows = {row.name: row for row in bs.summary(model).rows}
    layers = [row for row in rows.values() if row.weight != "-"]
    assert len(layers) == 17
    assert all("weights through Standardize" in row.note for row in layers)
    assert sum("pools its quantized input" in row.note for row in layers) == 3
