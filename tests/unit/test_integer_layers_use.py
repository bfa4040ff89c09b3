"""Layers that train in integers, among the rest of torch: checkpointing, hooks, autocast; padding; bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_integer import NEAREST, gauss, gradients, leaf, made, same
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitstrata.integer import (
    IntegerRule,
    integer_linear,
)
from bitstrata.nn import IntegerConv1d, IntegerConv2d, IntegerLayer, IntegerLinear, to_integer
from bitstrata.nn.integer_layers import layer_noise

# --- together with the rest of torch --------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("act_rounding", ["nearest", "stochastic"])
def test_checkpointing_changes_nothing(reentrant: bool, act_rounding: str) -> None:
    x, g = gauss(5, 6), gauss(5, 3, seed=1)
    results = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        rule = IntegerRule(act_rounding=act_rounding)
        net = nn.Sequential(made(nn.Linear(6, 4), rule, index=0), nn.ReLU(), made(nn.Linear(4, 3), rule, index=1))
        results.append([])
        for _ in range(2):
            inner = leaf(x)
            y = checkpoint(net, inner, use_reentrant=reentrant) if wrapped else net(inner)
            y.backward(g)
            results[-1] += [y.detach(), inner.grad]
        results[-1] += [p.grad for p in net.parameters()]
    assert same(*results)


def test_gradients_accumulate() -> None:
    layer, twin = (made(nn.Linear(6, 4)) for _ in range(2))
    parts = [(gauss(5, 6, seed=s), gauss(5, 4, seed=s + 9)) for s in (0, 1)]
    for x, g in parts:
        layer(x).backward(g)
    separate = [gradients(twin, x, g)[2] for x, g in parts]
    assert torch.equal(layer.weight.grad, separate[0] + separate[1])


def test_tied_weights_and_a_layer_used_twice() -> None:
    layer = made(nn.Linear(6, 6), NEAREST)
    other = made(nn.Linear(6, 6), NEAREST)
    other.weight, other.bias = layer.weight, layer.bias
    x = gauss(5, 6)
    sums = []
    for second in (layer, other):
        layer.weight.grad = None
        second(layer(x).tanh()).square().sum().backward()
        sums.append(layer.weight.grad)
    assert torch.equal(*sums)


def test_hooks_keep_working() -> None:
    float_layer, seen = nn.Linear(6, 4), []
    float_layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    float_layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    float_layer.weight.register_hook(lambda grad: grad * 2)
    keys, parameters = list(float_layer.state_dict()), list(float_layer.parameters())
    layer = made(float_layer, NEAREST)
    assert layer is float_layer
    assert list(layer.state_dict()) == keys
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    x, g = gauss(5, 6), gauss(5, 4, seed=1)
    doubled = gradients(layer, x, g)[2]
    assert seen == ["before", "backward"]
    assert torch.equal(doubled, 2 * gradients(made(nn.Linear(6, 4), NEAREST), x, g)[2])


def test_autocast_has_no_effect_inside() -> None:
    layer, x, g = made(nn.Linear(6, 4), NEAREST), gauss(5, 6), gauss(5, 4, seed=1)
    expected = gradients(layer, x, g)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(gradients(layer, x, g), expected)
        half = layer(x.bfloat16())
    assert half.dtype == torch.float32  # the wider of bfloat16 and the weight's float32
    assert torch.equal(half, layer(x.bfloat16().float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    layer = made(nn.Linear(6, 4, bias=False), NEAREST).to(dtype)
    x = leaf(gauss(5, 6, dtype=dtype))
    y = layer(x)
    wide = integer_linear(x.detach().double(), layer.weight.detach().double(), rule=NEAREST)
    assert y.dtype == dtype
    assert torch.equal(y, wide.to(dtype))
    y.sum().backward()
    assert (x.grad.dtype, layer.weight.grad.dtype) == (dtype, dtype)


def test_second_derivatives_are_refused() -> None:
    layer, x = made(nn.Linear(6, 4)), leaf(gauss(5, 6))
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="IntegerLinear: gradients of integer products are differentiable once"):
        first.sum().backward()


def test_a_weight_changed_before_backward_is_an_error() -> None:
    layer, x = made(nn.Linear(6, 4)), leaf(gauss(5, 6))
    y = layer(x)
    with torch.no_grad():
        layer.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded"])
def test_memory_layout_changes_nothing(layout: str) -> None:
    x, g = gauss(2, 4, 6, 6), gauss(2, 3, 6, 6, seed=1)
    if layout == "expanded":
        x, g = x[:, :, :1].expand(2, 4, 6, 6), g[:1].expand(2, 3, 6, 6)
    expected = gradients(made(nn.Conv2d(4, 3, 3, padding=1)), x.contiguous(), g.contiguous())
    if layout == "channels_last":
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    elif layout == "strided":
        x, g = (torch.stack((t, -t), dim=-1)[..., 0] for t in (x, g))
    layer = made(nn.Conv2d(4, 3, 3, padding=1))
    y = layer(x)
    y.backward(g)
    assert same((y.detach(), layer.weight.grad, layer.bias.grad), (expected[0], *expected[2:]))


# --- padding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.parametrize("kernel", [3, 4])
def test_every_padding(mode: str, padding: str | int, kernel: int) -> None:
    x = gauss(2, 4, 7)
    layer = made(nn.Conv1d(4, 3, kernel, padding=padding, padding_mode=mode), IntegerRule(w=8, a=8, groups=8))
    frame = layer._reversed_padding_repeated_twice
    padded = F.pad(x, frame, mode="constant" if mode == "zeros" else mode)
    plain = made(nn.Conv1d(4, 3, kernel), layer.rule)
    y = layer(x)
    assert y.shape == nn.Conv1d.forward(layer, x).shape
    assert torch.equal(y, plain(padded))


def test_same_padding_of_an_oblong_kernel() -> None:
    x = gauss(2, 4, 7, 6)
    layer = made(nn.Conv2d(4, 3, (5, 3), padding="same"))
    assert torch.equal(layer(x), made(nn.Conv2d(4, 3, (5, 3), padding=(2, 1)))(x))


def test_one_sample_without_a_batch() -> None:
    layer, x = made(nn.Conv2d(4, 3, 3)), gauss(4, 7, 7, axis=0)
    assert torch.equal(layer(x), layer(x[None])[0])


# --- edges and bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [False, True])
def test_an_empty_batch_gives_an_empty_result_and_no_gradient(conv: bool) -> None:
    layer = made(nn.Conv2d(6, 4, 3, stride=2)) if conv else made(nn.Linear(6, 4))
    x = leaf(torch.empty(0, 6, 7, 7) if conv else torch.empty(0, 6))
    y = layer(x)
    assert y.shape == ((0, 4, 3, 3) if conv else (0, 4))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not layer.weight.grad.any()
    with pytest.raises(ValueError, match=r"integer layer: input \(0, 6\) has no elements"):
        integer_linear(torch.empty(0, 6), torch.ones(4, 6))


@pytest.mark.parametrize("conv", [False, True])
def test_gradients_of_zeros_and_single_outliers(conv: bool) -> None:
    layer = made(nn.Conv1d(6, 4, 2) if conv else nn.Linear(6, 4)).double()
    x = gauss(5, 6, 3, dtype=torch.float64) if conv else gauss(5, 6, dtype=torch.float64)
    g = torch.zeros_like(layer(x)).detach()
    assert not any(t.any() for t in gradients(layer, x, g)[1:])
    g = g.contiguous()
    g.view(-1)[2] = 1e30  # alone: on the grid whatever is drawn, up to the float32 scale
    of_bias = gradients(layer, x, g)[3]
    channel = 1 if conv else 2  # of element 2 of the gradient
    assert of_bias[channel] == pytest.approx(1e30, rel=1e-6)
    assert int((of_bias != 0).sum()) == 1
    zeros = gradients(layer, torch.zeros_like(x), g)
    assert torch.equal(zeros[0], layer.bias.detach().reshape((1, 4, 1) if conv else (1, 4)).expand_as(g))
    assert not zeros[2].any()


BAD = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_is_an_error_that_names_the_layer(bad: float) -> None:
    layer = made(nn.Linear(6, 4), name="head.0")
    x = gauss(5, 6)
    x[1, 2] = bad
    with pytest.raises(
        ValueError, match=r"IntegerLinear 'head.0': 1 of 30 elements of the activation \(5, 6\) are not"
    ):
        layer(x)
    y = layer(gauss(5, 6))
    g = torch.ones(5, 4)
    g[0, :3] = bad
    with pytest.raises(ValueError, match=r"IntegerLinear 'head.0': 3 of 20 elements of the gradient \(5, 4\) are not"):
        y.backward(g)
    with torch.no_grad():
        layer.weight[0, 0] = bad
    with pytest.raises(ValueError, match=r"IntegerLinear 'head.0': weight \(4, 6\): .* contains NaN or infinity"):
        layer(gauss(5, 6))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["activation", "gradient"])
@pytest.mark.parametrize("conv", [False, True])
def test_skipped_steps_have_zero_gradients_and_are_counted(bad: float, where: str, conv: bool) -> None:
    rule = IntegerRule(on_nonfinite="skip")
    layer = made(nn.Conv2d(6, 4, 3, padding=1), rule) if conv else made(nn.Linear(6, 4), rule)
    x = gauss(5, 6, 4, 4) if conv else gauss(5, 6)
    g = torch.ones(layer(x).shape)
    (x if where == "activation" else g).view(-1)[3] = bad
    y, *grads = gradients(layer, x, g)
    assert bool(y.isnan().all()) == (where == "activation")
    assert y.shape == g.shape
    assert [t.shape for t in grads] == [x.shape, layer.weight.shape, layer.bias.shape]
    assert not any(t.any() for t in grads)
    assert layer.state.skipped == 1
    gradients(layer, gauss(*x.shape), torch.ones_like(g))
    assert layer.state.skipped == 1


def test_float64_beyond_float32_is_not_finite() -> None:
    with pytest.raises(ValueError, match="1 of 6 elements of the activation"):
        integer_linear(torch.tensor([[1e300, 1, 1, 1, 1, 1]], dtype=torch.float64), torch.ones(2, 6))


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"IntegerLinear 'fc': input \(5, 7\) must be \(\.\.\., in\) and weight \(4, 6\)"
    ):
        made(nn.Linear(6, 4), name="fc")(gauss(5, 7))
    with pytest.raises(ValueError, match=r"input \(2, 5, 7, 7\) must be .* \(out, in / groups, ...\) with groups=2"):
        made(nn.Conv2d(6, 4, 3, groups=2))(gauss(2, 5, 7, 7))
    with pytest.raises(ValueError, match="does not fit an input of"):
        made(nn.Conv2d(6, 4, 3))(gauss(2, 6, 2, 2))
    with pytest.raises(ValueError, match="must be floating"):
        integer_linear(torch.ones(5, 6, dtype=torch.int64), torch.ones(4, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w": 1}, "IntegerRule: w: bits must be an integer in 2..8, got 1"),
        ({"a": 9}, "IntegerRule: a: bits must be an integer in 2..8, got 9"),
        ({"g": True}, "IntegerRule: g: bits must be an integer in 2..8, got True"),
        ({"groups": 9}, "IntegerRule: groups must be an integer in 1..8, got 9"),
        ({"act_rounding": "up"}, "act_rounding must be one of nearest, stochastic, got 'up'"),
        ({"grad_rounding": "up"}, "grad_rounding must be one of nearest, stochastic, got 'up'"),
        ({"method": "row"}, "method must be one of shift, tensor, got 'row'"),
        ({"form": "fast"}, "form must be one of shift, float64, grouped, absorbed, engine, got 'fast'"),
        ({"on_nonfinite": "pass"}, "on_nonfinite must be one of error, skip, got 'pass'"),
    ],
)
def test_rules_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IntegerRule(**options)


def test_conversion_refuses_other_types_and_bad_seeds() -> None:
    with pytest.raises(TypeError, match="no integer form of ConvTranspose2d; there are: Linear, Conv1d, Conv2d"):
        to_integer(nn.ConvTranspose2d(3, 3, 1))
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="index must be in"):
        to_integer(layer, index=-1)
    with pytest.raises(ValueError, match="seed must be in"):
        to_integer(layer, seed=1 << 64)
    assert type(layer) is nn.Linear
    assert layer_noise(3, 2).stream == 2 << 40


@pytest.mark.parametrize("kind", [IntegerLinear, IntegerConv1d, IntegerConv2d])
def test_layers_can_be_made_directly(kind: type[IntegerLayer]) -> None:
    sizes = (6, 4) if kind is IntegerLinear else (6, 4, 3)
    layer = kind(*sizes, rule=IntegerRule(w=6, groups=2), seed=3)
    shape = {IntegerLinear: (5, 6), IntegerConv1d: (5, 6, 7), IntegerConv2d: (5, 6, 7, 7)}[kind]
    assert layer(gauss(*shape)).shape[:2] == (5, 4)
    assert "w/a/g=6/4/4, groups=2" in repr(layer)
    assert layer.state.noise.seed == 3
