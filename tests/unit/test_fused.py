"""The fused training step equals the unfused one to the bit: results, gradients, statistics and random bits."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.prepare.integer_training import noise_state


class Block(nn.Module):
    """A residual network with what networks do between layers: sums of several kinds, pooling, a layer with a bias."""

    def __init__(self, *, groups: int = 1, inplace: bool = False) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(8)
        self.two, self.norm2 = nn.Conv2d(8, 12, (3, 1), stride=2, padding=(1, 0), bias=False), nn.BatchNorm2d(12)
        self.side, self.norm3 = nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12)
        self.biased = nn.Conv2d(12, 12, 3, padding=2, dilation=2)
        self.relu, self.head = nn.ReLU(inplace=inplace), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm0(self.stem(x)))
        x = F.relu(x + self.norm1(self.one(x)))
        y = self.norm2(self.two(x)) + self.norm3(self.side(x))
        y = torch.tanh(self.biased(y)) + y
        y = F.max_pool2d(y, 2)
        return self.head(y.mean((2, 3)))


def pair(model: nn.Module, size: int = 12, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Two equal networks in integers."""
    first = bs.integer_(model, torch.randn(2, 3, size, size), **{"w": 4, "a": 4, "g": 4, **options}).train()
    return first, copy.deepcopy(first)


def step(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    torch.manual_seed(9)  # of dropout
    result = network(x)
    F.cross_entropy(result, y).backward()
    return result.detach()


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    assert noise_state(a) == noise_state(b)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "one group": {"groups": 1},
    "six groups": {"w": 2, "a": 3, "g": 2, "groups": 6},
    "six bits": {"w": 6, "a": 6, "g": 6},
    "eight bits": {"w": 8, "a": 8, "g": 8},
    "quantized l2": {"norm": "l2_quantized"},
    "int8, nearest": {"w": None, "a": None, "g": None, "method": "int8_naive"},
    "int8, stochastic": {"w": None, "a": None, "g": None, "method": "int8_sr"},
    "nearest": {"grad_rounding": "nearest"},
    "unsigned": {"unsigned_nonneg": True},
    "unsigned, eight bits": {"w": 8, "a": 8, "g": 8, "groups": 3, "unsigned_nonneg": True},
    "plain mean deviation": {"l1_scale": "1"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("threads", [1, 2])
def test_equals_the_unfused_network(options, threads):
    torch.manual_seed(1)
    plain, other = pair(Block(), **options)
    fused = bs.fuse(other)
    assert fused.fused == ("stem", "one", "two", "side")
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (plain, other)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for seed in range(3):
            x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
            for optimizer in optimizers:
                optimizer.zero_grad()
            y = torch.tensor([0, 1, 4])
            assert torch.equal(step(plain, x, y), step(fused, x, y))
            same(plain, other)
            for optimizer in optimizers:
                optimizer.step()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("resnet20", {"width": 4}, 16),
        ("resnet20", {"width": 4, "shortcut": "B"}, 16),
        ("resnet18", {"stem": "cifar"}, 8),
        ("preact_resnet20", {"width": 4}, 16),
        ("mobilenet_v2", {"stem": "cifar"}, 8),
    ],
)
def test_networks_of_the_zoo(name, options, size):
    torch.manual_seed(0)
    plain, other = pair(bs.zoo.create(name, **options), size)
    fused = bs.fuse(other)
    x, y = torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 3])
    assert torch.equal(step(plain, x, y), step(fused, x, y))
    same(plain, other)


def test_groups_memory_formats_and_rectifiers_in_place():
    torch.manual_seed(0)
    plain, other = pair(Block(groups=4, inplace=True))
    other.to(memory_format=torch.channels_last)
    fused = bs.fuse(other)
    x, y = torch.randn(2, 3, 12, 12), torch.tensor([0, 1])
    assert torch.equal(step(plain, x, y), step(fused, x.contiguous(memory_format=torch.channels_last), y))
    same(plain, other)


