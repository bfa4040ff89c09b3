"""Gradients of fake-quantized networks from integer codes: near the float backward pass, repeatable, resumable."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_integer import gradient, whole
from torch import Tensor, nn

import bitstrata as bs
from bitstrata import prepare
from bitstrata.integer import CounterGenerator, shift_quantize
from bitstrata.nn.layers import QuantizedLayer
from bitstrata.quantizers.registry import build_gradient, describe
from bitstrata.recipes import Part

R = bs.recipes


def with_gradient(recipe: bs.Recipe, **options: Any) -> bs.Recipe:
    return dataclasses.replace(recipe, gradient=Part("shiftquant", "gradient", options))


MODELS = {
    "uniq": (lambda: R.uniq(4), {}),
    "uniq per channel": (lambda: R.uniq(2, per_channel=True), {}),
    "lsq": (lambda: R.lsq(4), {}),
    "strata": (lambda: R.strata(w=(2, 4)), {}),
    "strata per channel": (lambda: R.strata(w=(2, 4), per_channel=True, edges="inner"), {}),
    "lsq_plus, padded with codes": (lambda: R.lsq_plus(4), {}),
    "vertical": (R.vertical, {}),
    "int8": (lambda: R.int8(per_channel=True), {}),
    "on pixels": (lambda: R.uniq(4), {"input": bs.prepare.Pixels((0.3,), (0.35,))}),
    "maqd, pooled codes": (lambda: R.maqd(15, 4), {}),
}


def images(seed: int = 1) -> tuple[Tensor, Tensor]:
    pixels = torch.randint(0, 256, (16, 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    return (pixels / 255 - 0.3) / 0.35, torch.arange(16) % 10


def prepared(name: str, recipe: bs.Recipe, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = "maqd_vgg" if name.startswith("maqd") else "digits_resnet"
    model = bs.zoo.create(net, in_channels=1, width=8)
    x = images()[0]
    bs.quantize_(model, recipe, x[:4], **options)
    return bs.calibrate_(model, [x])


def layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    x, y = images(2)
    model.zero_grad()
    bs.joint_backward(model, x, y)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_models_agree_with_the_float_backward_pass(name: str) -> None:
    make, options = MODELS[name]
    coded = prepared(name, with_gradient(make(), g=8, rounding="nearest"), **options)
    plain = prepared(name, make(), **options)
    assert set(coded.state_dict()) == set(plain.state_dict())
    ours, theirs = gradients(coded), gradients(plain)
    assert ours.keys() == theirs.keys()
    weights = [n for n in ours if n.endswith("weight") and ours[n].dim() > 1]
    assert len(weights) >= 5
    for key in weights:
        assert F.cosine_similarity(ours[key].flatten(), theirs[key].flatten(), 0) > 0.97
        assert not torch.equal(ours[key], theirs[key])
    x = images(3)[0]
    for p in bs.precisions(plain):
        with bs.precision(coded, p), bs.precision(plain, p):
            assert torch.equal(coded.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_multiplies_the_codes_of_its_quantizers(name: str) -> None:
    """What reaches the input and weight quantizers is the float product's gradient of the dequantized codes."""
    make, options = MODELS[name]
    model = prepared(name, with_gradient(make(), g=5, groups=3, rounding="nearest"), **options).double()
    inputs: dict[str, Tensor] = {}
    found = layers(model)
    for key, layer in found.items():
        layer.register_forward_pre_hook(lambda _, args, key=key: inputs.__setitem__(key, args[0].detach()))
    with torch.no_grad():
        model(images()[0].double())
    for layer, x in ((found[key], inputs[key]) for key in found):
        twin = copy.deepcopy(layer)
        twin._forward_pre_hooks.clear()
        twin.grad_quant = None
        size = twin(x).shape
        axis = 1 if x.dim() == 4 else x.dim() - 1
        g = gradient(*size, axis=axis)
        scale = layer.weight_grid().scale.detach().reshape(-1)
        steps = scale if scale.numel() > 1 else torch.ones(1)
        shaped = steps.reshape([-1 if d == axis else 1 for d in range(g.dim())]).double()
        width = layer.grad_quant.rule.g
        dequantized = shift_quantize(g * shaped, width, 3, axis).dequantize(torch.float64) / shaped
        results = []
        for form, output in ((layer, g), (twin, dequantized)):
            form.zero_grad()
            leaf = x.clone().requires_grad_()
            form(leaf).backward(output)
            results.append([leaf.grad, *(p.grad for p in form.parameters() if p.grad is not None)])
        assert len(results[0]) == len(results[1]) >= 2
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


