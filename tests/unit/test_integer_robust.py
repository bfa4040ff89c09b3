"""Every layer that trains in integers, among the rest of torch, and with numbers and batches at the edge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers_ddp import Small, run, shard, small
from helpers_integer import gauss, leaf, same
from helpers_ranks import start
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitstrata.integer import IntegerRule
from bitstrata.nn import IntegerLayer, to_integer
from bitstrata.nn.integer_layers import INTEGER_FORMS
from bitstrata.prepare.integer_training import integer_layers


class Attend(nn.Module):
    """Self-attention as a layer with one input and one result."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class First(nn.Module):
    """The first result of a recurrent layer or cell."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result = self.inner(x)
        return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True)
class Case:
    """A layer, a wrapper that gives it one input and one result, and the shape of its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def build(self, rule: IntegerRule | None = None) -> nn.Module:
        torch.manual_seed(0)
        module = self.make()
        for index, (name, layer) in enumerate(list(module.named_modules())):
            if type(layer) in INTEGER_FORMS:
                to_integer(layer, rule, seed=5, index=index, name=name)
        return module

    def x(self, seed: int = 0) -> Tensor:
        return gauss(*self.shape, seed=seed, axis=-1)


CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Sequential(nn.Linear(6, 5)), (4, 6)),
    "conv1d": Case(lambda: nn.Sequential(nn.Conv1d(6, 5, 3)), (4, 6, 7)),
    "conv2d": Case(lambda: nn.Sequential(nn.Conv2d(6, 5, 3, padding=1)), (4, 6, 5, 5)),
    "attention": Case(Attend, (4, 3, 6)),
    "lstm": Case(lambda: First(nn.LSTM(6, 5, 2, bidirectional=True, proj_size=3)), (3, 4, 6)),
    "gru": Case(lambda: First(nn.GRU(6, 5)), (3, 4, 6)),
    "rnn": Case(lambda: First(nn.RNN(6, 5, batch_first=True)), (4, 3, 6)),
    "lstm_cell": Case(lambda: First(nn.LSTMCell(6, 5)), (4, 6)),
    "gru_cell": Case(lambda: First(nn.GRUCell(6, 5)), (4, 6)),
    "rnn_cell": Case(lambda: First(nn.RNNCell(6, 5)), (4, 6)),
}
every_layer = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_every_form_with_products_is_among_the_cases() -> None:
    forms = {type(layer) for case in CASES.values() for layer in integer_layers(case.build()).values()}
    assert forms == {form for form in INTEGER_FORMS.values() if form.multiplies}


def only(module: nn.Module) -> IntegerLayer:
    (layer,) = integer_layers(module).values()
    return layer


def g_for(module: nn.Module, x: Tensor, seed: int = 1) -> Tensor:
    """A gradient for the result; finds its shape without touching what the layer draws or counts."""
    with torch.no_grad():
        return gauss(*copy.deepcopy(module)(x).shape, seed=seed, axis=-1)


