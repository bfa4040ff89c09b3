"""Every operation that lowering knows, in every spelling: the program is the float64 fake-quantized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_lowering import Net, assert_equal, images, normalised, prepared
from torch import Tensor, nn

import bitstrata as bs
from bitstrata_runtime import Program, Session

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
Op = Callable[[Net, Tensor], Tensor]


def chain(op: Op, *, inputs: int = 4, features: int = 3, **modules: nn.Module) -> Net:
    """conv, the operation on its normalized result, conv, global average, linear: the operation feeds a layer."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = op(net, net.bn(net.stem(x)))
        return net.head(F.adaptive_avg_pool2d(F.relu(net.conv(x)), 1).flatten(1))

    return Net(
        run,
        stem=nn.Conv2d(3, 4, 3, padding=1),
        bn=nn.BatchNorm2d(4),
        conv=nn.Conv2d(inputs, 6, 3, padding=1),
        head=nn.Linear(6, features),
        **modules,
    )


def check(net: nn.Module, shape: tuple[int, ...] = (3, 6, 6), *, pixels: bool = True, **kw: Any) -> Program:
    torch.manual_seed(0)
    codes = images(shape)
    data = codes if pixels else torch.randn(4, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = normalised(codes) if pixels else data
    model = prepared(net, x, pixels=pixels, **kw)
    program = bs.lower(model, x)
    assert_equal(model, program, data, isas=())
    return program


def ops_of(program: Program) -> list[str]:
    return [node.op for node in program.nodes]


CLIPS: dict[str, tuple[Op, dict[str, nn.Module], tuple[float | None, float | None]]] = {
    "nn.ReLU": (lambda n, x: n.act(x), {"act": nn.ReLU()}, (0.0, None)),
    "nn.ReLU inplace": (lambda n, x: n.act(x), {"act": nn.ReLU(inplace=True)}, (0.0, None)),
    "F.relu": (lambda n, x: F.relu(x), {}, (0.0, None)),
    "F.relu inplace": (lambda n, x: F.relu(x, inplace=True), {}, (0.0, None)),
    "torch.relu": (lambda n, x: torch.relu(x), {}, (0.0, None)),
    "torch.relu_": (lambda n, x: torch.relu_(x), {}, (0.0, None)),
    "relu()": (lambda n, x: x.relu(), {}, (0.0, None)),
    "relu_()": (lambda n, x: x.relu_(), {}, (0.0, None)),
    "nn.ReLU6": (lambda n, x: n.act(x), {"act": nn.ReLU6()}, (0.0, 6.0)),
    "F.relu6": (lambda n, x: F.relu6(x), {}, (0.0, 6.0)),
    "nn.Hardtanh": (lambda n, x: n.act(x), {"act": nn.Hardtanh(-0.3, 0.7)}, (-0.3, 0.7)),
    "F.hardtanh": (lambda n, x: F.hardtanh(x, -0.5, 0.5), {}, (-0.5, 0.5)),
    "F.hardtanh default": (lambda n, x: F.hardtanh(x), {}, (-1.0, 1.0)),
    "torch.clamp": (lambda n, x: torch.clamp(x, min=-0.25, max=0.75), {}, (-0.25, 0.75)),
    "torch.clip": (lambda n, x: torch.clip(x, -0.25), {}, (-0.25, None)),
    "clamp() above": (lambda n, x: x.clamp(max=0.5), {}, (None, 0.5)),
    "clamp_()": (lambda n, x: x.clamp_(0, 0.5), {}, (0.0, 0.5)),
    "clip()": (lambda n, x: x.clip(0, 0.5), {}, (0.0, 0.5)),
    "clamp_min()": (lambda n, x: x.clamp_min(0.1), {}, (0.1, None)),
    "torch.clamp_max": (lambda n, x: torch.clamp_max(x, 0.4), {}, (None, 0.4)),
    "infinite bounds": (lambda n, x: x.clamp(-float("inf"), 0.5), {}, (None, 0.5)),
    "crossed bounds": (lambda n, x: x.clamp(0.5, 0.25), {}, (0.25, 0.25)),
    "two clips": (lambda n, x: F.relu6(x).clamp(0.25, 8.0), {}, (0.25, 6.0)),
    "disjoint clips": (lambda n, x: x.clamp(max=0.0).clamp(min=0.25), {}, (0.25, 0.25)),
}


@pytest.mark.parametrize("name", CLIPS)
def test_clipping(name: str) -> None:
    op, modules, clip = CLIPS[name]
    program = check(chain(op, **modules))
    (reader,) = [node for node in program.nodes if node.op == "requant" and node.attrs["to"] == "conv"]
    assert tuple(reader.attrs["clip"]) == clip
    assert ops_of(program) == ["input", "conv", "requant", "conv", "rescale", "avgpool", "requant", "conv", "rescale"]


ADDS: dict[str, Op] = {
    "a + b": lambda n, x: F.relu(x) + x,
    "+=": lambda n, x: _iadd(F.relu(x), x),
    "torch.add": lambda n, x: torch.add(F.relu(x), x),
    "add()": lambda n, x: x.add(F.relu(x)),
    "add_()": lambda n, x: F.relu(x).add_(x),
    "a + a": lambda n, x: x + x,
    "three": lambda n, x: F.relu(x) + x + F.hardtanh(x),
    "relu of a sum": lambda n, x: F.relu(F.relu(x) + x),
    "with a pooled value": lambda n, x: x + F.avg_pool2d(x, 3, 1, padding=1),
    "two pooled values": lambda n, x: F.avg_pool2d(F.relu(x), 3, 1, 1) + F.avg_pool2d(x, (1, 3), 1, (0, 1)),
}


def _iadd(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


@pytest.mark.parametrize("name", ADDS)
def test_addition(name: str) -> None:
    program = check(chain(ADDS[name]))
    assert ops_of(program).count("add") == (2 if name == "three" else 1)


POOLS: dict[str, tuple[Op, dict[str, nn.Module], str]] = {
    "nn.MaxPool2d": (lambda n, x: n.pool(x), {"pool": nn.MaxPool2d(2)}, "maxpool"),
    "nn.MaxPool2d padded": (lambda n, x: n.pool(x), {"pool": nn.MaxPool2d(3, 2, padding=1)}, "maxpool"),
    "F.max_pool2d": (lambda n, x: F.max_pool2d(x, (2, 3), (1, 2)), {}, "maxpool"),
    "torch.max_pool2d": (lambda n, x: torch.max_pool2d(x, 2), {}, "maxpool"),
    "max pool, exact ceil_mode": (lambda n, x: F.max_pool2d(x, 2, ceil_mode=True), {}, "maxpool"),
    "nn.AvgPool2d": (lambda n, x: n.pool(x), {"pool": nn.AvgPool2d(2)}, "avgpool"),
    "nn.AvgPool2d padded": (lambda n, x: n.pool(x), {"pool": nn.AvgPool2d(3, 2, 1)}, "avgpool"),
    "F.avg_pool2d": (lambda n, x: F.avg_pool2d(x, (3, 2), (2, 1)), {}, "avgpool"),
    "avg pool, its own divisor": (lambda n, x: F.avg_pool2d(x, 2, divisor_override=4), {}, "avgpool"),
    "avg pool, no padding to count": (lambda n, x: F.avg_pool2d(x, 2, count_include_pad=False), {}, "avgpool"),
    "nn.AdaptiveAvgPool2d": (lambda n, x: n.pool(x), {"pool": nn.AdaptiveAvgPool2d((3, None))}, "avgpool"),
    "F.adaptive_avg_pool2d": (lambda n, x: F.adaptive_avg_pool2d(x, (2, 3)), {}, "avgpool"),
    "mean((2, 3))": (lambda n, x: x.mean((2, 3), keepdim=True), {}, "avgpool"),
    "mean of negative axes": (lambda n, x: torch.mean(x, dim=(-1, -2), keepdim=True), {}, "avgpool"),
    "pool of a pool": (lambda n, x: F.max_pool2d(F.avg_pool2d(x, 3, 1), 2), {}, "maxpool"),
    "average of an average": (lambda n, x: F.avg_pool2d(F.avg_pool2d(F.relu(x), 3, 1), 3, 1), {}, "avgpool"),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling(name: str) -> None:
    op, modules, kind = POOLS[name]
    assert kind in ops_of(check(chain(op, **modules)))[3:5]


def test_global_mean_without_keepdim() -> None:
    net = Net(
        lambda n, x: n.head(F.relu(n.stem(x)).mean([2, 3])), stem=nn.Conv2d(3, 4, 3, bias=False), head=nn.Linear(4, 3)
    )
    assert ops_of(check(net))[2:4] == ["rescale", "avgpool"]


MOVES: dict[str, tuple[Op, dict[str, Any]]] = {
    "strided slice": (lambda n, x: x[:, :, ::2, ::2], {}),
    "slice of positions": (lambda n, x: x[:, :, 1:5, 2:], {}),
    "slice of channels": (lambda n, x: x[:, 1:4:2], {"inputs": 2}),
    "negative bounds": (lambda n, x: x[:, :, -4:-1], {}),
    "Ellipsis": (lambda n, x: x[..., ::3], {}),
    "Ellipsis in the middle": (lambda n, x: x[:, 2:, ..., 1:], {"inputs": 2}),
    "whole": (lambda n, x: x[:], {}),
    "bounds from the shape": (lambda n, x: x[:, :, : x.shape[2] // 2, : x.size(3) - 1], {}),
    "F.pad positions": (lambda n, x: F.pad(x, (1, 2, 0, 3)), {}),
    "F.pad channels": (lambda n, x: F.pad(x, (0, 0, 0, 0, 1, 2)), {"inputs": 7}),
    "F.pad all, with value": (lambda n, x: F.pad(x, (1, 0, 1, 0, 2, 0), "constant", 0.0), {"inputs": 6}),
    "nn.ZeroPad2d": (lambda n, x: n.pad(x), {"pad": nn.ZeroPad2d((1, 0, 2, 0))}),
    "shortcut without parameters": (lambda n, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)), {"inputs": 8}),
    "nn.Identity": (lambda n, x: n.same(x), {"same": nn.Identity()}),
    "nn.Dropout": (lambda n, x: n.drop(x), {"drop": nn.Dropout(0.5)}),
    "nn.Dropout2d": (lambda n, x: n.drop(x), {"drop": nn.Dropout2d(0.5)}),
    "F.dropout": (lambda n, x: F.dropout(x, 0.5, training=n.training), {}),
    "clone, contiguous": (lambda n, x: x.clone().contiguous(), {}),
    "squeeze and unsqueeze": (lambda n, x: x[:, :, :1].squeeze(2).unsqueeze(2), {}),
}


@pytest.mark.parametrize("name", MOVES)
def test_moving(name: str) -> None:
    op, options = MOVES[name]
    check(chain(op, **options))


FLATTENS: dict[str, tuple[Callable[[Net, Tensor], Tensor], dict[str, nn.Module]]] = {
    "flatten(1)": (lambda n, x: x.flatten(1), {}),
    "torch.flatten": (lambda n, x: torch.flatten(x, 1), {}),
    "nn.Flatten": (lambda n, x: n.flat(x), {"flat": nn.Flatten()}),
    "reshape": (lambda n, x: x.reshape(x.shape[0], -1), {}),
    "torch.reshape": (lambda n, x: torch.reshape(x, (x.size(0), 48)), {}),
    "view": (lambda n, x: x.view(x.size(0), -1), {}),
}


@pytest.mark.parametrize("name", FLATTENS)
def test_flattening_keeps_torch_order(name: str) -> None:
    op, modules = FLATTENS[name]
    net = Net(
        lambda n, x: n.head(op(n, F.relu(n.stem(x)))), stem=nn.Conv2d(3, 3, 3), head=nn.Linear(3 * 4 * 4, 5), **modules
    )
    assert "flatten" in ops_of(check(net))


@pytest.mark.parametrize(
    "squeeze", [lambda x: x.squeeze(3).squeeze(2), lambda x: x.squeeze(), lambda x: x[:, :, :1, :1].flatten(1)]
)
def test_one_position_needs_no_flatten(squeeze: Callable[[Tensor], Tensor]) -> None:
    net = Net(
        lambda n, x: n.head(squeeze(F.adaptive_avg_pool2d(n.stem(x), 1))), stem=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 2)
    )
    assert "flatten" not in ops_of(check(net))


CONVOLUTIONS = {
    "1x1": {"kernel_size": 1},
    "stride": {"kernel_size": 3, "stride": (2, 1)},
    "padding": {"kernel_size": (3, 5), "padding": (2, 1)},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even kernel": {"kernel_size": (4, 2), "padding": "same"},
    "same, dilated": {"kernel_size": (3, 2), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "depthwise, two outputs a channel": {"kernel_size": 3, "groups": 4, "out_channels": 8},
    "no bias": {"kernel_size": 3, "bias": False},
}


@pytest.mark.parametrize("pixels", [True, False], ids=["pixels", "codes"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_inside_and_at_the_input(name: str, pixels: bool) -> None:
    options = {"out_channels": 4, **CONVOLUTIONS[name]}
    at_input = {**options, "groups": min(options.get("groups", 1), 1)}
    if options.get("groups", 1) == 4:
        at_input |= {"groups": 3, "out_channels": 6}
    mid = at_input["out_channels"]
    net = Net(
        lambda n, x: n.head(n.last(F.relu(n.bn(n.conv(F.relu(n.mix(n.stem(x))))))).flatten(1)),
        stem=nn.Conv2d(3, **at_input),
        mix=nn.Conv2d(mid, 4, 1),
        conv=nn.Conv2d(4, **options),
        bn=nn.BatchNorm2d(options["out_channels"]),
        last=nn.AdaptiveAvgPool2d(1),
        head=nn.Linear(options["out_channels"], 3),
    )
    check(net, (3, 9, 8), pixels=pixels)


@pytest.mark.parametrize(
    "options", [{}, {"padding": "same"}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}]
)
def test_sequences(options: dict[str, Any]) -> None:
    net = Net(
        lambda n, x: n.head(n.pool(n.act(n.bn(n.conv(F.avg_pool1d(F.relu(n.stem(x)), 2))))).flatten(1)),
        stem=nn.Conv1d(2, 4, 3, padding=1),
        conv=nn.Conv1d(4, 6, 3, **options),
        bn=nn.BatchNorm1d(6),
        act=nn.ReLU(),
        pool=nn.AdaptiveAvgPool1d(1),
        head=nn.Linear(6, 3),
    )
    program = check(net, (2, 16), pixels=False)
    assert program.input_shape == (2, 1, 16)
    assert program.layers["conv"].shape[2:] == (1, 3)


def test_sequence_pools_slices_and_pads() -> None:
    def run(n: Net, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(n.stem(x)), 2)
        x = F.pad(x[:, 1:, ::2], (1, 2, 0, 1))
        return n.head(n.conv(n.pool(x)).flatten(1))

    net = Net(run, stem=nn.Conv1d(2, 4, 3), conv=nn.Conv1d(4, 3, 2), pool=nn.MaxPool1d(2, 1), head=nn.Linear(12, 2))
    check(net, (2, 14), pixels=False)


def test_features_alone() -> None:
    net = nn.Sequential(
        nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 8), nn.Hardtanh(), nn.Linear(8, 3)
    )
    program = check(net, (10,), pixels=False)
    assert program.input_shape == (10, 1, 1)
    assert {layer.kind for layer in program.layers.values()} == {"linear"}


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 4)])
def test_perceptron_on_pixels(shape: tuple[int, int, int]) -> None:
    """The input grid's offset is one a channel of the image, though the layer reads flattened pixels."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16 * shape[0], 8), nn.ReLU(), nn.Linear(8, 3))
    program = check(net, shape)
    assert {len(offset) for offset in program.layers["1"].input_offset.values()} == {shape[0]}


@pytest.mark.parametrize("pixels", [True, False], ids=["pixels", "codes"])
def test_slice_and_pool_of_the_input_itself(pixels: bool) -> None:
    net = Net(
        lambda n, x: n.head(F.relu(n.stem(F.max_pool2d(x[:, :, ::2, 1:], 2))).flatten(1)),
        stem=nn.Conv2d(3, 4, 2, padding=1),
        head=nn.Linear(4 * 5 * 6, 3),
    )
    program = check(net, (3, 16, 11), pixels=pixels)
    assert ops_of(program)[:3] == ["input", "slice", "maxpool"]


def test_input_read_by_one_layer_twice() -> None:
    net = Net(
        lambda n, x: n.head((n.stem(x) + n.stem(x[:, :, :, :])).flatten(1)),
        stem=nn.Conv2d(3, 2, 5),
        head=nn.Linear(8, 3),
    )
    assert ops_of(check(net)).count("conv") == 3


def test_layer_used_twice() -> None:
    net = Net(
        lambda n, x: n.head(F.relu(n.conv(F.relu(n.conv(F.relu(n.stem(x)))))).flatten(1)),
        stem=nn.Conv2d(3, 4, 3),
        conv=nn.Conv2d(4, 4, 3, padding=1),
        head=nn.Linear(64, 3),
    )
    program = check(net)
    assert [node.name for node in program.nodes if node.op == "conv"] == ["stem", "conv", "conv.2", "head"]


def test_what_the_output_does_not_need_is_left_out() -> None:
    def run(n: Net, x: Tensor) -> Tensor:
        x = F.relu(n.stem(x))
        torch.sigmoid(n.side(x) * x.shape[-1])
        return n.head(x.flatten(1))

    program = check(Net(run, stem=nn.Conv2d(3, 4, 3), side=nn.Conv2d(4, 4, 3), head=nn.Linear(64, 3)))
    assert set(program.layers) == {"stem", "head"}


@pytest.mark.parametrize(
    "recipe",
    [
        bs.recipes.strata(w=(1, 2, 3, 4)),
        bs.recipes.strata(w=(2, 4, 8), per_channel=True),
        bs.recipes.strata(w=(1, 2), a=8),
        bs.recipes.strata(w=(1, 3), scales="tied", edge_bits=4),
        bs.recipes.lsq(4),
        bs.recipes.lsq(2, a=8, per_channel=True, edge_bits=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("pixels", [True, False], ids=["pixels", "codes"])
def test_recipes(recipe: bs.Recipe, pixels: bool) -> None:
    net = chain(lambda n, x: F.relu(x) + n.side(x), side=nn.Conv2d(4, 4, 3, padding=1, groups=2))
    program = check(net, pixels=pixels, recipe=recipe)
    assert program.precisions == recipe.precisions
    for name, layer in program.layers.items():
        assert layer.planes == (name in ("conv", "side"))
        assert layer.source_bits == (max(recipe.precisions) if layer.planes else recipe.edge_bits)


def test_map_output() -> None:
    net = Net(lambda n, x: n.head(F.relu(n.stem(x))), stem=nn.Conv2d(3, 4, 3), head=nn.Conv2d(4, 2, 1))
    program = check(net)
    session = Session.from_program(program, 1, executor="reference")
    assert session.run(images((3, 6, 6)).numpy()).shape == (4, 2, 4, 4)
