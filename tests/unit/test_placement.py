"""Activations and average poolings taken into layers, against models with the quantizers in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitstrata.nn import convert
from bitstrata.nn.layer_batch_norm import LayerBatchNorm2d
from bitstrata.prepare.placement import Placed, absorb_activations_
from bitstrata.quantizers.maqd import MaQDActivation, MaQDWeight
from bitstrata.zoo.maqd import maqd_preact_resnet, maqd_vgg

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
X = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def conv(inputs: int = 2, outputs: int = 2) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Body(nn.Module):
    """A forward written as a function of the module and its input."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """All convolutions and linear layers but the first, which reads the image."""
    return dict([(name, m) for name, m in model.named_modules() if isinstance(m, LAYERS)][1:])


def quantizer() -> MaQDActivation:
    return MaQDActivation({2: 2})


def in_place_of_activations(model: nn.Module) -> nn.Module:
    """MaQD as published: the quantizer is the activation function."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.ReLU | nn.Hardtanh):
                parent._modules[name] = quantizer()
    return twin


def in_layers(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    """What quantized layers do: quantize the input, then pool it, then convolve."""

    def enter(layer: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        q = quantizer()(args[0])
        pool = getattr(layer, "input_pool", None)
        return q if pool is None else pool(q)

    for layer in layers.values():
        layer.register_forward_pre_hook(enter)
    return model


def check(model: nn.Module, x: Tensor = X) -> dict[str, Placed]:
    """Absorb, and compare outputs and all gradients with the quantizers in place of the activations."""
    model.double()
    published = in_place_of_activations(model)
    layers = layers_of(model)
    report = absorb_activations_(model, x, layers)
    ours = in_layers(model, layers)
    for mode in (False, True):
        for m in (published, ours):
            m.zero_grad()
            m.train(mode)
            torch.manual_seed(1)
            m.result = m(x)
            m.result.square().sum().backward()
        assert float(ours.result.detach().std()) > 0
        torch.testing.assert_close(ours.result, published.result, rtol=1e-9, atol=1e-9)
        gradients = {name: p.grad for name, p in published.named_parameters() if p.grad is not None}
        assert gradients
        for name, p in ours.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-7, atol=1e-9)
    return {placed.name: placed for placed in report}


def actions(report: dict[str, Placed]) -> dict[str, str]:
    return {name: placed.action for name, placed in report.items()}


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(0, 1), nn.Hardtanh(-1, 2)])
def test_a_chain(act):
    model = nn.Sequential(conv(), nn.BatchNorm2d(2), act, conv())
    assert check(model) == {"2": Placed("2", "absorbed", ("3",))}
    assert type(model[2]) is nn.Identity


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, stride=1),
        nn.AvgPool2d((2, 3), stride=2, padding=1),
    ],
    ids=str,
)
def test_pooling_follows_the_quantizer(pool):
    model = nn.Sequential(conv(), nn.ReLU(), pool, conv(), nn.ReLU(), conv())
    assert actions(check(model)) == {"1": "absorbed", "2": "absorbed", "4": "absorbed"}
    assert type(model[2]) is nn.Identity
    assert model[3].input_pool is pool
    assert not hasattr(model[5], "input_pool")


def test_poolings_along_a_line():
    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(2, 2, 1))
    assert actions(check(model, X.flatten(2))) == {"1": "absorbed", "2": "absorbed"}


def test_monotone_modules_in_between():
    model = nn.Sequential(
        *(conv(), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1), nn.Identity(), conv()),
        *(nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 3)),
    ).double()
    published, kept, layers = in_place_of_activations(model), copy.deepcopy(model), layers_of(model)
    assert [p.layers for p in absorb_activations_(model, X, layers, strict=True)] == [("4",), ("9",)]
    in_layers(model, layers)
    torch.testing.assert_close(model.eval()(X), published.eval()(X), rtol=1e-9, atol=1e-9)
    results = []
    for m in (model, in_layers(kept, layers_of(kept))):  # dropping out commutes with cutting at 0
        torch.manual_seed(1)
        results.append(m.train()(X))
    assert torch.equal(*results)
    assert not torch.equal(results[0], model.eval()(X))


def test_functions_in_between():
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.act(self.first(x)), 2)
        return self.last(torch.flatten(F.dropout(y.view(y.size(0), -1), 0.0), 1))

    model = Body(forward, first=conv(), act=nn.ReLU(), last=nn.Linear(32, 3)).double()
    published, layers = in_place_of_activations(model), layers_of(model)
    assert absorb_activations_(model, X, layers) == [Placed("act", "absorbed", ("last",))]
    torch.testing.assert_close(in_layers(model, layers)(X), published(X), rtol=1e-9, atol=1e-9)


