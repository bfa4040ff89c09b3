"""The precision of a quantized model: set, restored, and followed by its normalizations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.nn import PrecisionBatchNorm
from bitstrata.prepare.precision import precision_map, quantized_layers

STRATA = bs.recipes.strata(w=(1, 2, 4))


def calibrated(model: nn.Module, x: Tensor, recipe=STRATA, **options) -> nn.Module:
    return bs.calibrate_(bs.quantize_(model, recipe, x, **options), [x])


def rows(model: nn.Module) -> dict[str, object]:
    return {row.name: row for row in bs.summary(model).rows}


def follows(model: nn.Module) -> dict[str, str]:
    return {name: m.owner for name, m in model.named_modules() if isinstance(m, PrecisionBatchNorm)}


# ---- normalizations


class PostActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.down, self.bn_down = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(input=self.conv2(x)) + self.bn_down(self.down(x)))
        return self.head(x.mean((2, 3)))


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.bn3, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.bn_out = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) * 0.5
        y = self.conv1(F.relu(self.bn1(x)))
        x = x + self.conv2(F.relu(self.bn2(y)))
        return self.bn_out(self.head(F.relu(self.bn3(x)).mean((2, 3))) + 1)


def test_normalizations_after_a_layer_follow_it():
    model = bs.quantize_(PostActivation(), STRATA, torch.randn(2, 3, 4, 4))
    assert follows(model) == {"bn1": "conv1", "bn2": "conv2", "bn_down": "down"}


def test_normalizations_after_a_sum_follow_the_next_layer():
    """bn2 reads conv1 directly; bn1 and bn3 read sums; nothing comes after bn_out."""
    model = bs.quantize_(PreActivation(), STRATA, torch.randn(2, 3, 4, 4))
    assert follows(model) == {"bn1": "conv1", "bn2": "conv1", "bn3": "head", "bn_out": "head"}


def test_normalization_after_a_linear_layer():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    bs.quantize_(model, STRATA, torch.randn(3, 4))
    assert follows(model) == {"1": "0"}


def test_normalizations_of_float_layers_follow_the_next_quantized_layer():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    model.add_module("aside", _Silent(nn.BatchNorm1d(3)))
    bs.quantize_(model, STRATA, torch.randn(3, 4), filter=lambda name, _: name != "2")
    assert follows(model) == {"1": "0", "3": "2"}
    assert model[3].followed is model[4]
    notes = {name: row.note for name, row in rows(model).items()}
    assert notes["aside.inner"] == "float: did not run on the example"


class _Silent(nn.Module):
    """Passes its input on and keeps a module that never runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_normalization_with_two_names_is_replaced_under_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.norm = nn.BatchNorm1d(4)
            self.alias = self.norm

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.alias(self.fc(x))))

    model = bs.quantize_(Twice(), STRATA, torch.randn(3, 4))
    assert model.alias is model.norm
    assert isinstance(model.norm, PrecisionBatchNorm)


@pytest.mark.parametrize("name", ["digits_resnet", "preact_resnet20"])
def test_normalizations_take_the_precision_of_their_layers(name):
    model = bs.zoo.create(name)
    channels = 1 if name.startswith("digits") else 3
    bs.quantize_(model, STRATA, torch.randn(1, channels, 8, 8))
    layers = quantized_layers(model)
    assert set(follows(model).values()) <= set(layers)
    picked = sorted(layers)[1]
    bs.set_precision(model, 4)
    bs.set_precision(model, {picked: 1})
    for module in model.modules():
        if isinstance(module, PrecisionBatchNorm):
            assert module.precision == (1 if module.owner == picked else 4)


# ---- precisions


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    return calibrated(model, torch.randn(6, 4))


def test_setting_all_or_some(small):
    assert bs.precisions(small) == (1, 2, 4)
    assert precision_map(small) == {"0": 4, "3": 4, "5": 4}
    bs.set_precision(small, 2)
    assert precision_map(small) == {"0": 2, "3": 2, "5": 2}
    bs.set_precision(small, {"3": 1})
    assert precision_map(small) == {"0": 2, "3": 1, "5": 2}
    assert small[3].quantized_weight().unique().numel() == 2
    bs.set_precision(small, {})
    assert precision_map(small) == {"0": 2, "3": 1, "5": 2}


def test_the_context_restores_every_layer(small):
    bs.set_precision(small, {"3": 1})
    before = precision_map(small)
    with bs.precision(small, 2) as inside:
        assert inside is small
        assert set(precision_map(small).values()) == {2}
        with bs.precision(small, {"0": 1}):
            assert precision_map(small) == {"0": 1, "3": 2, "5": 2}
            assert small[1].precision == 1
        assert set(precision_map(small).values()) == {2}
    assert precision_map(small) == before
    with pytest.raises(KeyError), bs.precision(small, 2):
        raise KeyError
    assert precision_map(small) == before


def test_outputs_differ_by_precision_and_come_back(small):
    x = torch.randn(6, 4)
    small.eval()
    wide = small(x)
    with bs.precision(small, 1):
        assert not torch.equal(small(x), wide)
    assert torch.equal(small(x), wide)


def test_a_quantized_model_inside_another(small):
    """Names change in a wrapper; the normalizations still follow."""
    wrapper = nn.Sequential(nn.Identity(), small)
    bs.set_precision(wrapper, 1)
    assert (small[0].precision, small[1].precision) == (1, 1)
    with bs.precision(wrapper, {"1.0": 2}):
        assert small[1].precision == 2
    twin = copy.deepcopy(wrapper)
    bs.set_precision(twin, 4)
    assert (twin[1][1].precision, small[1].precision) == (4, 1)
    bs.set_precision(nn.ModuleList([small[3]]), 2)
    assert precision_map(small) == {"0": 1, "3": 2, "5": 1}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (3, r"^set_precision: 3 is not among the precisions \(1, 2, 4\) of '0'$"),
        ({"0": 1, "3": 5}, r"^set_precision: 5 is not among the precisions \(1, 2, 4\) of '3'$"),
        ({"0": 1, "7": 1}, r"^set_precision: no quantized layer named '7'; there are: 0, 3, 5$"),
    ],
)
def test_a_refused_precision_changes_nothing(small, wanted, message):
    with pytest.raises(ValueError, match=message):
        bs.set_precision(small, wanted)
    with pytest.raises(ValueError, match=message), bs.precision(small, wanted):
        pass
    assert precision_map(small) == {"0": 4, "3": 4, "5": 4}


def test_float_models_have_no_precision():
    model = nn.Linear(2, 2)
    assert bs.precisions(model) == ()
    with pytest.raises(ValueError, match=r"^set_precision: the model has no quantized layers; call quantize_ first$"):
        bs.set_precision(model, 2)
