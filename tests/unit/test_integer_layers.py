"""Layers that train in integers: values and gradients are those of the integer products, to the last bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_integer import NEAREST, gauss, gradients, leaf, made, same
from torch import Tensor, nn

from bitstrata.integer import (
    CounterGenerator,
    Geometry,
    IntegerRule,
    LayerState,
    PackedShift,
    ShiftQuantized,
    WeightCodes,
    bias_grad,
    conv_forward,
    conv_input_grad,
    conv_weight_grad,
    engine_step,
    integer_conv,
    integer_linear,
    linear_forward,
    linear_input_grad,
    linear_weight_grad,
    shift_quantize,
    tensor_quantize,
    weight_codes,
)
from bitstrata.integer import layer_call as module_under_test

WORKED = torch.tensor([[7, 1, 0.4, 0.2], [-3.5, -1.75, 0.875, -0.05]])


# --- values and gradients are those of the integer products ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (6,)])
def test_linear_is_the_three_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = made(nn.Linear(6, 5), seed=11, index=2).to(dtype)
    x, g = gauss(*shape, axis=-1, dtype=dtype), gauss(*shape[:-1], 5, seed=1, axis=-1, dtype=dtype)
    xq = shift_quantize(x, 4, 4, axis=-1)
    gq = shift_quantize(g, 4, 4, axis=-1, rounding="stochastic", generator=CounterGenerator(11, 2 << 40))
    expected = (
        linear_forward(xq, weight_codes(layer.weight, 4, "out"), dtype=dtype) + layer.bias.detach(),
        linear_input_grad(gq, weight_codes(layer.weight, 4, "in"), dtype=dtype),
        linear_weight_grad(gq, xq, dtype=dtype),
        bias_grad(gq, dtype=dtype),
    )
    assert same(gradients(layer, x, g), expected)


CONVOLUTIONS: list[tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = [
    (nn.Conv2d, (3, 4, 7, 6), {"out_channels": 5, "kernel_size": 3}),
    (nn.Conv2d, (3, 4, 7, 6), {"out_channels": 6, "kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0)}),
    (nn.Conv2d, (2, 4, 8, 8), {"out_channels": 6, "kernel_size": 3, "dilation": 2, "padding": 2, "groups": 2}),
    (nn.Conv2d, (2, 4, 5, 5), {"out_channels": 8, "kernel_size": 3, "stride": 2, "padding": 1, "groups": 4}),
    (nn.Conv2d, (2, 4, 8, 8), {"out_channels": 3, "kernel_size": 1, "stride": 3}),
    (nn.Conv1d, (3, 4, 9), {"out_channels": 5, "kernel_size": 4, "stride": 3, "padding": 2}),
    (nn.Conv1d, (3, 4, 9), {"out_channels": 4, "kernel_size": 3, "dilation": 3, "padding": 1, "groups": 4}),
]


@pytest.mark.parametrize(("kind", "shape", "options"), CONVOLUTIONS)
def test_convolution_is_the_three_products(
    kind: type[nn.Module], shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    rule = IntegerRule(w=5, a=4, g=6, groups=3)
    layer = made(kind(shape[1], **options), rule, seed=5, index=1)
    x = gauss(*shape)
    g = gauss(*kind.forward(layer, x).shape, seed=2)
    groups = options.get("groups", 1)
    geometry = Geometry(layer.stride, layer.padding, layer.dilation, groups)
    xq = shift_quantize(x, 4, 3)
    gq = shift_quantize(g, 6, 3, rounding="stochastic", generator=CounterGenerator(5, 1 << 40))
    bias = layer.bias.detach().reshape(-1, *[1] * (len(shape) - 2))
    kernel = tuple(layer.weight.shape[2:])
    expected = (
        conv_forward(xq, weight_codes(layer.weight, 5, "out", groups), geometry) + bias,
        conv_input_grad(gq, weight_codes(layer.weight, 5, "in", groups), tuple(shape[2:]), geometry),
        conv_weight_grad(gq, xq, kernel, geometry),
        bias_grad(gq),
    )
    assert same(gradients(layer, x, g), expected)


@pytest.mark.parametrize(("kind", "shape", "options"), CONVOLUTIONS)
def test_convolution_is_torchs_on_dequantized_operands(
    kind: type[nn.Module], shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    layer = made(kind(shape[1], **options), NEAREST).double()
    x = gauss(*shape, dtype=torch.float64)
    groups = options.get("groups", 1)
    g = gauss(*kind.forward(layer, x).shape, seed=2, dtype=torch.float64)
    xd, gd = (shift_quantize(t, 4, 4).dequantize(torch.float64) for t in (x, g))
    conv = F.conv2d if kind is nn.Conv2d else F.conv1d
    sides = [weight_codes(layer.weight, 4, side, groups).dequantize(torch.float64) for side in ("out", "in")]
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    xl, wl = leaf(xd), leaf(sides[1])
    gx, gw = torch.autograd.grad(conv(xl, wl, None, *geometry), (xl, wl), gd)
    expected = (conv(xd, sides[0], layer.bias, *geometry), gx, gw, gd.transpose(0, 1).flatten(1).sum(1))
    for ours, torchs in zip(gradients(layer, x, g), expected, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["shift", "grouped", "absorbed"])
@pytest.mark.parametrize("conv", [False, True])
def test_every_form_gives_the_same(form: str, conv: bool) -> None:
    x = gauss(3, 6, 5, 5) if conv else gauss(9, 6)
    layers = [nn.Conv2d(6, 4, 3, padding=1, groups=2) if conv else nn.Linear(6, 4) for _ in range(2)]
    reference, other = made(layers[0]), made(layers[1], IntegerRule(form=form))
    g = gauss(*reference(x).shape, seed=1)
    assert same(gradients(reference, x, g), gradients(other, x, g))


def test_per_tensor_is_one_scale_for_each_operand() -> None:
    rule = IntegerRule(w=8, a=8, g=8, method="tensor", grad_rounding="nearest")
    layer = made(nn.Linear(6, 5), rule).double()
    x, g = gauss(7, 6, dtype=torch.float64), gauss(7, 5, seed=1, dtype=torch.float64)
    xd, wd, gd = (tensor_quantize(t.detach(), 8).dequantize(torch.float64) for t in (x, layer.weight, g))
    expected = (xd @ wd.T + layer.bias.detach(), gd @ wd, gd.T @ xd, gd.sum(0))
    for ours, plain in zip(gradients(layer, x, g), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


# --- worked examples ------------------------------------------------------------------------------------------------


def test_worked_forward_product() -> None:
    """Codes [[7,4,3,2],[-4,-7,7,0]], exponents [0,2,3,3]; dequantized [[7,1,.375,.25],[-4,-1.75,.875,0]]."""
    out = integer_linear(WORKED, torch.eye(4) * 7, rule=IntegerRule(w=4), training=False)
    assert out.tolist() == [[49, 7, 2.625, 1.75], [-28, -12.25, 6.125, 0]]
    one_group = integer_linear(WORKED, torch.eye(4) * 7, rule=IntegerRule(groups=1)) / 7
    assert one_group.tolist() == [[7, 1, 0, 0], [-4, -2, 1, 0]]


def test_worked_accumulator() -> None:
    """Codes with the weight codes [[1,-2],[3,1],[-7,4],[2,-5]]: accumulators [[63,-102],[-123,78]] in units of 1/8."""
    x = torch.cat((WORKED, torch.zeros(2, 1)), dim=1)  # a fifth channel of zeros, where the weight sets the scales to 1
    weight = torch.tensor([[1.0, 3, -7, 2, 7], [-2, 1, 4, -5, 7]])
    assert integer_linear(x, weight).tolist() == [[7.875, -12.75], [-15.375, 9.75]]
    conv = integer_conv(x[:, :, None], weight[:, :, None])
    assert conv[..., 0].tolist() == [[7.875, -12.75], [-15.375, 9.75]]


def test_worked_weight_codes_on_both_sides() -> None:
    """[[.7,-.3],[.1,.06]]: codes [[7,-3],[7,4]] with scales .1, .1/7 forward, [[7,-7],[1,1]] with .1, .3/7 backward."""
    weight = torch.tensor([[0.7, -0.3], [0.1, 0.06]], dtype=torch.float64)
    x = leaf(torch.tensor([[7.0, 0], [0, 7]], dtype=torch.float64))
    y = integer_linear(x, weight, rule=NEAREST)
    forward = torch.tensor([[7, -3], [7, 4]], dtype=torch.float64) * torch.tensor([[0.1], [0.1 / 7]])
    backward = torch.tensor([[7, -7], [1, 1]], dtype=torch.float64) * torch.tensor([0.1, 0.3 / 7])
    torch.testing.assert_close(y, 7 * forward.T, rtol=1e-6, atol=0)
    (gx,) = torch.autograd.grad(y, x, torch.tensor([[7.0, 0], [0, 7]], dtype=torch.float64))
    torch.testing.assert_close(gx, 7 * backward, rtol=1e-6, atol=0)


def test_gradients_are_unbiased() -> None:
    """Means over 20,000 draws against their closed forms: rounding z to a grid of step d has variance d^2 f (1 - f).

    A batch of 1,000 copies of a sample draws for each of them, and the weight's gradient sums over them.
    """
    layer = made(nn.Linear(3, 4), IntegerRule(w=4, a=4, g=3, groups=2)).double()
    x, g = gauss(1, 3, dtype=torch.float64), gauss(1, 4, seed=1, dtype=torch.float64)
    copies, passes = 1000, 20
    of_input, of_weight, of_bias = torch.zeros(3), torch.zeros(4, 3), torch.zeros(4)
    for _ in range(passes):
        gx, gw, gb = gradients(layer, x.expand(copies, 3), g.expand(copies, 4))[1:]
        of_input, of_weight, of_bias = of_input + gx.sum(0), of_weight + gw, of_bias + gb
    xq = shift_quantize(x, 4, 2).dequantize(torch.float64)[0]
    back = weight_codes(layer.weight, 4, "in").dequantize(torch.float64)
    gq = shift_quantize(g, 3, 2)
    steps = gq.scale.double() * gq.factors(torch.float64)
    fraction = (g[0] / steps) % 1
    variance = steps.square() * fraction * (1 - fraction)
    assert int((variance > 1e-6).sum()) == 3  # the largest element is a code, up to the float32 scale
    draws = copies * passes
    for total, mean, spread in (
        (of_input, g[0] @ back, (variance @ back.square()).sqrt()),
        (of_weight, g[0, :, None] * xq, variance.sqrt()[:, None] * xq.abs()),
        (of_bias, g[0], variance.sqrt()),
    ):
        off = (total / draws - mean).abs()
        assert bool((off <= 4.5 * spread / draws**0.5 + 1e-7).all())
        assert bool((off > 0).any())


# --- reproducible ---------------------------------------------------------------------------------------------------


def test_draws_depend_on_seed_layer_and_step_only() -> None:
    x, g = gauss(5, 6), gauss(5, 4, seed=1)

    def run(**options: Any) -> list[Tensor]:
        torch.rand(3)
        layer = made(nn.Linear(6, 4), **options)
        return [t for _ in range(2) for t in gradients(layer, x, g)]

    base = run(seed=1, index=0)
    assert same(base, run(seed=1, index=0))
    assert not torch.equal(base[2], base[6])  # the second step draws anew
    assert not torch.equal(base[2], run(seed=2, index=0)[2])
    assert not torch.equal(base[2], run(seed=1, index=1)[2])


def test_stochastic_activations_draw_anew_at_every_call() -> None:
    """From streams that torch's default generator picks, which is what checkpointing restores."""
    layer, x = made(nn.Linear(6, 4), IntegerRule(act_rounding="stochastic")), gauss(5, 6)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append([layer(x), layer(x)])
    assert same(*results)
    assert not torch.equal(*results[0])
    assert layer.state.noise.stream == 0  # the gradients' streams are not touched