def test_several_readers_each_pool():
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.pool(self.act(self.first(x)))
        return self.a(y) + self.b(y)

    model = Body(forward, first=conv(), act=nn.ReLU(), pool=nn.AvgPool2d(2), a=conv(), b=conv())
    report = check(model)
    assert report["pool"] == Placed("pool", "absorbed", ("a", "b"))
    assert model.a.input_pool is model.b.input_pool
    assert sum(isinstance(m, nn.AvgPool2d) for m in model.modules()) == 1


def test_shared_modules_go_only_if_every_use_qualifies():
    def chain(self: nn.Module, x: Tensor) -> Tensor:
        return self.b(self.again(self.a(self.act(self.first(x)))))

    act = nn.ReLU()
    model = Body(chain, first=conv(), act=act, again=act, a=conv(), b=conv())
    assert check(model) == {"act": Placed("act", "absorbed", ("a", "b"))}
    assert type(model.act) is type(model.again) is nn.Identity

    def to_the_output(self: nn.Module, x: Tensor) -> Tensor:
        return self.act(self.a(self.act(self.first(x))))

    model = Body(to_the_output, first=conv(), act=act, a=conv())
    report = absorb_activations_(model.double(), X, layers_of(model))
    assert report == [Placed("act", "kept", ("a",), "the model's output reads it")]
    assert model.act is act


def residual(self: nn.Module, x: Tensor) -> Tensor:
    y = self.act(self.first(x))
    return y + self.a(self.pool(y))


def test_residual_sums_keep_the_activation():
    model = Body(residual, first=conv(), act=nn.ReLU(), pool=nn.AvgPool2d(3, 1, padding=1), a=conv()).double()
    before = model(X)
    with pytest.raises(ValueError, match=r"'act' must be kept: 'add' in the model's forward reads it; change the mo"):
        absorb_activations_(model, X, layers_of(model), strict=True)
    assert torch.equal(model(X), before)
    report = absorb_activations_(model, X, layers_of(model))
    assert actions({p.name: p for p in report}) == {"act": "kept", "pool": "absorbed"}
    assert type(model.act) is nn.ReLU
    expected = model.act(model.first(X))
    expected = expected + model.a(model.a.input_pool(quantizer()(expected)))
    torch.testing.assert_close(in_layers(model, layers_of(model))(X), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (nn.AvgPool2d(3, 2, ceil_mode=True), "ceil_mode=True averages fewer"),
        (nn.AvgPool2d(2, padding=1, count_include_pad=False), "count_include_pad=False averages fewer"),
        (nn.AvgPool2d(2, divisor_override=3), "divisor_override=3 makes it a sum"),
    ],
    ids=str,
)
def test_poolings_of_other_weights_are_kept(pool, reason):
    model = nn.Sequential(conv(), nn.ReLU(), pool, conv()).double()
    act, averages = absorb_activations_(model, X, layers_of(model))
    assert (act.action, act.reason) == ("kept", "module '2' reads it")
    assert averages.action == "kept"
    assert averages.reason.startswith(reason)
    assert model[2] is pool


def test_poolings_that_others_read_are_kept():
    model = nn.Sequential(conv(), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)).double()
    act, pool = absorb_activations_(model, X, layers_of(model))
    assert (act.action, pool.action) == ("kept", "kept")
    assert pool.reason == "module '3' reads it, which is no layer that could pool by itself"

    def both(self: nn.Module, x: Tensor) -> Tensor:
        y = self.act(self.first(x))
        return self.a(self.pool(y)).sum() + self.a(y).sum()

    model = Body(both, first=conv(), act=nn.ReLU(), pool=nn.AvgPool2d(2), a=conv()).double()
    _, pool = absorb_activations_(model, X, layers_of(model))
    assert (pool.action, pool.reason) == ("kept", "layer 'a' reads something else too")

    def not_only(self: nn.Module, x: Tensor) -> Tensor:
        return self.b(self.pool(self.a(self.pool(self.act(self.first(x))))))

    model = Body(not_only, first=conv(), act=nn.ReLU(), pool=nn.AvgPool2d(2), a=conv(), b=conv()).double()
    _, pool = absorb_activations_(model, X, layers_of(model))
    assert (pool.action, pool.reason) == ("kept", "it also reads module 'a', which is no activation")


