"""Quantized layers: equal to torch's own operation on fake-quantized tensors, and, on pixels, to integer arithmetic."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.nn import QuantConv1d, QuantConv2d, QuantizedLayer, QuantLinear, convert
from bitstrata.quantizers import build

FLOAT_FORMS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6), QuantLinear),
    "linear of tokens": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6), QuantLinear),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9), QuantConv1d),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 5), QuantConv2d),
    "dilated same": (lambda: nn.Conv2d(3, 4, (3, 2), padding="same", dilation=(2, 1)), (2, 3, 6, 5), QuantConv2d),
    "depthwise": (
        lambda: nn.Conv2d(4, 8, 3, stride=(2, 1), padding=(1, 0), groups=4, bias=False),
        (2, 4, 6, 5),
        QuantConv2d,
    ),
}


def with_zero(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x.view(-1)[0] = 0.0
    return x


def quantized(layer: nn.Module, *, per_channel: bool = False, widths: tuple[int, ...] = (1, 2, 4)) -> QuantizedLayer:
    bits = {b: b for b in widths}
    channels = layer.weight.shape[0] if per_channel else None
    weight = build("nested", "weight", {}, bits=bits, channels=channels)
    return convert(layer.double(), weight, build("uniq", "activation", {}, bits=bits, signed=True), edge=False)


def operation(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    function = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
    return function(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", FLOAT_FORMS)
def test_layers_equal_torch_on_fake_quantized_tensors(name, per_channel):
    make, shape, form = FLOAT_FORMS[name]
    torch.manual_seed(0)
    layer = quantized(make(), per_channel=per_channel)
    assert type(layer) is form
    x = with_zero(*shape)
    for p in layer.precisions:
        layer.set_precision(p)
        assert (layer.precision, layer.weight_quant.precision, layer.act_quant.precision) == (p, p, p)
        out = layer(x)
        codes, grid = layer.weight_quant.codes(layer.weight.detach()), layer.weight_quant.grid()
        inputs = layer.act_quant.grid().dequantize(layer.act_quant.codes(x))
        assert torch.equal(out, operation(layer, inputs, grid.dequantize(codes)))
    layer.set_precision(1)
    assert layer.quantized_weight().unique().numel() == (2 if not per_channel else 2 * layer.weight.shape[0])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_layers_are_called_by_keyword_as_in_torch():
    for make, shape, _ in FLOAT_FORMS.values():
        layer, x = quantized(make()), with_zero(*shape)
        assert torch.equal(layer(input=x), layer(x))


def test_a_layer_without_input_quantizer_uses_float_inputs():
    layer = nn.Linear(4, 3).double()
    convert(layer, build("lsq", "weight", {}, bits={4: 4}), None, edge=False)
    x = with_zero(2, 4)
    assert torch.equal(layer(x), F.linear(x, layer.quantized_weight(), layer.bias))
    layer.set_precision(4)
    assert layer.precisions == (4,)


def test_the_swap_keeps_identity_hooks_mode_and_keys():
    layer = nn.Conv2d(2, 3, 3).eval()
    weight, keys = layer.weight, set(layer.state_dict())
    seen: list[str] = []
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_forward_pre_hook(lambda *_: seen.append("pre"))
    quantized(layer)
    assert layer.weight is weight
    assert keys < set(layer.state_dict())
    assert {key.split(".")[0] for key in set(layer.state_dict()) - keys} == {"weight_quant", "act_quant"}
    assert not any(module.training for module in layer.modules())
    layer.train()(with_zero(1, 2, 5, 5))
    assert seen == ["pre", "forward"]
    assert isinstance(layer, nn.Conv2d)


def test_quantizers_take_the_layers_dtype():
    layer = quantized(nn.Linear(4, 3))
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert layer.act_quant.initialized.dtype == torch.bool


def test_gradients_reach_weight_bias_and_steps():
    layer, x = quantized(nn.Conv2d(3, 4, 3, padding=1)), with_zero(2, 3, 5, 5).requires_grad_()
    layer(x)
    layer.set_precision(2)
    layer(x).square().sum().backward()
    at_two = {"weight", "bias", "weight_quant.step", "weight_quant.ratios.2", "act_quant.steps.2"}
    got = {name for name, p in layer.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0}
    assert got == at_two
    assert float(x.grad.abs().sum()) > 0


def test_copies_are_independent():
    layer, x = quantized(nn.Linear(4, 3)), with_zero(2, 4)
    layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight_quant.step.mul_(2)
    twin.set_precision(4)
    layer.set_precision(1)
    assert (twin.precision, layer.precision) == (4, 1)
    assert not torch.equal(twin.weight_quant.step, layer.weight_quant.step)


# ---- the first layer, on pixels

MEAN, STD = (0.4914, 0.4822, 0.1), (0.247, 0.2435, 0.5)


def pixel_layer(layer: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> QuantizedLayer:
    weight = build("lsq", "weight", {}, bits={1: 8, 4: 8}, channels=layer.weight.shape[0])
    pixels = build("pixels", "input", {"mean": mean, "std": std}, bits={1: 1, 4: 4})
    return convert(layer.double(), weight, pixels, edge=True)


def normalised(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    shape = (-1, *[1] * (pixels.ndim - 2))
    m, s = (torch.tensor(v, dtype=torch.float64).view(shape) for v in (mean, std))
    return (torch.from_numpy(pixels).double() / 255 - m) / s


def integer_conv(layer: nn.Module, pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """The layer as sums of integers: codes of W/std times pixels, the border filled with the pixel nearest the mean.

    value = s_w / 255 * sum c_w (pixel - 255 mean) + bias; loops over output positions, one image at a time.
    """
    out_channels, per_group = layer.weight.shape[:2]
    channels = per_group * layer.groups
    mean, std = (list(v) * (channels if len(v) == 1 else 1) for v in (mean, std))
    weight = layer.weight.detach().numpy()
    kh, kw = weight.shape[2:]
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, (kh, kw), strict=True)]
        top, left = (t // 2 for t in total)
        bottom, right = total[0] - top, total[1] - left
    else:
        (top, left), (bottom, right) = layer.padding, layer.padding
    n, _, height, width = pixels.shape
    padded = np.empty((n, channels, height + top + bottom, width + left + right), dtype=np.int64)
    for c in range(channels):
        padded[:, c] = int(np.clip(np.round(255 * mean[c]), 0, 255))
    padded[:, :, top : top + height, left : left + width] = pixels
    (sy, sx), (dy, dx) = layer.stride, layer.dilation
    rows = (padded.shape[2] - dy * (kh - 1) - 1) // sy + 1
    columns = (padded.shape[3] - dx * (kw - 1) - 1) // sx + 1
    result = np.empty((n, out_channels, rows, columns))
    for o in range(out_channels):
        first = o // (out_channels // layer.groups) * per_group
        real = weight[o] / np.array(std[first : first + per_group])[:, None, None]
        step = layer.weight_quant.step[o].item()
        codes = np.clip(np.round(real / step), -128, 127).astype(np.int64)
        constant = sum(255 * mean[first + i] * int(codes[i].sum()) for i in range(per_group))
        bias = 0.0 if layer.bias is None else layer.bias[o].item()
        for i in range(rows):
            for j in range(columns):
                y, x = i * sy, j * sx
                window = padded[:, first : first + per_group, y::dy, x::dx][:, :, :kh, :kw]
                total = (window * codes).sum(axis=(1, 2, 3))
                result[:, o, i, j] = step / 255 * (total - constant) + bias
    return result


@pytest.mark.parametrize(
    ("layer", "mean", "std"),
    [
        (lambda: nn.Conv2d(3, 4, 3, padding=1), MEAN, STD),
        (lambda: nn.Conv2d(3, 4, 3, padding=(2, 0), stride=2, bias=False), MEAN, STD),
        (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), MEAN, STD),
        (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), MEAN, STD),
        (lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2), MEAN, STD),
        (lambda: nn.Conv2d(3, 4, 2), MEAN, STD),
        (lambda: nn.Conv2d(1, 4, 3, padding=1), (0.2860,), (0.3530,)),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), (0.9999,), (0.25,)),
        (lambda: nn.Conv2d(3, 4, 3, padding=1), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
)
def test_the_pixel_layer_is_integer_arithmetic(layer, mean, std):
    torch.manual_seed(1)
    layer = layer()
    plain = copy.deepcopy(layer).double()
    pixel_layer(layer, mean, std)
    pixels = np.random.default_rng(0).integers(0, 256, (2, layer.in_channels, 6, 7))
    pixels[0, 0, 0, :3] = 0, 255, 127
    repeat = layer.in_channels if len(mean) == 1 else 1
    x = normalised(pixels, mean * repeat, std * repeat)
    expected = integer_conv(layer, pixels, mean, std)
    for p in (1, 4):
        layer.set_precision(p)
        out = layer(x).detach().numpy()
        assert out.shape == expected.shape == tuple(plain(x).shape)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)


def test_the_pixel_layer_is_close_to_the_float_layer_inside_the_map():
    """Up to the 8-bit weight grid: LSQ's initial step, 0.18 mean |w|, leaves an error of about 0.3 %."""
    torch.manual_seed(2)
    layer = nn.Conv2d(3, 8, 3, padding=1).double()
    plain = copy.deepcopy(layer)
    pixel_layer(layer, MEAN, STD)
    x = normalised(np.random.default_rng(1).integers(0, 256, (4, 3, 8, 8)), MEAN, STD)
    error = (layer(x) - plain(x))[:, :, 1:-1, 1:-1].square().mean() / plain(x).square().mean()
    assert 0 < float(error.detach()) < 5e-3


