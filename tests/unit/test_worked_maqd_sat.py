"""MaQD, SAT and their baselines as wholes: statistics of the papers, placement, schedules, and what decays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata import recipes, zoo
from bitstrata.nn.layer_batch_norm import LayerBatchNorm, LayerBatchNorm1d
from bitstrata.nn.layers import QuantizedLayer
from bitstrata.quantizers import build, build_transform
from bitstrata.quantizers.lsq import LSQActivation
from bitstrata.quantizers.maqd import MaQDActivation, width_of
from bitstrata.quantizers.rescale import Rescaled
from bitstrata.train import TrainConfig
from bitstrata.train.objective import make_optimizer
from bitstrata.train.schedule import lr_factor_of

F64 = torch.float64
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def quantized(name: str, recipe: bs.Recipe, **options: object) -> tuple[nn.Module, dict[str, QuantizedLayer]]:
    torch.manual_seed(0)
    model = bs.quantize_(zoo.create(name, **options), recipe, IMAGES)
    return model, {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}


# ---- statistics


@pytest.mark.parametrize(
    ("mode", "states", "percent"),
    [
        *(("(M-1)/2", 3, 13.36), ("(M-1)/2", 15, 83.03), ("(M-1)/2", 255, 99.06)),
        *(("M/2", 3, 31.73), ("M/2", 15, 84.15), ("M/2", 255, 99.06)),
    ],
)
def test_nonzero_share_of_gaussian_weights(mode, states, percent):
    """At evenly spaced quantiles of the Gaussian, so without sampling noise."""
    z = torch.special.ndtri((torch.arange(200_000, dtype=F64) + 0.5) / 200_000)
    width = width_of(states, mode)
    quantizer = build("maqd", "weight", {"states": states, "delta_mode": mode}, bits={width: width})
    assert 100 * float((quantizer.codes(z) != 0).double().mean()) == pytest.approx(percent, abs=0.006)


def first_over_last(states: int, surrogate: str) -> float:
    """Mean |dL/db| of the first over the last normalization of a random net of 16 standardized layers."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(128, 128, generator=generator, dtype=F64) for _ in range(16)]
    x, g = torch.randn(2, 64, 128, generator=generator, dtype=F64).unbind()
    standardize, quantizer = build_transform("standardize", {}), build("maqd", "weight", {"states": 15}, bits={4: 4})
    bits = (states - 1).bit_length()
    act = build("maqd", "activation", {"states": states, "act_surrogate": surrogate}, bits={bits: bits})
    norms = [LayerBatchNorm1d(128).double() for _ in weights]
    for w, norm in zip(weights, norms, strict=True):
        x = act(norm(x @ quantizer(standardize(w)).T))
    x.backward(g)
    first, last = (float(norm.bias.grad.abs().mean()) for norm in (norms[0], norms[-1]))
    return first / last


@pytest.mark.parametrize(("states", "normalised"), [(2, 1.60), (4, 1.94), (8, 2.29)])
def test_only_the_normalised_surrogate_keeps_gradients_in_a_deep_network(states, normalised):
    """15 activations lie between the two biases: eq. 11 as printed multiplies by (M - 1)^15."""
    found = first_over_last(states, "normalised")
    assert found == pytest.approx(normalised, rel=0.25)  # of another draw, in numpy
    assert first_over_last(states, "literal") == pytest.approx(found * (states - 1) ** 15, rel=1e-9)


def test_deviation_of_quantized_small_weights():
    """SAT section S2: the quantized weight's deviation over the clamped one's, where tanh is nearly linear."""
    w = 0.01 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=F64)
    clamped = build_transform("tanh", {})(w)
    expected = {1: (3.5, 0.3), 2: (1.27, 0.06), 3: (1.04, 0.01), 4: (1.008, 0.004), 8: (1.0002, 0.0005)}
    for bits, (ratio, tolerance) in expected.items():
        quantizer = build("dorefa", "weight", {}, bits={bits: bits}).double()
        assert float(quantizer(w).std() / clamped.std()) == pytest.approx(ratio, abs=tolerance)


# ---- placement


