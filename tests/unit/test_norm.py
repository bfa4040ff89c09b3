"""Batch normalization per precision, and how float and quantized state_dicts load."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.nn import PrecisionBatchNorm, convert
from bitstrata.quantizers import build


def pair(precisions: tuple[int, ...] = (1, 4)) -> tuple[nn.Module, PrecisionBatchNorm]:
    """A quantized layer of 4 outputs and a normalization that follows it."""
    weight = build("nested", "weight", {}, bits={p: p for p in precisions})
    layer = convert(nn.Linear(4, 4), weight, None, edge=False)
    return layer, PrecisionBatchNorm(nn.BatchNorm1d(4), precisions, "fc", layer)


def batch(seed: int = 0) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def test_statistics_and_affine_are_separate():
    layer, norm = pair()
    with torch.no_grad():
        norm.levels["1"].weight.fill_(2.0)
    x = batch()
    layer.set_precision(4)
    reference = nn.BatchNorm1d(4)
    assert torch.equal(norm(x), reference(x))
    assert torch.equal(norm.levels["4"].running_mean, reference.running_mean)
    assert norm.levels["1"].running_mean.tolist() == [0.0] * 4
    layer.set_precision(1)
    assert torch.equal(norm(x), 2 * nn.BatchNorm1d(4)(x))
    assert norm.levels["1"].num_batches_tracked == norm.levels["4"].num_batches_tracked == 1
    norm(x).sum().backward()
    assert norm.levels["4"].weight.grad is None
    assert norm.levels["1"].weight.grad is not None


def test_the_precision_is_that_of_the_layer():
    layer, norm = pair((1, 2, 4))
    assert norm.precision == 4
    layer.set_precision(2)
    assert norm.precision == 2
    assert norm.level is norm.levels["2"]
    assert "owner='fc', precision=2" in repr(norm)
    assert norm not in layer.modules()
    assert layer not in norm.modules()


def test_evaluation_mode_is_taken_over():
    layer, _ = pair()
    norm = PrecisionBatchNorm(nn.BatchNorm1d(4).eval(), (1, 4), "fc", layer)
    assert not any(module.training for module in norm.modules())
    assert torch.equal(norm(batch()), nn.BatchNorm1d(4).eval()(batch()))


def test_parameters_belong_to_their_precision():
    _, norm = pair()
    assert norm.precision_parameters() == {int(p): [m.weight, m.bias] for p, m in norm.levels.items()}


def test_a_float_state_dict_loads_into_every_level():
    _, norm = pair()
    plain = nn.BatchNorm1d(4)
    plain(batch())
    with torch.no_grad():
        plain.weight.uniform_(1, 2)
    state = plain.state_dict()
    norm.load_state_dict(state, strict=True)
    assert set(state) == set(plain.state_dict())  # the caller's dictionary is left as it was
    for level in norm.levels.values():
        for key, value in plain.state_dict().items():
            assert torch.equal(level.state_dict()[key], value)


def test_its_own_state_dict_round_trips():
    layer, norm = pair()
    for p in (1, 4):
        layer.set_precision(p)
        norm(batch(p))
    _, twin = pair()
    twin.load_state_dict(norm.state_dict(), strict=True)
    for key, value in norm.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value)
    assert not torch.equal(twin.levels["1"].running_mean, twin.levels["4"].running_mean)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """A quantized and calibrated ResNet-20."""
    torch.manual_seed(0)
    model = bs.zoo.resnet20(width=4)
    x = torch.randn(4, 3, 16, 16)
    bs.quantize_(model, bs.recipes.strata(w=(1, 2, 4)), x)
    return bs.calibrate_(model, [x])


def test_a_float_checkpoint_loads_into_a_quantized_network(resnet):
    torch.manual_seed(1)
    plain = bs.zoo.resnet20(width=4)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(3.0)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
    model = copy.deepcopy(resnet)
    x = torch.randn(2, 3, 16, 16)
    model.eval()(x)
    state = plain.state_dict()
    result = model.load_state_dict(state, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert set(state) == set(plain.state_dict())
    expected = bs.quantize_(copy.deepcopy(plain), bs.recipes.strata(w=(1, 2, 4)), x)
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():  # weights, normalizations at every level and weight steps, as if quantized now
        if "act_quant.steps" not in key:
            assert torch.equal(found[key], value), key
    with pytest.raises(RuntimeError, match="no step size at precision 4"):  # the old activation steps are void
        model(x)
    bs.calibrate_(model, [x])
    bs.calibrate_(expected, [x])
    with torch.no_grad():
        assert torch.equal(model.eval()(x), expected.eval()(x))


def test_a_quantized_state_dict_round_trips(resnet):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    twin = bs.quantize_(bs.zoo.resnet20(width=4), bs.recipes.strata(w=(1, 2, 4)), x)
    result = twin.load_state_dict(resnet.state_dict(), strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    resnet.eval()
    twin.eval()
    with torch.no_grad():
        for p in (4, 2, 1):
            with bs.precision(resnet, p), bs.precision(twin, p):
                assert torch.equal(resnet(x), twin(x))


def test_a_broken_state_dict_is_still_an_error(resnet):
    state = resnet.state_dict()
    del state["layer1.0.bn1.levels.2.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layer1.0.bn1.levels.2.weight"):
        copy.deepcopy(resnet).load_state_dict(state)
    state = bs.zoo.resnet20(width=4).state_dict()
    state["layer1.0.conv1.bias"] = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layer1.0.conv1.bias"):
        copy.deepcopy(resnet).load_state_dict(state)


def test_a_deep_copy_follows_its_own_layers(resnet):
    twin = copy.deepcopy(resnet)
    bs.set_precision(twin, 1)
    for model, p in ((twin, 1), (resnet, 4)):
        assert {m.precision for m in model.modules() if isinstance(m, PrecisionBatchNorm)} == {p}