def test_a_linear_layer_on_pixels():
    torch.manual_seed(3)
    layer = nn.Linear(6, 4)
    mean, std = (0.1, 0.1, 0.5, 0.5, 0.9, 0.9), (0.2, 0.2, 0.3, 0.3, 0.4, 0.4)
    pixel_layer(layer, mean, std)
    pixels = np.random.default_rng(2).integers(0, 256, (5, 6))
    x = normalised(pixels, mean, std)
    codes = layer.weight_quant.codes(layer.effective_weight().detach()).numpy().astype(np.int64)
    total = pixels @ codes.T - (255 * np.array(mean) * codes).sum(axis=1)
    expected = layer.weight_quant.step.detach().numpy() / 255 * total + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12)


def test_a_one_dimensional_convolution_on_pixels():
    """The same as a two-dimensional one of height one."""
    torch.manual_seed(4)
    flat = nn.Conv1d(3, 4, 3, padding=2, groups=1)
    tall = nn.Conv2d(3, 4, (1, 3), padding=(0, 2))
    with torch.no_grad():
        tall.weight.copy_(flat.weight.unsqueeze(2))
        tall.bias.copy_(flat.bias)
    pixel_layer(flat, MEAN, STD)
    pixel_layer(tall, MEAN, STD)
    x = normalised(np.random.default_rng(3).integers(0, 256, (2, 3, 1, 7)), MEAN, STD)
    torch.testing.assert_close(flat(x[:, :, 0]), tall(x)[:, :, 0])