def sat_layer(layer: QuantizedLayer) -> tuple[int, bool, int]:
    """Weight width, whether the weight is rescaled, and input width."""
    assert isinstance(layer.weight_quant, Rescaled)
    return layer.weight_quant.width, layer.weight_quant.applies(layer.weight), layer.act_quant.width


@pytest.mark.parametrize(
    ("name", "options", "last"),
    [
        ("mobilenet_v1", {"width": 0.25, "stem": "cifar"}, "classifier"),
        ("mobilenet_v2", {"width": 0.25, "stem": "cifar", "relu6": False}, "classifier.1"),
        ("resnet18", {"width": 4, "stem": "cifar"}, "fc"),
    ],
)
def test_sat_where_every_convolution_is_normalized(name, options, last):
    """8-bit first and last weights, the last input at the inner width, and only the last layer rescaled."""
    model, layers = quantized(name, recipes.sat(3), **options)
    first, *inner, end = layers
    assert end == last
    assert sat_layer(layers[first]) == (8, False, 8)
    assert {sat_layer(layers[n]) for n in inner} == {(3, False, 3)}
    assert sat_layer(layers[last]) == (8, True, 3)
    assert {layers[n].act_quant.step.item() for n in inner} == {8.0}
    assert layers[last].act_quant.step.item() == 10.0
    assert not any(layer.act_quant.signed for n, layer in layers.items() if n != first)  # linear bottlenecks are cut
    alphas = {id(layer.act_quant.step) for layer in layers.values()}
    assert len(alphas) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())  # one a consuming layer


def test_sat_rescales_what_no_normalization_follows():
    """The last convolutions and the projections of pre-activation bottlenecks; all convolutions on request."""
    _, layers = quantized("preact_resnet50", recipes.sat(2), width=4, stem="cifar")
    inner = list(layers)[1:-1]
    for n in inner:
        assert sat_layer(layers[n]) == (2, n.endswith(("conv3", "shortcut")), 2)
    _, layers = quantized("preact_resnet50", recipes.sat(2, convs="all"), width=4, stem="cifar")
    assert all(sat_layer(layer)[1] for layer in layers.values())


