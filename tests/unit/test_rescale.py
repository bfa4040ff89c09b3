"""SAT's rescaling: worked examples, the constant's gradient, any quantizer inside, and the statistics it is for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bitstrata.functional.sat import clamped_weight, deviation_scale, sat_scale, spread
from bitstrata.quantizers import LayerFacts, build, build_rescale, build_transform, names
from bitstrata.quantizers.base import WeightQuantizer

F64 = torch.float64
W = torch.tensor([[0.2, -0.5, 1.0], [-0.1, 0.3, -0.8]], dtype=F64)


def inner(name: str = "dorefa", bits: int = 2, channels: int | None = None, **options: object) -> WeightQuantizer:
    quantizer = build(name, "weight", options, bits={bits: bits}, channels=channels).double()
    assert isinstance(quantizer, WeightQuantizer)
    return quantizer


def rescaled(kind: str = "constant", quantizer: WeightQuantizer | None = None, **options: object) -> WeightQuantizer:
    return build_rescale(kind, options, inner() if quantizer is None else quantizer)


def conv_weight(dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(5), dtype=F64).mul_(0.3).to(dtype)


def near(actual: Tensor, expected: object, tolerance: float = 5e-8) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


# ---- the constant


def test_two_bits():
    quantizer = rescaled()
    near(inner()(W).square().mean(), 0.40740741)
    near(quantizer.scale_of(W), 1.10782342)
    near(quantizer(W), [[0.36927447, -0.36927447, 1.10782342], [-0.36927447, 0.36927447, -1.10782342]])


def test_four_bits():
    near(inner(bits=4)(W).square().mean(), 0.37777778)
    near(rescaled(quantizer=inner(bits=4)).scale_of(W), 1.15044748)


def test_deviation_instead_of_the_mean_square():
    near(rescaled(var_mode="std").scale_of(W), 1.01129979)


def test_float_network():
    clamp = torch.tanh(W) / torch.tanh(W).abs().max()
    near(sat_scale(clamp), 1.12770964)
    near(clamped_weight(W), 1.12770964 * clamp)
    near(build_transform("tanh", {"rescale": True})(W), 1.12770964 * clamp)
    assert torch.equal(clamped_weight(W, rescale=False), clamp)
    std = build_transform("tanh", {"rescale": True, "var_mode": "std"})(W)
    near(std, clamp / (2**0.5 * clamp.std()), 1e-12)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_variance_times_the_fan_out_is_one(bits):
    for w, fan in ((W, 2), (conv_weight(), 54), (conv_weight()[:, :, 0], 18)):
        assert float(fan * rescaled(quantizer=inner(bits=bits))(w).square().mean()) == pytest.approx(1, abs=1e-12)


def test_deviation_rescale():
    quantizer = rescaled("stddev")
    near(quantizer.scale_of(W), float((W.square().mean() / inner()(W).square().mean()).sqrt()), 1e-14)
    near(quantizer(W).square().mean(), float(W.square().mean()), 1e-14)
    std = rescaled("stddev", var_mode="std")
    near(std(W).std(), float(W.std()), 1e-14)
    assert float(std.scale_of(W)) != float(quantizer.scale_of(W))


# ---- where it applies


@pytest.mark.parametrize(
    ("convs", "normalized", "expected"),
    [("auto", True, False), ("auto", False, True), ("all", True, True), ("none", False, False), ("none", True, False)],
)
@pytest.mark.parametrize("kind", ["constant", "stddev"])
def test_convolutions_by_option_and_linear_layers_always(kind, convs, normalized, expected):
    w = conv_weight()
    quantizer = rescaled(kind, convs=convs)
    quantizer.adapt_(LayerFacts(kind="conv", normalized=normalized, edge=False))
    assert (not torch.equal(quantizer(w), inner()(w))) == expected
    assert (float(quantizer.scale_of(w)) != 1) == expected
    assert torch.equal(quantizer(w), quantizer.grid(w).dequantize(quantizer.codes(w)))
    quantizer.adapt_(LayerFacts(kind="linear", normalized=normalized, edge=True))
    assert float(quantizer.scale_of(W)) != 1


def test_facts_reach_the_inner_quantizer():
    class Watching(type(inner())):
        def adapt_(self, facts: LayerFacts) -> None:
            self.seen = facts

    watching = Watching({2: 2})
    facts = LayerFacts(kind="conv", normalized=True, edge=False)
    rescaled(quantizer=watching).adapt_(facts)
    assert watching.seen is facts


# ---- gradients


@pytest.mark.parametrize("kind", ["constant", "stddev"])
@pytest.mark.parametrize("name", ["dorefa", "nested", "lsq"])
def test_every_gradient_is_s_times_the_inner_one(kind, name):
    upstream = torch.linspace(-1, 1, 6, dtype=F64).view(2, 3)
    plain = inner(name)
    plain.init_(W)
    wrapped = rescaled(kind, copy.deepcopy(plain))
    grads = []
    for quantizer in (plain, wrapped):
        w = W.clone().requires_grad_()
        quantizer(w).backward(upstream)
        grads.append([w.grad, *(p.grad for p in quantizer.parameters())])
    s = wrapped.scale_of(W)
    assert float(s) != 1
    assert len(grads[0]) == len(grads[1])
    for below, above in zip(*grads, strict=True):
        near(above, (s * below).tolist(), 1e-12)


def test_the_float_network_gets_no_gradient_through_the_variance():
    upstream = torch.linspace(-1, 1, 6, dtype=F64).view(2, 3)
    grads = []
    for rescale in (False, True):
        w = W.clone().requires_grad_()
        clamped_weight(w, rescale=rescale).backward(upstream)
        grads.append(w.grad)
    near(grads[1], (1.12770964 * grads[0]).tolist(), 1e-7)


def test_as_a_parametrization_of_a_float_layer():
    layer = nn.Linear(3, 2).double()
    with torch.no_grad():
        layer.weight.copy_(W)
    parametrize.register_parametrization(layer, "weight", build_transform("tanh", {"rescale": True}))
    assert float(2 * layer.weight.square().mean().detach()) == pytest.approx(1)
    layer(torch.ones(1, 3, dtype=F64)).sum().backward()
    assert float(layer.parametrizations.weight.original.grad.abs().sum()) > 0


# ---- around any quantizer


@pytest.mark.parametrize("kind", names("rescale"))
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("name", names("weight"))
def test_forward_is_the_scaled_grid_of_the_inner_codes(name, channels, kind, dtype):
    w = conv_weight(dtype)
    plain = build(name, "weight", {}, bits={4: 4}, channels=channels).to(dtype)
    plain.init_(w)
    quantizer = build_rescale(kind, {}, plain)
    grid, codes, below = quantizer.grid(w), quantizer.codes(w), plain.grid(w)
    assert torch.equal(codes, plain.codes(w))
    assert (grid.offset, grid.lo, grid.hi, grid.valid) == (below.offset, below.lo, below.hi, below.valid)
    assert torch.equal(grid.scale, below.scale * quantizer.scale_of(w))
    assert quantizer(w).dtype == dtype
    assert torch.equal(quantizer(w), grid.dequantize(codes))
    assert (quantizer.nested, quantizer.offset, quantizer.signed, quantizer.channels) == (
        plain.nested,
        plain.offset,
        plain.signed,
        plain.channels,
    )


def test_precision_parameters_and_initialisation_are_the_inner_ones():
    plain = build("nested", "weight", {}, bits={1: 1, 2: 2, 4: 4}).double()
    quantizer = build_rescale("constant", {}, plain)
    twin = copy.deepcopy(plain)
    quantizer.init_(W)
    twin.init_(W)
    assert torch.equal(plain.step, twin.step)
    assert quantizer.precision_parameters() == plain.precision_parameters() != {}
    assert quantizer.bits == plain.bits
    assert quantizer.precision == 4
    scales = set()
    for p in (1, 2, 4):
        quantizer.precision = p
        assert plain.precision == p
        assert quantizer.width == p
        scales.add(float(quantizer.scale_of(W)))
        assert float(2 * quantizer(W).square().mean().detach()) == pytest.approx(1)
    assert len(scales) == 3


def test_the_precision_survives_wrapping_and_copies():
    plain = build("nested", "weight", {}, bits={1: 1, 4: 4})
    plain.precision = 1
    quantizer = copy.deepcopy(build_rescale("constant", {}, plain))
    assert quantizer.precision == 1
    quantizer.precision = 4
    assert plain.precision == 1
    other = build_rescale("constant", {}, build("nested", "weight", {}, bits={1: 1, 4: 4}))
    other.load_state_dict(quantizer.state_dict(), strict=True)


# ---- corners


@pytest.mark.parametrize("kind", names("rescale"))
def test_all_zero_and_constant_weights_are_finite(kind):
    for plain in (inner("lsq"), inner(), inner("nested")):
        for w in (torch.zeros(2, 3, dtype=F64), torch.full((2, 3), 0.2, dtype=F64), torch.zeros(1, 1, dtype=F64)):
            for mode in ("meansq", "std"):
                plain.init_(w)
                x = w.clone().requires_grad_()
                quantizer = rescaled(kind, plain, var_mode=mode)
                quantizer(x).sum().backward()
                assert bool(torch.isfinite(quantizer(w)).all())
                assert bool(torch.isfinite(x.grad).all())
                assert float(quantizer.grid(w).scale) > 0


def test_a_variance_of_zero_leaves_the_grid_alone():
    zeros = torch.zeros(2, 3, dtype=F64)
    plain = inner("lsq")
    plain.init_(zeros)
    assert float(rescaled("constant", plain).scale_of(zeros)) == 1
    assert float(deviation_scale(W, zeros)) == 1
    assert float(sat_scale(torch.full((2, 3), 0.5), "std")) == 1
    assert float(deviation_scale(zeros, W)) == pytest.approx(1e-8)


@pytest.mark.parametrize("size", [1e-25, 1e-10, 1e10, 1e25])
@pytest.mark.parametrize("mode", ["meansq", "std"])
def test_squares_neither_underflow_nor_overflow(size, mode):
    w = conv_weight(torch.float32)
    assert float(sat_scale(w * size, mode)) == pytest.approx(float(sat_scale(w.double(), mode)) / size, rel=1e-5)
    assert float(spread(w * size, mode)) == pytest.approx(size * float(spread(w, mode)), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    w = conv_weight().to(dtype)
    quantizer = rescaled(quantizer=build("dorefa", "weight", {}, bits={4: 4}))
    assert torch.equal(quantizer(w), quantizer(w.float()).to(dtype))
    transform = build_transform("tanh", {"rescale": True})
    assert torch.equal(transform(w), transform(w.float()).to(dtype))
    assert sat_scale(w).dtype == torch.float32


def test_errors():
    with pytest.raises(ValueError, match=r"ConstantRescale: grid needs the tensor x: its scale follows the weight"):
        rescaled().grid()
    for kind, cls in (("constant", "ConstantRescale"), ("stddev", "DeviationRescale")):
        with pytest.raises(ValueError, match=rf"{cls}: var_mode must be one of meansq, std, got 'var'"):
            rescaled(kind, var_mode="var")
        with pytest.raises(ValueError, match=rf"{cls}: convs must be one of auto, all, none, got 'some'"):
            rescaled(kind, convs="some")
    with pytest.raises(ValueError, match=r"Tanh: var_mode must be one of meansq, std, got 'var'"):
        build_transform("tanh", {"var_mode": "var"})
    with pytest.raises(ValueError, match=r"spread: var_mode must be one of meansq, std, got 'var'"):
        spread(W, "var")
    with pytest.raises(ValueError, match=r"sat_scale: w must be \(out, in/groups, ...\), got shape \(6,\)"):
        sat_scale(W.view(-1))


# ---- what it is for


@pytest.mark.parametrize(
    ("features", "vanilla", "clamped"),
    [(512, 0.010449, 0.47), (2048, 0.041796, 1.5), (1024, 0.020898, 0.95), (1280, 0.026122, 1.06)],
)
def test_training_rule_of_the_last_layer(features, vanilla, clamped):
    """n VAR[weight]/pool^2 with 1000 outputs behind a 7x7 pooling (SAT eq. S7): clamping breaks the rule "below 0.1",
    rescaling restores the value of Gaussian weights."""
    w = torch.randn(1000, features, generator=torch.Generator().manual_seed(1), dtype=torch.float32) / 1000**0.5

    def kappa(weight: Tensor) -> float:
        return float(features * weight.square().mean()) / 49

    clamp = clamped_weight(w, rescale=False)
    assert kappa(w) == pytest.approx(vanilla, rel=0.01)
    assert 35 < kappa(clamp) / kappa(w) < 50
    assert kappa(clamp) == pytest.approx(clamped, rel=0.2)
    assert kappa(clamped_weight(w)) == pytest.approx(vanilla, rel=1e-4)
    quantizer = rescaled(quantizer=build("dorefa", "weight", {}, bits={4: 4}))
    assert kappa(quantizer(w)) == pytest.approx(vanilla, rel=1e-4)


def test_the_scale_of_the_last_layer_may_go_into_its_bias():
    """(s Q x + b)/s = Q x + b/s: the same arg-max, another cross entropy (SAT S7)."""
    generator = torch.Generator().manual_seed(2)
    x, b = torch.randn(50, 3, generator=generator, dtype=F64), torch.randn(2, generator=generator, dtype=F64)
    quantizer = rescaled()
    s, logits = quantizer.scale_of(W), nn.functional.linear(x, quantizer(W), b)
    bare = nn.functional.linear(x, inner()(W), b / s)
    near(logits / s, bare, 1e-12)
    assert torch.equal(logits.argmax(1), bare.argmax(1))
    target = torch.zeros(50, dtype=torch.long)
    entropy = nn.functional.cross_entropy
    assert abs(float(entropy(logits, target) - entropy(bare, target))) > 1e-3