class Sequence(nn.Module):
    """Its linear layer reads a matrix for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.stem(x)))
        return self.head(y.flatten(2).transpose(1, 2)).mean(1)


@pytest.mark.parametrize("change", [{}, {"act_rounding": "stochastic"}, {"groups": 2, "g": 6}], ids=str)
def test_linear_layers_of_other_inputs_and_rules(change):
    torch.manual_seed(0)
    for model in (Sequence(), Block()):
        plain, other = pair(model)
        fused = bs.fuse(other)
        for network in (plain, other):
            head = network.get_submodule("head")
            head.rule = dataclasses.replace(head.rule, **change)  # after the network was fused
        x, y = torch.randn(4, 3, 12, 12), torch.tensor([0, 1, 2, 3])
        assert torch.equal(step(plain, x, y), step(fused, x, y))
        same(plain, other)


def test_a_frozen_linear_layer_gets_no_gradient():
    torch.manual_seed(0)
    plain, other = pair(Block())
    fused = bs.fuse(other)
    for network in (plain, other):
        network.get_submodule("head").requires_grad_(requires_grad=False)
    x, y = torch.randn(4, 3, 12, 12), torch.tensor([0, 1, 2, 3])
    assert torch.equal(step(plain, x, y), step(fused, x, y))
    same(plain, other)


def test_gradient_of_the_input_and_accumulation():
    torch.manual_seed(0)
    plain, other = pair(Block())
    fused = bs.fuse(other)
    x, y = torch.randn(2, 3, 12, 12), torch.tensor([0, 1])
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):
        step(plain, a, y), step(fused, b, y)
    assert torch.equal(a.grad, b.grad)
    same(plain, other)


def test_two_steps_whose_backward_passes_come_later():
    torch.manual_seed(0)
    plain, other = pair(Block(), grad_rounding="nearest")
    fused = bs.fuse(other)
    x, y = torch.randn(4, 3, 12, 12), torch.tensor([0, 1])
    for network in (plain, fused):
        F.cross_entropy(network(x[:2]), y).add(F.cross_entropy(network(x[2:]), y)).backward()
    same(plain, other)


def test_frozen_parameters_get_no_gradient():
    torch.manual_seed(0)
    plain, other = pair(Block())
    for model in (plain, other):
        model.one.weight.requires_grad_(False)
        model.norm2.bias.requires_grad_(False)
    x, y = torch.randn(2, 3, 12, 12), torch.tensor([0, 1])
    assert torch.equal(step(plain, x, y), step(bs.fuse(other), x, y))
    assert other.one.weight.grad is None
    same(plain, other)


def test_without_gradients_statistics_move_all_the_same():
    torch.manual_seed(0)
    plain, other = pair(Block())
    fused = bs.fuse(other)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(plain(x), fused(x))
    same(plain, other)
    assert fused(x).grad_fn is not None


def test_evaluation_and_empty_batches_are_the_models_own():
    torch.manual_seed(0)
    plain, other = pair(Block())
    fused = bs.fuse(other)
    x = torch.randn(2, 3, 12, 12)
    fused.eval()
    assert not other.training
    assert torch.equal(plain.eval()(x), fused(x))
    fused.train()
    other.norm1.eval()  # a part of it
    plain.train().norm1.eval()
    assert torch.equal(plain(x), fused(x))


def test_state_and_parameters_are_the_models_own():
    model, _ = pair(Block())
    fused = bs.fuse(model)
    assert {id(p) for p in fused.parameters()} == {id(p) for p in model.parameters()}
    assert [f"model.{name}" for name in model.state_dict()] == list(fused.state_dict())


def test_a_module_with_hooks_is_not_fused():
    model, _ = pair(Block())
    seen = []
    model.one.register_forward_hook(lambda *_: seen.append(1))
    fused = bs.fuse(model)
    assert fused.fused == ("stem", "two", "side")
    step(fused, torch.randn(2, 3, 12, 12), torch.tensor([0, 1]))
    assert seen == [1]


def test_the_memory_of_a_step_serves_the_next():
    torch.manual_seed(0)
    model, _ = pair(Block())
    fused = bs.fuse(model)
    waiting = []
    for _ in range(4):
        step(fused, torch.randn(2, 3, 12, 12), torch.tensor([0, 1]))
        waiting.append(fused._pool.nbytes)
    assert waiting[1] == waiting[2] == waiting[3] > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_names_its_layer(bad):
    torch.manual_seed(0)
    model, _ = pair(Block())
    fused = bs.fuse(model)
    x, y = torch.randn(2, 3, 12, 12), torch.tensor([0, 1])
    broken = x.clone()
    broken[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="IntegerConv2d 'stem': its activation contains NaN or infinity"):
        fused(broken)
    result = fused(x)
    gradient = torch.zeros_like(result)
    gradient[0, 0] = bad
    with pytest.raises(ValueError, match="IntegerLinear 'head': its gradient contains NaN or infinity"):
        result.backward(gradient)
    step(fused, x, y)  # and goes on
    with torch.no_grad():
        model.two.weight[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="IntegerConv2d 'two': its weight is not finite"):
        fused(x)


def test_gradients_that_are_not_finite_inside():
    torch.manual_seed(0)
    model, _ = pair(Block())
    fused = bs.fuse(model)
    model.biased.register_full_backward_hook(lambda m, gi, go: (torch.full_like(gi[0], torch.nan),))
    with pytest.raises(ValueError, match=r"QuantizedL1BatchNorm2d 'norm[23]': its gradient contains NaN or infinity"):
        step(fused, torch.randn(2, 3, 12, 12), torch.tensor([0, 1]))


def test_skipping_what_is_not_finite():
    torch.manual_seed(0)
    model, _ = pair(Block(), on_nonfinite="skip")
    fused = bs.fuse(model)
    broken = torch.randn(2, 3, 12, 12)
    broken[0, 0, 0, 0] = torch.nan
    assert fused(broken).isnan().any()
    handle = model.biased.register_full_backward_hook(lambda m, gi, go: (torch.full_like(gi[0], torch.nan),))
    step(fused, torch.randn(2, 3, 12, 12), torch.tensor([0, 1]))
    assert all(not p.grad.any() for p in model.parameters())
    assert model.one.state.skipped == 1
    handle.remove()
    step(fused, torch.randn(2, 3, 12, 12), torch.tensor([0, 1]))
    assert model.one.weight.grad.any()


def test_a_step_runs_backward_once():
    model, _ = pair(Block())
    loss = bs.fuse(model)(torch.randn(2, 3, 12, 12)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the backward pass of a step runs once"):
        loss.backward()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else x


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return torch.sigmoid_(y) + y


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_networks_that_cannot_be_fused():
    with pytest.raises(TypeError, match=r"fuse: model must be a torch\.nn\.Module, got str"):
        bs.fuse("model")
    with pytest.raises(bs.FuseError, match="the forward pass of Branches cannot be traced"):
        bs.fuse(Branches())
    with pytest.raises(bs.FuseError, match="'sigmoid_' writes into 'norm', which other operations read too"):
        bs.fuse(pair(Overwriting())[0])
    with pytest.raises(bs.FuseError, match="Two must take one tensor and return one, its forward takes 2 arguments"):
        bs.fuse(Two())
    with pytest.raises(bs.FuseError, match=r"Block has no convolution .* that only a QuantizedL1BatchNorm2d reads"):
        bs.fuse(Block())


def test_inputs_that_do_not_fit():
    model, _ = pair(Block())
    fused = bs.fuse(model)
    with pytest.raises(ValueError, match=r"must be \(N, C, H, W\) in float32 on the CPU, got \(3, 12, 12\)"):
        fused(torch.randn(3, 12, 12))
    with pytest.raises(ValueError, match=r"got \(2, 3, 12, 12\) of torch\.float64 on cpu"):
        fused(torch.randn(2, 3, 12, 12).double())