def test_rescaling_before_a_normalization_changes_nothing():
    """f(s Q) = f(Q) for a normalized output, so the loss and every gradient agree: convs "all" is "auto" here."""
    models = []
    for convs in ("auto", "all"):
        torch.manual_seed(1)
        norms = [nn.BatchNorm2d(6, eps=1e-30) for _ in range(2)]
        first, second = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 6, 3)
        body = (first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
        net = nn.Sequential(*body).double()
        x = torch.randn(8, 3, 8, 8, dtype=F64)
        bs.quantize_(net, recipes.sat(4, convs=convs), x)
        nn.functional.cross_entropy(net(x), torch.arange(8) % 5).backward()
        models.append(net)
    scales = [m[3].weight_quant.scale_of(m[3].weight).item() for m in models]
    assert scales[0] == 1 != scales[1]
    for (n, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        if n != "3.bias":  # a bias before a normalization has no gradient but noise
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_maqd_quantizes_every_weight_and_stands_for_every_activation():
    for name, weights in (("maqd_vgg", 17), ("maqd_preact_resnet", 26)):
        model, layers = quantized(name, recipes.maqd(15, 4), width=2)
        assert len(layers) == weights
        assert {type(layer.weight_transform).__name__ for layer in layers.values()} == {"Standardize"}
        assert {layer.weight_quant.width for layer in layers.values()} == {4}
        first, *rest = layers.values()
        assert isinstance(first.act_quant, LSQActivation)
        assert all(isinstance(layer.act_quant, MaQDActivation) for layer in rest)
        assert not any(isinstance(m, nn.ReLU) for m in model.modules())
        assert sum(layer.input_pool is not None for layer in rest) == (3 if name == "maqd_vgg" else 0)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_ablations_of_sat_are_the_baselines():
    """SAT's table 4: without its rescaling SAT is CG-PACT, and with PACT's gradient too it is PACT."""
    torch.manual_seed(0)
    net = zoo.create("digits_cnn", width=4)
    x, y = torch.randn(16, 1, 8, 8), torch.arange(16) % 10

    def gradients(recipe: bs.Recipe) -> list[Tensor]:
        model = bs.quantize_(copy.deepcopy(net), recipe, x)
        nn.functional.cross_entropy(model(x), y).backward()
        return [p.grad for p in model.parameters()]

    pairs = (
        (recipes.cg_pact(2), recipes.sat(2, rescale=None)),
        (recipes.pact(2), recipes.sat(2, rescale=None, gradient="pact")),
    )
    for baseline, ablation in pairs:
        assert baseline.schedule == ablation.schedule
        for a, b in zip(gradients(baseline), gradients(ablation), strict=True):
            assert torch.equal(a, b)


# ---- training


def test_schedules_of_the_recipes():
    maqd = TrainConfig.from_recipe(recipes.maqd())
    assert (maqd.epochs, maqd.batch_size, maqd.lr, maqd.schedule) == (300, 100, 0.01, "cosine_epoch")
    assert (maqd.momentum, maqd.nesterov, maqd.optimizer, maqd.loss, maqd.loss_gamma) == (
        0.9,
        False,
        "sgd",
        "maqd",
        0.05,
    )
    assert (maqd.weight_decay, maqd.decay, maqd.distill) == (5e-4, "weights", None)
    for name in ("sat", "pact", "cg_pact"):
        sat = TrainConfig.from_recipe(recipes.get(name))
        assert (sat.epochs, sat.warmup, sat.momentum, sat.nesterov, sat.schedule) == (150, 5, 0.9, True, "cosine")
        assert sat.lr / sat.batch_size == pytest.approx(0.05 / 256)
        assert (sat.weight_decay, sat.decay, sat.loss, sat.distill) == (
            4e-5,
            "weights_no_depthwise",
            "cross_entropy",
            None,
        )
    for bits, decay in ((2, 2.5e-5), (3, 5e-5), (4, 1e-4)):
        for name in ("lsq", "lsq_plus"):
            lsq = TrainConfig.from_recipe(recipes.get(name, bits=bits))
            assert (lsq.epochs, lsq.lr, lsq.momentum, lsq.nesterov, lsq.schedule) == (90, 0.01, 0.9, False, "cosine")
            assert lsq.weight_decay == decay


@pytest.mark.parametrize(("batch", "peak"), [(2048, 0.4), (1024, 0.2), (256, 0.05)])
def test_sat_warms_up_from_one_rate_at_every_batch_size(batch, peak):
    config = TrainConfig.from_recipe(recipes.sat(), batch_size=batch, lr=peak, warmup_start=256 / batch)
    rates = [config.lr * lr_factor_of(config, step, 10) for step in (0, 25, 50, 775, 1499)]
    assert rates == pytest.approx([0.05, (0.05 + peak) / 2, peak, peak / 2, 0], abs=peak * 1e-5)


def decaying(model: nn.Module, recipe: bs.Recipe) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, TrainConfig.from_recipe(recipe)).param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, recipe.schedule.weight_decay}
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}


def test_sat_decays_weights_but_depthwise_ones():
    recipe = recipes.sat()
    model, layers = quantized("mobilenet_v2", recipe, width=0.25, stem="cifar")
    depthwise = {n for n, m in layers.items() if getattr(m, "groups", 1) > 1}
    assert len(depthwise) == 17
    assert decaying(model, recipe) == {f"{n}.weight" for n in set(layers) - depthwise}


def test_maqd_decays_convolutions_and_no_norm():
    recipe = recipes.maqd()
    model, layers = quantized("maqd_preact_resnet", recipe, width=2)
    assert any(isinstance(m, LayerBatchNorm) for m in model.modules())
    assert decaying(model, recipe) == {f"{n}.weight" for n in layers}


def test_lsq_steps_and_offsets_do_not_decay():
    for name in ("lsq", "lsq_plus"):
        recipe = recipes.get(name)
        model, _ = quantized("resnet20", recipe, width=2)
        assert decaying(model, recipe) == {n for n, _ in model.named_parameters() if "_quant." not in n}