def test_global_averages_before_a_layer_are_reported():
    model = nn.Sequential(conv(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).double()
    assert absorb_activations_(model, X, layers_of(model)) == [Placed("1", "kept", ("4",), "module '2' reads it")]


def test_activations_that_cut_inside_the_grid_are_kept():
    model = nn.Sequential(conv(), nn.Hardtanh(-1, 0.5), conv()).double()
    (kept,) = absorb_activations_(model, X, layers_of(model))
    assert kept.reason == "it cuts at -1 and 0.5, inside the quantizer's range of 0 to 1"


def test_what_no_layer_reads_is_left_alone():
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), nn.AvgPool2d(2)).double()
    assert [p.name for p in absorb_activations_(model, X, layers_of(model), strict=True)] == ["1"]
    assert type(model[3]) is nn.ReLU
    assert type(model[4]) is nn.AvgPool2d
    floats = nn.Sequential(conv(), nn.ReLU(), conv()).double()
    assert absorb_activations_(floats, X, {}) == []
    assert type(floats[1]) is nn.ReLU


def functional(self: nn.Module, x: Tensor) -> Tensor:
    return self.last(self.pool(F.relu(self.first(x))))


def method(self: nn.Module, x: Tensor) -> Tensor:
    return self.last(self.first(x).clamp(0, 6).contiguous())


@pytest.mark.parametrize(("forward", "name"), [(functional, "relu"), (method, "clamp")])
def test_functions_that_cut_are_refused(forward, name):
    parts = {"first": conv(), "pool": nn.AvgPool2d(2), "last": conv()}
    model = nn.Sequential(Body(forward, **parts)).double()
    text = rf"absorb_activations_: '{name}' in module '0', which layer '0.last' reads, is no module.*call an nn\.ReLU"
    with pytest.raises(ValueError, match=text):
        absorb_activations_(model, X, layers_of(model))
    assert absorb_activations_(model, X, {}) == []  # no layer reads it


def test_control_flow_is_refused():
    model = Body(lambda self, x: self.first(x) if x.sum() > 0 else x, first=conv())
    with pytest.raises(ValueError, match=r"absorb_activations_: cannot trace Body\.forward: .*control flow"):
        absorb_activations_(model, X, {})


def test_in_place_activations_whose_input_is_used_again():
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(self.act(y)) + y

    model = Body(forward, first=conv(), act=nn.ReLU(inplace=True), last=conv()).double()
    (kept,) = absorb_activations_(model, X, layers_of(model))
    assert kept.reason == "it changes the output of module 'first' in place, which is used again"

    def through_a_view(self: nn.Module, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(self.act(y.view(y.shape))) + y

    model = Body(through_a_view, first=conv(), act=nn.ReLU(inplace=True), last=conv()).double()
    before = model(X)
    with pytest.raises(
        ValueError, match=r"without 'act' the model computes something else on the example: an in-place"
    ):
        absorb_activations_(model, X, layers_of(model))
    assert type(model.act) is nn.ReLU
    assert torch.equal(model(X), before)


def test_published_networks():
    vgg = maqd_vgg(width=2, norm=LayerBatchNorm2d)
    report = check(vgg, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert len(report) == 16 + 3
    assert set(actions(report).values()) == {"absorbed"}
    resnet = maqd_preact_resnet(width=2, norm=LayerBatchNorm2d)
    report = check(resnet, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert len(report) == 25  # the pools average block inputs, before norm and activation: they stay
    assert set(actions(report).values()) == {"absorbed"}
    assert sum(isinstance(m, nn.AvgPool2d) for m in resnet.modules()) == 3


def test_modes_hooks_and_tuples():
    model = nn.Sequential(conv(), nn.ReLU(), conv()).double().train()
    model[0].eval()
    absorb_activations_(model, (X,), layers_of(model))
    assert [m.training for m in model] == [False, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_quantized_layers_pool_their_codes():
    """Spikes [[1, 0], [1, 1]] and weight -1: their average, not the quantized average, goes into the convolution."""
    model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(1, 1, 1, bias=False)).double()
    x = torch.tensor([[[[0.9, -0.1], [0.7, 3.0]]]], dtype=torch.float64, requires_grad=True)
    nn.init.constant_(model[3].weight, -2.0)
    absorb_activations_(model, x.detach(), {"3": model[3]})
    layer = convert(model[3], MaQDWeight({2: 2}), MaQDActivation({2: 1}), edge=False)
    out = model(x)
    assert out.tolist() == [[[[-0.75]]]]
    assert int(layer.weight_codes()) == -1
    out.sum().backward()
    slopes = torch.sigmoid((x.detach() - 0.5) / 0.25)
    torch.testing.assert_close(x.grad, -slopes * (1 - slopes), rtol=1e-12, atol=0)  # / alpha = 1/4, / 4 elements
    assert list(model.state_dict()) == ["3.weight"]
