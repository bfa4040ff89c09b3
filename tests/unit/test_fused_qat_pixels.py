"""The fused quantization-aware step of networks that read pixels, against the fake-quantized network in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from unit.test_fused_qat import same, step

import bitstrata as bs
from bitstrata.fused.qat_pixels import pixel_codes
from bitstrata.fused.qat_units import entry
from bitstrata.fused.values import NotFiniteError
from bitstrata.integer.pool import Pool

MEANS: dict[str, Any] = {
    "one mean": ((0.45,), (0.25,)),
    "a mean a channel": ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)),
    "none": ((0.0,), (1.0,)),
}


def net(padding: tuple[int, int], stride: int, *, rectified: bool = True) -> nn.Module:
    stem = nn.Conv2d(3, 6, 3, padding=padding, stride=stride, bias=False)
    after = [nn.ReLU()] if rectified else []
    block = [nn.Conv2d(6, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), nn.ReLU()]
    return nn.Sequential(
        stem, nn.BatchNorm2d(6), *after, *block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 5)
    )


def batch(mean: tuple[float, ...], std: tuple[float, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normalized pixels of colours that differ, and labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (6, 3, 11, 9), generator=generator).float()
    pixels[:, 1] /= 3
    own = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    return (pixels.round() / 255 - own[0]) / own[1], torch.arange(6) % 5


def quantized(recipe: bs.Recipe, model: nn.Module, mean: Any, std: Any) -> nn.Module:
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    x, _ = batch(mean, std)
    return bs.calibrate_(bs.quantize_(model, recipe, x, input=bs.Pixels(mean, std)), [x]).train()


@pytest.mark.parametrize("recipe", [bs.recipes.lsq(4), bs.recipes.uniq(2), bs.recipes.sat(3)], ids=str)
@pytest.mark.parametrize("numbers", MEANS.values(), ids=MEANS)
@pytest.mark.parametrize(("padding", "stride"), [((1, 1), 1), ((0, 0), 2), ((2, 1), 2)])
def test_gradients_and_statistics_are_those_of_the_formula(recipe, numbers, padding, stride):
    model = quantized(recipe, net(padding, stride), *numbers)
    reference = copy.deepcopy(model).double()
    fused = bs.fuse(model)
    assert fused.fused == ("0", "3")
    for seed in (3, 4):  # gradients accumulate
        x, y = batch(*numbers, seed=seed)
        torch.testing.assert_close(step(fused, x, y).double(), step(reference, x.double(), y), rtol=1e-4, atol=1e-5)
        same(model, reference)


def test_every_precision_of_one_model():
    numbers = MEANS["a mean a channel"]
    model = quantized(bs.recipes.strata((1, 2, 3)), net((1, 1), 1, rectified=False), *numbers)
    reference = copy.deepcopy(model).double()
    fused = bs.fuse(model)
    x, y = batch(*numbers)
    bs.joint_backward(fused, x, y)
    bs.joint_backward(reference, x.double(), y)
    same(model, reference, rtol=1e-4)


def test_bfloat16_rounds_less_than_torch():
    """The convolution is of integers, so that only what follows it is rounded."""
    numbers = MEANS["a mean a channel"]
    model = quantized(bs.recipes.lsq(4), net((1, 1), 1), *numbers)
    plain, reference = copy.deepcopy(model), copy.deepcopy(model).double()
    x, y = batch(*numbers)
    step(reference, x.double(), y)
    with torch.autocast("cpu", torch.bfloat16):
        step(bs.fuse(model), x, y)
        step(plain, x, y)
    exact = reference[0].weight.grad
    ours, theirs = ((m[0].weight.grad.double() - exact).norm() / exact.norm() for m in (model, plain))
    assert ours < 0.02
    assert ours < 1.2 * theirs


def test_an_input_that_wants_a_gradient_gets_it():
    numbers = MEANS["a mean a channel"]
    model = quantized(bs.recipes.lsq(4), net((1, 1), 1), *numbers)
    reference = copy.deepcopy(model).double()
    x, y = batch(*numbers)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    step(bs.fuse(model), ours, y)
    step(reference, theirs, y)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)
    same(model, reference)


def test_a_frozen_stem_gets_no_gradient():
    numbers = MEANS["one mean"]
    model = quantized(bs.recipes.lsq(4), net((1, 1), 1), *numbers)
    for p in model[0].parameters():
        p.requires_grad_(False)
    reference = copy.deepcopy(model).double()
    x, y = batch(*numbers)
    step(bs.fuse(model), x, y)
    step(reference, x.double(), y)
    assert model[0].weight.grad is None
    same(model, reference)


@pytest.mark.parametrize("numbers", MEANS.values(), ids=MEANS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_codes_are_the_quantizers(numbers, layout):
    model = quantized(bs.recipes.lsq(4), net((1, 1), 1), *numbers)
    x, _ = batch(*numbers)
    x = (x * 1.37).contiguous(memory_format=layout)  # off the grid, and beyond its ends
    quantizer = model[0].act_quant
    found = pixel_codes(entry(x, Pool(), torch.float32), quantizer, (2, 1))
    inside = torch.from_numpy(found[:, 2:-2, 1:-1]).permute(0, 3, 1, 2)
    torch.testing.assert_close(inside.int(), quantizer.codes(x), rtol=0, atol=0)
    border = np.broadcast_to(np.array(quantizer.pad_codes), (6, 2, 11, 3))
    np.testing.assert_array_equal(found[:, :2], border)
    np.testing.assert_array_equal(found[:, -2:], border)


def test_what_is_not_finite_names_its_layer():
    model = quantized(bs.recipes.lsq(4), net((1, 1), 1), *MEANS["one mean"])
    x, _ = batch(*MEANS["one mean"])
    x[2, 1, 3, 4] = float("nan")
    with pytest.raises(NotFiniteError, match="0: its input contains NaN or infinity"):
        bs.fuse(model)(x)