def backward(module: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    """Result and gradients of the input and the parameters, which accumulate."""
    x = leaf(x)
    y = module(x)
    y.backward(g)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


# --- together with the rest of torch ----------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("act_rounding", ["nearest", "stochastic"])
def test_checkpointing_changes_nothing(case: Case, reentrant: bool, act_rounding: str) -> None:
    results = []
    for wrapped in (False, True):
        module = case.build(IntegerRule(act_rounding=act_rounding))
        g = g_for(module, case.x())
        torch.manual_seed(2)
        for _ in range(2):
            x = leaf(case.x())
            y = checkpoint(module, x, use_reentrant=reentrant) if wrapped else module(x)
            y.backward(g)
        results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
        results[-1] += [torch.tensor(state.noise.stream) for state in only(module).states.values()]
    assert same(*results)


@every_layer
def test_gradients_accumulate(case: Case) -> None:
    module, twin = case.build(), case.build()
    sums: list[Tensor] = []
    for seed in (0, 1):
        x = case.x(seed)
        g = g_for(module, x, seed + 5)
        backward(module, x, g)
        twin.zero_grad()
        parts = backward(twin, x, g)[2:]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else [p.clone() for p in parts]
    assert same([p.grad for p in module.parameters()], sums)


@every_layer
def test_hooks_keep_working(case: Case) -> None:
    module, twin, seen = case.build(), case.build(), []
    layer = only(module)
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_pre_hook(lambda *_: seen.append("back"))
    layer.register_full_backward_hook(lambda *_: seen.append("done"))
    only(twin).register_full_backward_hook(lambda *_: None)  # such a hook makes attention's arguments separate tensors
    first = next(module.parameters())
    first.register_hook(lambda grad: grad * 2)
    x = case.x()
    g = g_for(twin, x)
    hooked, plain = backward(module, x, g), backward(twin, x, g)
    assert seen == ["before", "after", "back", "done"]
    assert torch.equal(hooked[2], 2 * plain[2])
    assert same(hooked[:2] + hooked[3:], plain[:2] + plain[3:])


@every_layer
def test_tied_weights_get_the_sum_of_gradients(case: Case) -> None:
    """Two layers with the same parameters against two with copies of them."""
    x = case.x()
    results = []
    for tied in (False, True):
        first, second = case.build(), case.build()
        if tied:
            for name, parameter in list(only(second).named_parameters()):
                owner, _, attribute = name.rpartition(".")
                setattr(only(second).get_submodule(owner), attribute, only(first).get_parameter(name))
                assert parameter is not only(second).get_parameter(name)
        g = g_for(first, x)
        (first(x) * g).sum().backward()
        (second(x * 0.7) * g).sum().backward()
        ours = [p.grad for p in first.parameters()]
        results.append(ours if tied else [a + b.grad for a, b in zip(ours, second.parameters(), strict=True)])
    assert same(*results)


@every_layer
def test_second_derivatives_are_refused_by_name(case: Case) -> None:
    module, x = case.build(), leaf(case.x())
    name = next(iter(only(module).states.values())).name.partition(",")[0]
    (first,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    assert first.requires_grad  # a penalty on it must not be lost
    with pytest.raises(RuntimeError, match=f"{name}.*: gradients of integer products are differentiable once.*second"):
        first.square().sum().backward()
    assert torch.equal(first.detach(), torch.autograd.grad(case.build()(x).sum(), x)[0])


@pytest.mark.parametrize("world", [1, 2])
def test_distributed_gradients_are_the_mean_of_the_processes(tmp_path: Path, world: int) -> None:
    """Each process rounds by a seed of its own; parameters stay equal."""
    if world == 1:
        run(0, 1, str(tmp_path))
    else:
        start(run, world, str(tmp_path), ranks=world)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    local = [backward(small(rank), shard(rank), doubled(small(rank), rank))[2:] for rank in range(world)]
    for first, parameters in saved:
        assert same(first, [sum(parts) / world for parts in zip(*local, strict=True)])
        assert same(parameters, saved[0][1])
    assert not any(torch.equal(p, q) for p, q in zip(saved[0][1], Small().parameters(), strict=True))


def doubled(model: nn.Module, rank: int) -> Tensor:
    """The gradient of the sum of squares."""
    return 2 * model(shard(rank)).detach()


# --- numbers at the edge ----------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_an_error_that_names_the_layer(case: Case, bad: float) -> None:
    module, x = case.build(), case.x()
    name = only(module).states[next(iter(only(module).states))].name.partition(",")[0]
    x.view(-1)[0] = bad
    with pytest.raises(ValueError, match=f"{name}.*: 1 of .* elements of the activation .* not finite"):
        module(x)
    y = module(leaf(case.x()))
    g = torch.ones(y.shape)
    g.view(-1)[-1] = bad
    with pytest.raises(ValueError, match=f"{name}.*elements of the gradient .* are not finite"):
        y.backward(g)


@every_layer
@pytest.mark.parametrize("where", ["activation", "gradient"])
def test_skipped_steps_have_zero_gradients_and_are_counted(case: Case, where: str) -> None:
    module = case.build(IntegerRule(on_nonfinite="skip"))
    x = leaf(case.x())
    g = g_for(module, case.x())
    with torch.no_grad():
        if where == "activation":
            x.view(-1)[:] = torch.inf
        else:
            g[:] = torch.nan
    y = module(x)
    assert bool(y.isnan().all()) == (where == "activation")
    y.backward(g)
    assert all(p.grad is not None and not p.grad.any() for p in (x, *module.parameters()))
    skipped = [state.skipped for state in only(module).states.values()]
    if where == "activation":
        assert skipped == backward_passes(only(module), x)
    else:  # products before one that has skipped see zeros
        assert sum(skipped) > 0
    module.zero_grad()
    backward(module, case.x(), g_for(module, case.x()))
    assert [state.skipped for state in only(module).states.values()] == skipped
    assert any(p.grad.any() for p in module.parameters())


def backward_passes(layer: IntegerLayer, x: Tensor) -> list[int]:
    """Of each product in one step of training: those of the state once a time step, the others once."""
    times = x.shape[1] if getattr(layer, "batch_first", False) else x.shape[0]
    calls = []
    for name in layer.states:
        of_state = "_l" in name and not name.startswith("weight_ih")
        calls.append(0 if name in ("k_proj", "v_proj") else times if of_state else 1)
    return calls


def test_initial_states_get_zero_gradients_in_skipped_steps() -> None:
    layer = to_integer(nn.LSTM(6, 5), IntegerRule(on_nonfinite="skip"))
    h, c = (leaf(gauss(1, 4, 5, axis=-1)) for _ in range(2))
    layer(torch.full((3, 4, 6), torch.nan), (h, c))[0].sum().backward()
    assert not h.grad.any()
    assert not c.grad.any()
    layer(gauss(3, 4, 6), (h, c))[0].sum().backward()
    assert bool(c.grad.any())


@every_layer
def test_a_gradient_of_zeros_gives_zeros(case: Case) -> None:
    module = case.build()
    x = case.x()
    results = backward(module, x, torch.zeros_like(g_for(module, x)))
    assert all(not r.any() for r in results[1:])


@every_layer
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_a_single_outlier_in_the_gradient(case: Case, size: float) -> None:
    """Everything stays finite and scales with the outlier; powers of two scale exactly."""
    rule = IntegerRule(grad_rounding="nearest")
    module, x = case.build(rule), case.x()
    g = torch.zeros(g_for(module, x).shape)
    g.view(-1)[g.numel() // 2] = size
    results = backward(module, x, g)
    module.zero_grad()
    twice = backward(module, x, 4 * g)
    assert all(r.isfinite().all() for r in results)
    assert results[1].any()
    assert same([4 * r for r in results[1:]], twice[1:])


@every_layer
def test_inputs_of_zeros_and_with_one_outlier(case: Case) -> None:
    module = case.build()
    g = g_for(module, case.x())
    outlier = case.x()
    outlier.view(-1)[3] = 1e10
    for x in (torch.zeros(case.shape), outlier):
        module.zero_grad()
        assert all(r.isfinite().all() for r in backward(module, x, g))


@every_layer
def test_an_empty_batch_gives_an_empty_result_and_no_gradient(case: Case) -> None:
    module = case.build()
    batch = 1 if case in (CASES["lstm"], CASES["gru"]) else 0
    x = torch.zeros([0 if d == batch else size for d, size in enumerate(case.shape)])
    results = backward(module, x, module(x).detach())
    assert results[0].numel() == 0
    assert results[0].shape[batch] == 0
    assert results[1].shape == x.shape
    assert all(r is not None and not r.any() for r in results[2:])


@every_layer
def test_rules_may_be_exchanged(case: Case) -> None:
    module, x = case.build(), case.x()
    coarse = module(x)
    only(module).rule = replace(only(module).rule, w=8, a=8)
    fine = module(x)
    only(module).rule = replace(only(module).rule, method="tensor")
    assert not torch.equal(coarse, fine)
    assert not torch.equal(module(x), fine)