def layer_of(layer: nn.Module, x: Tensor, **options: Any) -> QuantizedLayer:
    model = bs.quantize_(nn.Sequential(layer), with_gradient(R.lsq_plus(4, edges="inner"), **options), x)
    with torch.no_grad():
        model(x)
    bs.calibrate_(model, [x])
    return model[0]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9)),
        (nn.Conv2d(3, 4, 3, padding="same", bias=False), (2, 3, 5, 5)),
        (nn.Conv2d(3, 4, (2, 4), padding="same"), (2, 3, 5, 6)),
        (nn.Conv2d(3, 4, 3, padding="valid"), (3, 5, 5)),
        (nn.Linear(6, 4), (2, 3, 6)),
        (nn.Linear(6, 4), (6,)),
    ],
)
@pytest.mark.parametrize("recipe", [R.lsq_plus, R.uniq])
def test_forms_of_layers(layer: nn.Module, shape: tuple[int, ...], recipe: Any) -> None:
    """One-dimensional, padded by name, without a batch; a gradient that 8 bits hold gives float's gradients."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    made = bs.quantize_(
        nn.Sequential(copy.deepcopy(layer)).double(), with_gradient(recipe(4, edges="inner"), g=8, groups=1), x
    )
    bs.calibrate_(made, [x])
    plain = copy.deepcopy(made)
    plain[0].grad_quant = None
    size = plain(x).shape
    g = whole(*size, low=-126, high=126, seed=3).double()
    g.view(-1)[0] = 127
    results = []
    for form in (made, plain):
        leaf = x.clone().requires_grad_()
        y = form(leaf)
        y.backward(g)
        results.append([y.detach(), leaf.grad, *(p.grad for p in form.parameters())])
    assert torch.equal(results[0][0], results[1][0])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


def test_an_input_that_is_always_zero_has_gradients_of_zero_codes() -> None:
    x = torch.zeros(2, 4)
    model = bs.quantize_(nn.Sequential(nn.Linear(4, 3)), with_gradient(R.lsq(4)), x + 1)
    model(x).sum().backward()
    assert torch.equal(model[0].weight.grad, torch.zeros(3, 4))
    assert float(model[0].bias.grad.abs().sum()) > 0


def test_half_precision_under_autocast_trains() -> None:
    model = prepared("uniq", with_gradient(R.uniq(4)))
    x, y = images()
    bs.joint_backward(model, x, y, amp=torch.bfloat16)
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in model.parameters())


# --- noise ------------------------------------------------------------------------------------------------------------


def test_draws_follow_seed_layer_and_step() -> None:
    def first(seed: int) -> dict[str, Tensor]:
        return gradients(prepared("uniq", with_gradient(R.uniq(4), seed=seed)))

    one, again, other = first(1), first(1), first(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["layer1.0.conv1.weight"], other["layer1.0.conv1.weight"])
    model = prepared("uniq", with_gradient(R.uniq(4), seed=1))
    streams = {layer.grad_quant.state.noise.stream for layer in layers(model).values()}
    assert len(streams) == len(layers(model))
    gradients(model)
    assert not torch.equal(gradients(model)["linear.weight"], one["linear.weight"])


def test_layers_of_a_precision_draw_on_their_own() -> None:
    model = prepared("strata", with_gradient(dataclasses.replace(R.strata(w=(2, 4)), own_edges=True)))
    streams = [layer.grad_quant.state.noise.stream for layer in layers(model).values()]
    assert len(set(streams)) == len(streams) > 7
    assert all(bool(g.isfinite().all()) for g in gradients(model).values())


def test_evaluation_rounds_to_nearest_and_draws_nothing() -> None:
    model = prepared("uniq", with_gradient(R.uniq(4))).eval()
    before = prepare.noise_state(model)
    assert set(before) == set(layers(model))
    x = images()[0].requires_grad_()
    (one,) = torch.autograd.grad(model(x).sum(), x)
    (two,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(one, two)
    assert prepare.noise_state(model) == before


def test_without_gradients_nothing_is_kept() -> None:
    model = prepared("uniq", with_gradient(R.uniq(4)))
    with torch.no_grad():
        assert not model(images()[0]).requires_grad
    assert all(layer.grad_quant.state.noise.stream % (1 << 40) == 0 for layer in layers(model).values())


@pytest.mark.parametrize("combine", ["scalarization", "mgd"])
def test_an_interrupted_joint_run_continues_bit_for_bit(tmp_path: Path, combine: str) -> None:
    data = [images(seed) for seed in (3, 4)]

    def trainer(model: nn.Module, epochs: int) -> bs.Trainer:
        config = bs.TrainConfig(epochs=epochs, lr=0.05, seed=1, schedule="constant", combine=combine)
        return bs.Trainer(model, config, data, data, out_dir=tmp_path / str(epochs))

    whole = prepared("strata", with_gradient(R.strata(w=(2, 4)), seed=9))
    trainer(whole, 3).fit()
    part = prepared("strata", with_gradient(R.strata(w=(2, 4)), seed=9))
    stopped = trainer(part, 3)
    stopped.out_dir, stopped.log.path = tmp_path / "part", None
    (tmp_path / "part").mkdir()
    torch.manual_seed(1)
    with stopped.reporter("x", 6, 0) as report:
        bs.train.checkpoint.seed_all(1)
        stopped._epoch(report, None)
    resumed = prepared("strata", with_gradient(R.strata(w=(2, 4)), seed=9))
    last = trainer(resumed, 3)
    last.out_dir, last.log.path = tmp_path / "part", None
    last.fit()
    assert prepare.noise_state(resumed) == prepare.noise_state(whole)
    assert all(torch.equal(resumed.state_dict()[k], v) for k, v in whole.state_dict().items())


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_is_an_error_or_skipped() -> None:
    model = prepared("uniq", with_gradient(R.uniq(4)))
    y = model(images()[0])
    with pytest.raises(ValueError, match=r"QuantLinear 'linear': 1 of 160 elements of the gradient \(16, 10\) are not"):
        y.backward(torch.full_like(y, 1.0).index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan)))
    model = prepared("uniq", with_gradient(R.uniq(4), on_nonfinite="skip"))
    y = model(images()[0])
    y.backward(torch.full_like(y, torch.inf))
    assert torch.equal(model.linear.weight.grad, torch.zeros_like(model.linear.weight))
    assert model.linear.grad_quant.state.skipped == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"g": 1}, r"IntegerRule: g: bits must be an integer in 2\.\.8, got 1"),
        ({"g": 9}, r"got 9"),
        ({"edge_bits": 12}, r"got 12"),
        ({"groups": 9}, r"groups must be an integer in 1\.\.8, got 9"),
        ({"rounding": "up"}, r"grad_rounding must be one of nearest, stochastic, got 'up'"),
        ({"on_nonfinite": "pass"}, r"on_nonfinite must be one of error, skip, got 'pass'"),
        ({"seed": -1}, r"seed"),
        ({"bits": 4}, r"gradient quantizer 'shiftquant' has no option 'bits'; it has: g, groups, edge_bits"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_gradient(R.uniq(4), **options)


def test_weights_only_have_no_codes_to_multiply() -> None:
    with pytest.raises(ValueError, match=r"multiplies codes of gradients by codes of activations; activation is None"):
        with_gradient(R.uniq(4, a=None))
    layer = prepared("uniq", with_gradient(R.uniq(4))).linear
    layer.act_quant = None
    with pytest.raises(ValueError, match="need a quantized input; this layer reads floats"):
        layer(torch.zeros(1, 64))


def test_pooled_codes_need_offset_0() -> None:
    layer = prepared("lsq_plus", with_gradient(R.lsq_plus(4))).layer1[0].conv2
    layer.input_pool = nn.AvgPool2d(2)
    with pytest.raises(ValueError, match="pools its input codes, whose grid has an offset"):
        layer(torch.rand(1, 8, 4, 4))
    layer.input_pool = nn.MaxPool2d(2)
    with pytest.raises(ValueError, match=r"whose grid has an offset|no number of positions of pooling MaxPool2d"):
        layer(torch.rand(1, 8, 4, 4))


def test_the_registry_builds_gradient_quantizers() -> None:
    assert describe("shiftquant", "gradient").options == (
        "g", "groups", "edge_bits", "rounding", "grid", "on_nonfinite", "seed",
    )  # fmt: skip
    edge = build_gradient("shiftquant", {"g": 3}, edge=True)
    inner = build_gradient("shiftquant", {"g": 3}, edge=False)
    same = build_gradient("shiftquant", {"g": 3, "edge_bits": None}, edge=True)
    assert [q.rule.g for q in (edge, inner, same)] == [8, 3, 3]
    assert "g=3, groups=4, stochastic" in repr(inner)
    assert not list(inner.state_dict())
    inner.start_("here", CounterGenerator(3, 5))
    assert inner.state.noise.state_dict() == {"seed": 3, "stream": 5}
