"""Batch normalization per precision, and how float and quantized state_dicts load."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.nn import PrecisionBatchNorm, convert
from bitstrata.nn.layer_batch_norm import LayerBatchNorm1d
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


# ---- what the precisions share


SETTINGS = ("individual", "statistics", "shared")


def sharing(levels: str, norm: nn.Module | None = None) -> tuple[nn.Module, PrecisionBatchNorm]:
    weight = build("nested", "weight", {}, bits={1: 1, 2: 2, 4: 4})
    layer = convert(nn.Linear(4, 4), weight, None, edge=False)
    return layer, PrecisionBatchNorm(nn.BatchNorm1d(4) if norm is None else norm, (1, 2, 4), "fc", layer, levels)


@pytest.mark.parametrize(
    ("levels", "affines", "statistics"), [("individual", 3, 3), ("statistics", 1, 3), ("shared", 1, 1)]
)
def test_what_is_shared(levels, affines, statistics):
    layer, norm = sharing(levels)
    assert len(list(norm.parameters())) == 2 * affines
    assert len({id(level.weight) for level in norm.levels.values()}) == affines
    assert len({id(level.bias) for level in norm.levels.values()}) == affines
    assert len({level.running_mean.data_ptr() for level in norm.levels.values()}) == statistics
    own = norm.precision_parameters()
    assert own == ({int(p): [m.weight, m.bias] for p, m in norm.levels.items()} if levels == "individual" else {})
    for p in (1, 2, 4):
        layer.set_precision(p)
        assert norm.level is norm.levels[str(p)]


@pytest.mark.parametrize("levels", SETTINGS)
def test_a_step_at_one_precision(levels):
    """Training one precision moves what it shares, at every precision, and nothing else."""
    layer, norm = sharing(levels)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    layer.set_precision(2)
    (norm(batch()) * torch.arange(1.0, 5.0)).square().sum().backward()
    optimizer.step()
    other, here = norm.levels["4"], norm.levels["2"]
    reference = nn.BatchNorm1d(4)
    reference(batch())
    assert torch.equal(here.running_mean, reference.running_mean)
    assert not torch.equal(here.weight, torch.ones(4))
    assert torch.equal(other.weight, here.weight) == (levels != "individual")
    assert torch.equal(other.bias, here.bias) == (levels != "individual")
    assert torch.equal(other.running_mean, here.running_mean) == (levels == "shared")
    assert int(other.num_batches_tracked) == (levels == "shared")


def test_gradients_of_all_precisions_meet_in_a_shared_affine():
    layer, norm = sharing("statistics")
    parts = []
    for p in (1, 2, 4):
        layer.set_precision(p)
        norm.zero_grad()
        norm(batch(p)).pow(3).sum().backward()
        parts.append(norm.level.weight.grad.clone())
    norm.zero_grad()
    for p in (1, 2, 4):
        layer.set_precision(p)
        norm(batch(p)).pow(3).sum().backward()
    torch.testing.assert_close(norm.levels["1"].weight.grad, sum(parts))


def trained(levels: str) -> PrecisionBatchNorm:
    layer, norm = sharing(levels)
    for p in (1, 2, 4):
        layer.set_precision(p)
        norm(batch(p))
        with torch.no_grad():
            norm.level.weight.add_(0.1 * p)
    return norm


@pytest.mark.parametrize("levels", SETTINGS)
def test_state_round_trips_in_every_setting(levels):
    norm = trained(levels)
    _, twin = sharing(levels)
    assert twin.state_dict().keys() == sharing("individual")[1].state_dict().keys()
    twin.load_state_dict(norm.state_dict(), strict=True)
    for key, value in norm.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key
    plain = nn.BatchNorm1d(4)
    plain(batch(9))
    with torch.no_grad():
        plain.weight.uniform_(1, 2)
    twin.load_state_dict(plain.state_dict(), strict=True)
    for level in twin.levels.values():
        for key, value in plain.state_dict().items():
            assert torch.equal(level.state_dict()[key], value)
    for name, count in (
        ("weight", 3 if levels == "individual" else 1),
        ("running_var", 1 if levels == "shared" else 3),
    ):
        assert len({getattr(level, name).data_ptr() for level in twin.levels.values()}) == count


@pytest.mark.parametrize(
    ("source", "target", "key"),
    [
        ("individual", "statistics", "levels.2.weight"),
        ("individual", "shared", "levels.2.weight"),
        ("statistics", "shared", "levels.2.running_mean"),
    ],
)
def test_a_state_that_differs_between_levels_does_not_load_where_they_are_one(source, target, key):
    with pytest.raises(RuntimeError, match=rf"{key} differs from levels.1.\w+, .*shares.*\(levels='{target}'\)"):
        sharing(target)[1].load_state_dict(trained(source).state_dict())


@pytest.mark.parametrize(
    ("source", "target"), [("shared", "statistics"), ("shared", "individual"), ("statistics", "individual")]
)
def test_a_state_loads_where_less_is_shared(source, target):
    norm, (_, twin) = trained(source), sharing(target)
    twin.load_state_dict(norm.state_dict(), strict=True)
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("levels", ["statistics", "shared"])
def test_copies_and_conversions_keep_sharing(levels):
    norm = trained(levels)
    for other in (copy.deepcopy(norm), copy.deepcopy(norm).double(), copy.deepcopy(norm).to("meta")):
        assert len({id(level.weight) for level in other.levels.values()}) == 1
        assert len(list(other.parameters())) == 2
        assert other.levels["1"].weight is not norm.levels["1"].weight
    twin = nn.ModuleList(copy.deepcopy([norm.followed, norm]))
    twin[0].set_precision(1)
    assert (twin[1].precision, norm.precision) == (1, 4)


@pytest.mark.parametrize("levels", SETTINGS)
def test_any_normalization_with_the_attributes(levels):
    """Layer-batch normalization has one mean and one variance for all channels."""
    layer, norm = sharing(levels, LayerBatchNorm1d(4))
    layer.set_precision(1)
    plain = LayerBatchNorm1d(4)
    assert torch.equal(norm(batch()), plain(batch()))
    assert norm.level.running_mean.shape == (1,)
    assert torch.equal(norm.levels["4"].running_mean, plain.running_mean if levels == "shared" else torch.zeros(1))
    _, twin = sharing(levels, LayerBatchNorm1d(4))
    twin.load_state_dict(norm.state_dict(), strict=True)
    assert torch.equal(twin.levels["1"].running_mean, plain.running_mean)
    twin.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(twin.levels["4"].running_var, plain.running_var)


@pytest.mark.parametrize("levels", SETTINGS)
def test_without_an_affine(levels):
    layer, norm = sharing(levels, nn.BatchNorm1d(4, affine=False))
    assert list(norm.parameters()) == []
    layer.set_precision(2)
    assert torch.equal(norm(batch()), nn.BatchNorm1d(4)(batch()))


def test_following_another_layer():
    layer, norm = sharing("individual")
    other, _ = sharing("individual")
    norm.follow_(other)
    other.set_precision(1)
    assert (norm.followed is other, norm.precision, layer.precision) == (True, 1, 4)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"levels must be one of individual, statistics, shared, got 'mean'"):
        sharing("mean")
    with pytest.raises(
        TypeError, match=r"must be a batch normalization, got LayerNorm without running_mean, running_var"
    ):
        sharing("shared", nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"PrecisionBatchNorm: precisions must name at least one precision"):
        PrecisionBatchNorm(nn.BatchNorm1d(4), (), "fc", sharing("shared")[0])


def test_the_setting_shows():
    assert "levels='statistics'" in repr(sharing("statistics")[1])