def test_threads_change_nothing() -> None:
    x, threads = gauss(8, 8, 16, 16), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            layer = made(nn.Conv2d(8, 8, 3, padding=1))
            results.append(gradients(layer, x, gauss(8, 8, 16, 16, seed=1)))
    finally:
        torch.set_num_threads(threads)
    assert same(*results)


def test_copies_and_pickles_continue_with_the_same_draws() -> None:
    x, g = gauss(5, 6), gauss(5, 4, seed=1)
    layer = made(nn.Linear(6, 4))
    gradients(layer, x, g)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    expected = gradients(layer, x, g)
    for twin in twins:
        assert same(gradients(twin, x, g), expected)


def test_evaluation_rounds_to_nearest() -> None:
    layer = made(nn.Linear(6, 4), IntegerRule(act_rounding="stochastic"))
    nearest = made(nn.Linear(6, 4), NEAREST)
    x, g = gauss(5, 6), gauss(5, 4, seed=1)
    expected = gradients(nearest, x, g)
    assert same(gradients(layer.eval(), x, g), expected)
    assert not torch.equal(gradients(layer.train(), x, g)[0], expected[0])
    assert layer.state.noise.stream == 1  # evaluation drew nothing


@pytest.mark.parametrize(
    "change",
    [
        {"w": 3},
        {"a": 3},
        {"g": 3},
        {"groups": 2},
        {"act_rounding": "stochastic"},
        {"grad_rounding": "nearest"},
        {"unsigned_nonneg": True},
        {"method": "tensor"},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("conv", [False, True])
def test_every_option_changes_the_result(change: dict[str, Any], conv: bool) -> None:
    x = gauss(3, 6, 5, 5).relu() if conv else gauss(9, 6).relu()
    pair = [nn.Conv2d(6, 4, 3) if conv else nn.Linear(6, 4) for _ in range(2)]
    plain, other = made(pair[0]), made(pair[1], IntegerRule(**change))
    g = gauss(*plain(x).shape, seed=1)
    differ = [not torch.equal(p, o) for p, o in zip(gradients(plain, x, g), gradients(other, x, g), strict=True)]
    forward, of_input, of_weight, of_bias = differ
    expected = {
        "w": (True, True, False, False),
        "a": (True, False, True, False),
        "g": (False, True, True, True),
        "act_rounding": (True, False, True, False),
        "grad_rounding": (False, True, True, True),
        "unsigned_nonneg": (True, False, True, False),
    }.get(next(iter(change)), (True, True, True, True))
    assert (forward, of_input, of_weight, of_bias) == expected


# --- what is kept, and what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "share"), [(2, 1 / 15), (4, 1 / 7), (8, 1 / 3.9)])
def test_only_packed_codes_are_kept(bits: int, share: float) -> None:
    layer = made(nn.Conv2d(16, 8, 3, padding=1), IntegerRule(a=bits))
    x = leaf(gauss(4, 16, 8, 8))
    y = layer(x)
    node = next(fn for fn in walk(y.grad_fn) if "IntegerProduct" in fn.name())
    kept = [t for t in node.saved_tensors if t is not None and t is not layer.weight]
    assert [t.dtype for t in kept] == [torch.uint8, torch.uint8, torch.float32]
    packed = shift_quantize(x, bits, 4).pack()
    assert same(kept, (packed.codes, packed.exponents, packed.scale))
    size = sum(t.numel() * t.element_size() for t in kept)
    assert size == x.numel() * bits // 8 + 4 + 4
    assert size <= share * 4 * x.numel()
    assert isinstance(node.saved_tensors[-1], Tensor)
    assert node.saved_tensors[-1].data_ptr() == layer.weight.data_ptr()  # the master itself, no copy


def walk(fn: Any) -> Any:
    while fn is not None:
        yield fn
        fn = fn.next_functions[0][0] if fn.next_functions else None


def count_products(kind: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which gradients layers of this kind compute from now on, by operations one by one or by the engine."""
    called: list[str] = []
    for name in ("input_grad", "weight_grad"):
        original = getattr(module_under_test, f"{kind}_{name}")

        def counted(*args: Any, original: Any = original, name: str = name, **options: Any) -> Any:
            called.append(name)
            return original(*args, **options)

        monkeypatch.setattr(module_under_test, f"{kind}_{name}", counted)

    class Counted:
        def __init__(self, operation: Any) -> None:
            self.forward, self.operation = operation.forward, operation

        def backward(self, *args: Any) -> str:
            called.extend(
                name for name, out in zip(("input_grad", "weight_grad"), args[7:9], strict=True) if out is not None
            )
            return str(self.operation.backward(*args))

    made_by = engine_step._operation
    monkeypatch.setattr(engine_step, "_operation", lambda *args: Counted(made_by(*args)))
    return called


@pytest.mark.parametrize("form", ["engine", "float64"])
@pytest.mark.parametrize("needs", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("conv", [False, True])
def test_products_that_nobody_needs_are_not_computed(
    needs: tuple[int, ...], conv: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = count_products("conv" if conv else "linear", monkeypatch)
    layer = made(nn.Conv1d(6, 4, 3) if conv else nn.Linear(6, 4), IntegerRule(form=form))
    x = gauss(5, 6, 7) if conv else gauss(5, 6)
    full = gradients(layer, x, gauss(*layer(x).shape, seed=1))[1:]
    assert sorted(called) == ["input_grad", "weight_grad"]
    called.clear()
    layer.state = LayerState("again")
    leaves = [x.requires_grad_(bool(needs[0])), layer.weight, layer.bias]
    for t, need in zip(leaves[1:], needs[1:], strict=True):
        t.requires_grad_(bool(need))
    y = layer(x)
    node = next(fn for fn in walk(y.grad_fn) if "IntegerProduct" in fn.name())
    assert [t is not None for t in node.saved_tensors] == [bool(needs[1])] * 3 + [bool(needs[0])]
    y.backward(gauss(*y.shape, seed=1))
    assert called == ["input_grad"] * needs[0] + ["weight_grad"] * needs[1]
    for t, need, value in zip(leaves, needs, full, strict=True):
        assert t.grad is None if not need else torch.equal(t.grad, value)


def test_nothing_is_recorded_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made(nn.Linear(6, 4))
    with torch.no_grad(), monkeypatch.context() as patched:
        patched.delattr(ShiftQuantized, "pack")  # which nobody would read
        y = layer(leaf(gauss(5, 6)))
    assert y.grad_fn is None
    assert torch.equal(y, layer(gauss(5, 6)))


def test_packed_operands_are_what_backward_reads() -> None:
    """Unpacked from what is kept, the operand equals the one that was packed."""
    x = shift_quantize(gauss(3, 5, 2, 2).relu(), 4, 4, unsigned_nonneg=True)
    packed = x.pack()
    back = PackedShift(
        packed.codes, packed.exponents, packed.scale, (3, 5, 2, 2), 4, 1, 4, False, packed.channels_last
    ).unpack()
    assert isinstance(back, ShiftQuantized)
    assert same((x.codes, x.exponents, x.scale), (back.codes, back.exponents, back.scale))
    weight = gauss(4, 3)
    rule = IntegerRule(method="tensor", w=6)
    for side, channels in (("out", 4), ("in", 3)):
        coded = rule.quantize_weight(weight, side)
        assert isinstance(coded, WeightCodes)
        assert coded.scale.shape == (channels,)
        assert torch.equal(coded.dequantize(), tensor_quantize(weight, 6).dequantize())
