"""L1 normalization in whole networks: by precision, by recipe, trained, lowered."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.nn import (
    L1BatchNorm1d,
    L1BatchNorm2d,
    LayerBatchNorm2d,
    PrecisionBatchNorm,
    QuantizedL1BatchNorm1d,
    QuantizedL1BatchNorm2d,
    convert,
    l1_batch_norm_from,
)
from bitstrata.quantizers import registry


def layer_of(precisions: tuple[int, ...]) -> nn.Module:
    layer = nn.Linear(3, 4)
    weight = registry.build("nested", "weight", {}, bits={p: p for p in precisions}, channels=None)
    convert(layer, weight, None, edge=False)
    return layer


@pytest.mark.parametrize("form", [L1BatchNorm1d, QuantizedL1BatchNorm1d])
@pytest.mark.parametrize("levels", ["individual", "statistics", "shared"])
def test_a_normalization_for_every_precision(form, levels):
    norm = PrecisionBatchNorm(form(4), (1, 2), "fc", layer_of((1, 2)), levels)
    norm(torch.randn(6, 4))
    one, two = norm.levels.values()
    assert (one is two) == (levels == "shared")
    assert (one.weight is two.weight) == (levels != "individual")
    tracked = {int(p): int(level.num_batches_tracked) for p, level in norm.levels.items()}
    assert sum(tracked.values()) == (2 if levels == "shared" else 1)
    plain = form(4)
    plain.running_deviation.fill_(3)
    norm.load_state_dict(plain.state_dict())
    assert all(torch.equal(level.running_deviation, plain.running_deviation) for level in norm.levels.values())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def l1(recipe: bs.Recipe) -> bs.Recipe:
    return dataclasses.replace(recipe, norm="l1")


def test_recipes_put_it_in():
    recipe, x = l1(bs.recipes.uniq(2)), torch.randn(8, 1, 6, 6)
    assert "l1 norm" in str(recipe)
    float_model = Small()
    float_model.norm.running_var.fill_(4)
    want = copy.deepcopy(float_model).eval()(x)
    bs.float_form_(float_model, recipe, x)
    assert type(float_model.norm) is L1BatchNorm2d
    assert float_model.norm.l1_scale == "sqrt(pi/2)"
    torch.testing.assert_close(float_model.eval()(x), want)
    bs.quantize_(float_model.train(), recipe, x)  # an L1 normalization is met as one
    for model in (float_model, bs.quantize_(Small(), recipe, x)):
        assert isinstance(model.norm, PrecisionBatchNorm)
        assert type(model.norm.level) is L1BatchNorm2d
        assert model.norm.owner == "conv"
    batch = dataclasses.replace(recipe, norm="layer_batch")
    assert type(bs.quantize_(Small(), batch, x).norm.level) is LayerBatchNorm2d
    assert "L1BatchNorm2d" in str(bs.summary(float_model))


def trained(model: nn.Module, recipe: bs.Recipe, pixels: Tensor) -> nn.Module:
    """A few steps of quantized training on noise whose brightest row is its class."""
    labels = pixels.float().mean((1, 3)).argmax(1)
    x = (pixels.float() / 255 - 0.5) / 0.25
    bs.quantize_(model, recipe, x[:4], input=bs.Pixels((0.5,), (0.25,)))
    bs.calibrate_(model, [x])
    optimizer = torch.optim.SGD(bs.parameter_groups(model, 1e-4), lr=0.05, momentum=0.9)
    first = last = 0.0
    for step in range(8):
        optimizer.zero_grad()
        rows = bs.joint_backward(model, x, labels)
        last = float(next(iter(rows.values())).loss.detach())
        first = last if step == 0 else first
        optimizer.step()
    assert last < first
    bs.reestimate_batchnorm_(model, [x])
    return model.eval()


def noise(count: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("recipe", [bs.recipes.uniq(2), bs.recipes.strata(w=(1, 4))], ids=lambda r: r.name)
def test_a_trained_network_runs_in_integers(recipe):
    torch.manual_seed(0)
    pixels = noise()
    model = trained(bs.zoo.digits_resnet(width=4), l1(recipe), pixels)
    norms = [m.level for m in model.modules() if isinstance(m, PrecisionBatchNorm)]
    assert norms
    assert all(type(level) is L1BatchNorm2d for level in norms)
    program = bs.lower(model, (pixels[:1].float() / 255 - 0.5) / 0.25)
    report = bs.verify(model, program, pixels)
    assert report.ok, str(report)
    assert not report.mismatches


def test_a_network_with_fully_quantized_normalization_trains_and_is_not_lowered():
    torch.manual_seed(0)
    pixels = noise()
    model = bs.zoo.digits_resnet(width=4)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, l1_batch_norm_from(child, quantized=True))
    trained(model, bs.recipes.uniq(2), pixels)
    assert any(isinstance(m, PrecisionBatchNorm) and type(m.level) is QuantizedL1BatchNorm2d for m in model.modules())
    with pytest.raises(bs.lowering.LowerError, match=r"behind 'conv1', QuantizedL1BatchNorm2d, is no affine function"):
        bs.lower(model, (pixels[:1].float() / 255 - 0.5) / 0.25)
