"""Models that have no integer program: the message names the place and what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_lowering import STRATA, Net, lowered, prepared
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.lowering import LowerError


class Block(nn.Module):
    """A module inside the model, which messages must name."""

    def __init__(self, op: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.op = op
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.op(self, x)


def model_with(op: Callable[[Any, Tensor], Any], **modules: nn.Module) -> Net:
    """stem, one block with the operation, a global average, head."""
    return Net(
        lambda n, x: n.head(F.adaptive_avg_pool2d(n.block(n.stem(x)), 1).flatten(1)),
        stem=nn.Conv2d(3, 4, 3),
        block=Block(op, **modules),
        head=nn.Linear(4, 2),
    )


UNSUPPORTED: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, nn.Module], str]] = {
    "sigmoid": (
        lambda b, x: torch.sigmoid(x),
        {},
        r"'sigmoid' in module 'block' has no integer form; use nn.ReLU",
    ),
    "method": (lambda b, x: x.tanh(), {}, r"'tanh' in module 'block' has no integer form"),
    "module": (lambda b, x: b.act(x), {"act": nn.SiLU()}, r"module 'block\.act' of type SiLU has no integer form"),
    "multiplication": (lambda b, x: x * x, {}, r"'mul' in module 'block' has no integer form"),
    "scaling": (lambda b, x: x * 2.0, {}, r"'mul' in module 'block' has no integer form"),
    "concatenation": (lambda b, x: torch.cat([x, x], 1)[:, ::2], {}, r"'cat' in module 'block' has no integer form"),
    "chunks": (lambda b, x: torch.chunk(x, 2, 3)[0], {}, r"'chunk' in module 'block' has no integer form"),
    "constant": (lambda b, x: x + 1, {}, r"'add' in module 'block' must add two tensors of the network"),
    "alpha": (lambda b, x: torch.add(x, x, alpha=2), {}, r"'add' in module 'block' must add .* with alpha=1"),
    "broadcast": (
        lambda b, x: x + x.mean((2, 3), keepdim=True),
        {},
        r"'add' in module 'block' adds shapes \(4, 6, 6\) and \(4, 1, 1\); broadcasting",
    ),
    "ceil_mode": (
        lambda b, x: F.max_pool2d(x, 4, ceil_mode=True),
        {},
        r"'max_pool2d' in module 'block': ceil_mode=True",
    ),
    "count_include_pad": (
        lambda b, x: b.pool(x),
        {"pool": nn.AvgPool2d(2, padding=1, count_include_pad=False)},
        r"module 'block\.pool': average pooling with padding and count_include_pad=False.*; set count_include_pad=True",
    ),
    "divisor": (lambda b, x: F.avg_pool2d(x, 2, divisor_override=3), {}, r"divisor_override=3 is not supported"),
    "adaptive": (lambda b, x: F.adaptive_avg_pool2d(x, 4), {}, r"pools 6x6 to 4x4: windows of several sizes; choose"),
    "max pool dilation": (lambda b, x: b.pool(x), {"pool": nn.MaxPool2d(2, dilation=2)}, r"max pooling with dilation"),
    "adaptive max": (lambda b, x: F.adaptive_max_pool2d(x, 4), {}, r"pools 6x6 to 4x4: windows of several sizes"),
    "sorting": (lambda b, x: x.sort(1)[0], {}, r"'sort' .* has no integer form; replace it by one of: convolution"),
    "mean of rows": (
        lambda b, x: x.mean(2, keepdim=True),
        {},
        r"'mean' .* takes the mean over 2; only over all positions",
    ),
    "index": (lambda b, x: x[:, :, :1, 0].unsqueeze(-1), {}, r"'getitem' .* must slice channels and positions only"),
    "batch slice": (lambda b, x: x[::2], {}, r"'getitem' .* must slice channels and positions only"),
    "pad value": (
        lambda b, x: F.pad(x, (1, 1), value=1.0),
        {},
        r"'pad' .* pads with mode 'constant', value 1.0; only zero",
    ),
    "pad mode": (lambda b, x: F.pad(x, (1, 1, 1, 1), "reflect"), {}, r"'pad' .* pads with mode 'reflect'"),
    "crop": (lambda b, x: F.pad(x, (-1, 1)), {}, r"'pad' .* pads by \(-1, 1\); amounts must be >= 0"),
    "reshape": (lambda b, x: x.reshape(x.shape[0], 4, 4, 9), {}, r"'reshape' .* reshapes \(4, 6, 6\) to \(4, 4, 9\)"),
    "tensor bounds": (
        lambda b, x: torch.clamp(x, min=x),
        {},
        r"the arguments of 'clamp' in module 'block' are not supp",
    ),
    "normalization in float": (
        lambda b, x: b.bn(b.conv(x)),
        {"conv": nn.Conv2d(4, 4, 1, padding_mode="circular"), "bn": nn.BatchNorm2d(4)},
        r"Conv2d 'block\.conv' is in float; quantize it \(padding_mode 'circular' has no quantized form",
    ),
    "layer norm": (
        lambda b, x: b.norm(x),
        {"norm": nn.GroupNorm(2, 4)},
        r"module 'block\.norm' of type GroupNorm has no integer form",
    ),
    "statistics": (
        lambda b, x: b.bn(x),
        {"bn": nn.BatchNorm2d(4, track_running_stats=False)},
        r"the normalization behind 'stem' has no running statistics; use track_running_stats=True",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_operation_without_an_integer_form(name: str) -> None:
    op, modules, message = UNSUPPORTED[name]
    with pytest.raises(LowerError, match=message):
        lowered(model_with(op, **modules), (3, 8, 8), pixels=True)


IN_PLACE: dict[str, Callable[[Any, Tensor], Any]] = {
    "relu_ whose result is not used": lambda b, x: (x.relu_(), x)[1],
    "value used again": lambda b, x: F.relu(x, inplace=True) + x,
    "value used again through a view": lambda b, x: x[:, :, :].clamp_(max=0.1) + x,
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operation_on_a_value_that_is_used_again(name: str) -> None:
    with pytest.raises(LowerError, match=r"'\w+' in module 'block' changes a tensor in place that .* uses again; make"):
        lowered(model_with(IN_PLACE[name]), (3, 8, 8))


def test_in_place_sum_that_the_graph_does_not_show() -> None:
    def op(block: Any, x: Tensor) -> Tensor:
        before = y = F.relu(x)
        y += x
        return before + y

    with pytest.raises(LowerError, match=r"computes something else than the model: either an in-place .* y = y \+ x"):
        lowered(model_with(op), (3, 8, 8))


def test_dropout_that_is_always_on() -> None:
    with pytest.raises(LowerError, match=r"or the forward is random in evaluation mode"):
        lowered(model_with(lambda b, x: F.dropout(x, 0.5)), (3, 8, 8))


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (F.relu, "'relu' in the model's forward clips the network's input before any quantized layer"),
        (
            lambda x: F.pad(x, (1, 1)),
            r"'pad' in the model's forward computes on the network's input .* can pad by itself",
        ),
        (lambda x: F.avg_pool2d(x, 2), "'avg_pool2d' in the model's forward computes on the network's input"),
        (lambda x: x + x, "'add' in the model's forward computes on the network's input"),
        (lambda x: x * 2, "'mul' in the model's forward has no integer form"),
    ],
)
def test_operation_on_the_input(op: Callable[[Tensor], Tensor], message: str) -> None:
    net = Net(lambda n, x: n.head(n.stem(op(x)).flatten(1)), stem=nn.Conv2d(3, 4, 4, 4), head=nn.LazyLinear(2))
    net(torch.randn(2, 3, 8, 8))
    with pytest.raises(LowerError, match=message):
        lowered(net, (3, 8, 8))


def test_normalization_of_the_input() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(LowerError, match=r"normalization '0' reads the network's input; .* mean and std as Pixels"):
        lowered(net, (3, 8, 8))


def test_input_read_by_two_layers() -> None:
    net = Net(
        lambda n, x: n.head((n.a(x) + n.b(x)).flatten(1)),
        a=nn.Conv2d(3, 2, 8),
        b=nn.Conv2d(3, 2, 8),
        head=nn.Linear(2, 2),
    )
    for pixels in (True, False):
        with pytest.raises(LowerError, match=r"input is read by 2 layers with input grids of their own: a, b; let one"):
            lowered(copy.deepcopy(net), (3, 8, 8), pixels=pixels)


def test_pixels_layer_used_again_inside() -> None:
    net = Net(lambda n, x: n.head(n.conv(F.relu(n.conv(x))).flatten(1)), conv=nn.Conv2d(3, 3, 3), head=nn.Linear(48, 2))
    with pytest.raises(LowerError, match=r"layer 'conv' expects the network's pixels, but reads the value 'conv'"):
        lowered(net, (3, 8, 8), pixels=True)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.conv(left) + self.conv(right)


def test_two_inputs() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = bs.quantize_(TwoInputs(), STRATA, (x, x))
    for p in bs.precisions(model):
        with bs.precision(model, p):
            model(x, x)
    with pytest.raises(LowerError, match=r"must take one input tensor, TwoInputs.forward uses 2 \('left', 'right'\)"):
        bs.lower(model, x)


@pytest.mark.parametrize(("result", "kind"), [(lambda y: (y, y), "tuple"), (lambda y: {"y": y}, "dict")])
def test_several_outputs(result: Callable[[Tensor], Any], kind: str) -> None:
    net = Net(lambda n, x: result(n.head(n.stem(x).flatten(1))), stem=nn.Conv2d(3, 2, 8), head=nn.Linear(2, 2))
    x = torch.randn(2, 3, 8, 8)
    bs.calibrate_(bs.quantize_(net, STRATA, x), [x])
    with pytest.raises(LowerError, match=f"must return one tensor, it returns a .*{kind}"):
        bs.lower(net, x)


def test_output_that_is_the_input() -> None:
    net = Net(lambda n, x: (n.stem(x), x)[1], stem=nn.Conv2d(3, 2, 3))
    with pytest.raises(LowerError, match="the model's output computes on the network's input"):
        lowered(net, (3, 8, 8))


def test_control_flow_on_data() -> None:
    def run(n: Net, x: Tensor) -> Tensor:
        x = n.stem(x)
        return n.head(x.flatten(1)) if x.sum() > 0 else n.head(-x.flatten(1))

    with pytest.raises(
        LowerError, match=r"cannot trace Net.forward: .* control flow must not depend on the input: move"
    ):
        lowered(Net(run, stem=nn.Conv2d(3, 2, 8), head=nn.Linear(2, 2)), (3, 8, 8))


def test_linear_layer_on_positions() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(LowerError, match=r"linear layer '0' reads 3 dimensions; only \(N, features\).*: flatten first"):
        lowered(net, (5, 6))


def test_float_activations() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(LowerError, match=r"layer '0' reads float activations; an integer program needs a recipe that"):
        lowered(net, (3, 8, 8), bs.recipes.strata(w=(1, 2), a=None))


@pytest.mark.parametrize(
    ("recipe", "keep", "message"),
    [
        (bs.recipes.strata(w=(1, 2), edges="float"), None, r"Conv2d '0' is in float; .*kept in float by the recipe"),
        (STRATA, lambda name, layer: name != "2", r"Conv2d '2' is in float"),
    ],
)
def test_layers_in_float(recipe: bs.Recipe, keep: Any, message: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)
    )
    bs.calibrate_(bs.quantize_(net, recipe, x, filter=keep), [x])
    with pytest.raises(LowerError, match=message):
        bs.lower(net, x)


def test_float_model() -> None:
    with pytest.raises(LowerError, match="the model has no quantized layers; call quantize_ first"):
        bs.lower(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(1, 3, 8, 8))


def test_model_that_was_not_calibrated() -> None:
    x = torch.randn(2, 3, 8, 8)
    net = bs.quantize_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), STRATA, x)
    with pytest.raises(LowerError, match=r"no step size at precision 4: run bitstrata.calibrate_\(model, batches\)"):
        bs.lower(net, x)
    bs.calibrate_(net, [x], precisions=[4])
    assert bs.lower(net, x).precisions == (1, 4)  # edge layers have one step for all precisions


def test_precision_that_was_not_calibrated() -> None:
    x = torch.randn(2, 3, 8, 8)
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    net = bs.quantize_(nn.Sequential(*layers), STRATA, x)
    bs.calibrate_(net, [x], precisions=[4])
    with pytest.raises(LowerError, match="layer '2': UniqActivation: no step size at precision 1: run"):
        bs.lower(net, x)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((torch.zeros(1, 3, 8, 8),), "example must be one input tensor, got tuple"),
        (torch.zeros(8), r"example must be a batch .* got shape \(8,\)"),
        (torch.zeros(1, 3, 2, 8, 8), r"example must be a batch .* got shape \(1, 3, 2, 8, 8\)"),
        (torch.zeros(1, 5, 8, 8), r"Sequential does not run on an input of shape \(2, 5, 8, 8\): "),
        (torch.zeros(1, 3, 9, 9), r"Sequential does not run on an input of shape \(2, 3, 9, 9\): "),
    ],
)
def test_example(example: Any, message: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    prepared(net, torch.randn(2, 3, 8, 8))
    with pytest.raises(LowerError, match=message):
        bs.lower(net, example)


def test_accumulator_overflow_names_layer_and_precision() -> None:
    net = nn.Sequential(nn.Conv2d(8192, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1, 1))
    x = torch.rand(2, 8192, 3, 3)
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    bs.calibrate_(bs.quantize_(net, STRATA, x), [x])
    with torch.no_grad():
        net[0].weight_quant.step.fill_(1 / 127)  # 73,728 products of up to 127 * 255
    with pytest.raises(LowerError, match=r"accumulator overflow: layer '0' at precision 1 can reach \[0, 2387681280\]"):
        bs.lower(net, x)


def test_values_too_large_for_fixed_point() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    x = torch.randn(2, 3, 8, 8)
    bs.calibrate_(bs.quantize_(net, STRATA, x), [x])
    with torch.no_grad():
        net[3].weight.mul_(1e12)
        net[3].weight_quant.step.mul_(1e12)
    with pytest.raises(LowerError, match=r"do not fit 32-bit fixed point"):
        bs.lower(net, x)


def test_coarse_fixed_point_is_a_warning() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    x = torch.randn(2, 3, 8, 8)
    bs.calibrate_(bs.quantize_(net, STRATA, x), [x])
    with torch.no_grad():
        net[2].weight.mul_(1e4)
        net[2].weight_quant.step.mul_(1e4)
    with pytest.warns(
        UserWarning, match=r"1 fixed-point values have fewer than 20 fraction bits \(least: \d+ in 'logits'\)"
    ):
        bs.lower(net, x)


def test_codes_that_do_not_nest() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(2, 3, 8, 8)
    model = prepared(net, x, recipe=bs.recipes.adabits(bits=(2, 4), scheme="original"))
    with pytest.raises(LowerError, match=r"the 2-bit codes of '2' are not the upper bits of its 4-bit codes"):
        bs.lower(model, x)
    assert bs.lower(model, x, precisions=(4,)).precisions == (4,)


def test_codes_beyond_their_width() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(2, 3, 8, 8)
    model = prepared(net, x, recipe=bs.recipes.maqd(255, 8, delta_mode="M/2"))
    with pytest.raises(LowerError, match=r"weight codes lie in -\d+\.\.\d+ and do not fit 8 bits"):
        bs.lower(model, x)


@pytest.mark.parametrize("served", [(), (3,), (1, 9)])
def test_precisions_that_are_not_there(served: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), x)
    with pytest.raises(LowerError, match=r"lower: precisions must be among \(.*\), got \("):
        bs.lower(model, x, precisions=served)


def test_the_model_is_left_as_it_was() -> None:
    net = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), torch.randn(2, 3, 8, 8)).train()
    bs.set_precision(net, 1)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    bs.lower(net, torch.randn(2, 3, 8, 8))
    assert net.training
    assert {layer.precision for layer in (net[0], net[2])} == {1}
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net[0].weight.dtype == torch.float32