def test_the_border_carries_gradient_to_weights_only():
    layer = pixel_layer(nn.Conv2d(3, 2, 3, padding=1), MEAN, STD)
    x = normalised(np.full((1, 3, 1, 1), 7), MEAN, STD).requires_grad_()
    layer(x).sum().backward()
    assert bool((layer.weight.grad != 0).any())
    torch.testing.assert_close(
        x.grad.flatten(), layer.quantized_weight().detach()[:, :, 1, 1].sum(0) * torch.tensor(STD, dtype=torch.float64)
    )


# ---- refusals


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_other_padding_modes_are_refused(mode):
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)
    with pytest.raises(ValueError, match=rf"^convert: padding_mode must be 'zeros', got '{mode}'$"):
        convert(layer, build("lsq", "weight", {}, bits={4: 4}), None, edge=False)
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(2, 3, 3), nn.Embedding(3, 2), nn.Conv3d(1, 1, 1)])
def test_other_types_are_refused(layer):
    kind = type(layer).__name__
    message = rf"^convert: no quantized form of {kind}; there are: \['Linear', 'Conv1d', 'Conv2d'\]$"
    with pytest.raises(TypeError, match=message):
        convert(layer, build("lsq", "weight", {}, bits={4: 4}), None, edge=False)


def test_unknown_precisions_are_refused():
    layer = quantized(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"^set_precision: 3 is not among this layer's precisions \(1, 2, 4\)$"):
        layer.set_precision(3)
    assert layer.precision == 4


def test_public_names():
    assert (bs.QuantLinear, bs.QuantConv1d, bs.QuantConv2d) == (QuantLinear, QuantConv1d, QuantConv2d)
