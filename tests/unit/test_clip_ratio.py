"""Activations whose ranges are clipped, from the quantizer to the fused step and the frozen network."""

from __future__ import annotations

import copy

import pytest
import torch

import bitstrata as bs
from bitstrata.integer import CounterGenerator, shift_quantize
from bitstrata.integer.rule import IntegerRule
from bitstrata.integer.shiftquant import shift_quantize_reference


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("ratio", [1.0, 0.6, 0.37])
@pytest.mark.parametrize("unsigned", [False, True])
def test_kernels_equal_the_definition(bits, ratio, unsigned):
    x = torch.randn(4, 17, 5, 3, generator=torch.Generator().manual_seed(bits))
    x = x.relu() if unsigned else x
    options = {"unsigned_nonneg": unsigned, "clip_ratio": ratio}
    found, want = shift_quantize(x, bits, 4, **options), shift_quantize_reference(x, bits, 4, **options)
    assert torch.equal(found.codes, want.codes)
    assert torch.equal(found.exponents, want.exponents)
    assert found.scale == want.scale


def test_a_ratio_makes_the_step_finer_and_cuts_what_lies_beyond():
    x = torch.tensor([[8.0, -8.0, 3.0, 1.0]]).T.contiguous()  # one channel
    whole, half = (shift_quantize(x, 4, 1, clip_ratio=ratio) for ratio in (1.0, 0.5))
    assert float(half.scale) == float(whole.scale) / 2
    assert half.exponents.tolist() == whole.exponents.tolist() == [0]
    assert whole.codes.flatten().tolist() == [7, -7, 3, 1]
    assert half.codes.flatten().tolist() == [7, -7, 5, 2]


def test_networks_train_and_freeze_with_it():
    torch.manual_seed(0)
    recipe = bs.recipes.shiftquant(unsigned_nonneg=True, clip_ratio=0.5)
    model = bs.zoo.create("digits_resnet", width=8)
    x = torch.rand(16, 1, 8, 8)
    bs.quantize_(model, recipe, x)
    ratios = {name: m.rule.clip_ratio for name, m in model.named_modules() if hasattr(m, "rule")}
    assert ratios.pop("conv1") == ratios.pop(next(reversed(ratios))) == 1.0
    assert set(ratios.values()) == {0.5}
    twin = copy.deepcopy(model.train())
    results = []
    for network, parameters in ((bs.fuse(model), model), (twin, twin)):
        y = network(x)
        y.square().sum().backward()
        results.append((y.detach(), *(p.grad for p in parameters.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    unclipped = copy.deepcopy(model)
    for module in unclipped.modules():
        if hasattr(module, "rule"):
            module.rule = bs.integer.IntegerRule(**{**vars(module.rule), "clip_ratio": 1.0})
    ranges = []
    for network in (model, unclipped):
        bs.freeze_(network.eval(), [x])
        layer = network.get_submodule(next(iter(ratios)))
        ranges.append(float(layer.frozen.range))
    assert ranges[0] == ranges[1] / 2
    assert bs.verify(model, bs.lower(model, x), x.numpy()).ok


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5, float("nan")])
def test_ratios_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"clip_ratio must be above 0 and at most 1"):
        shift_quantize(torch.ones(2, 3), 4, clip_ratio=ratio)
    with pytest.raises(ValueError, match=r"IntegerRule: clip_ratio must be above 0 and at most 1"):
        IntegerRule(clip_ratio=ratio)


def test_clipping_goes_with_rounding_to_nearest():
    with pytest.raises(ValueError, match=r"clip_ratio 0.5 needs rounding to nearest"):
        shift_quantize(torch.ones(2, 3), 4, rounding="stochastic", generator=CounterGenerator(0), clip_ratio=0.5)
    with pytest.raises(ValueError, match=r"clip_ratio 0.5 needs rounding to nearest"):
        IntegerRule(act_rounding="stochastic", clip_ratio=0.5)
