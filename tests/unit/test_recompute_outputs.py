"""Results of integer layers that the backward pass computes again: the same gradients from less memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import bitstrata as bs
from bitstrata.integer import integer_linear, memory
from bitstrata.integer.recompute import _pack, _present, recomputes


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = bs.zoo.create("vit_cifar", classes=10, width=48, depth=2, heads=3).train()
    bs.integer_(model, torch.randn(2, 3, 32, 32), w=4, a=4, g=4, **options)
    return model


def gradients(model: nn.Module, x: Tensor, *, again: bool, steps: int = 2) -> list[Tensor]:
    model = copy.deepcopy(model)
    torch.manual_seed(5)  # of stochastic rounding of activations
    for _ in range(steps):
        with bs.recompute_outputs() if again else nullcontext():
            loss = model(x).square().mean()
        loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def same(model: nn.Module, x: Tensor) -> None:
    plain, again = gradients(model, x, again=False), gradients(model, x, again=True)
    assert len(plain) == len(again) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def kept(run: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd keeps for run(), in the context of recompute_outputs or not."""
    storages: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Any:
        found = _pack(_present.known, x) if recomputes() else None
        if found is None or hasattr(found, "tensor"):
            storages[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(x.untyped_storage().nbytes() for x in storages.values())


@pytest.mark.parametrize(
    "options", [{}, {"unsigned_nonneg": True}, {"act_rounding": "stochastic"}, {"form": "grouped"}]
)
def test_gradients_are_the_same(options):
    same(vit(**options), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(), nn.GELU(), nn.Sigmoid(), nn.Softplus()])
def test_activations_that_keep_their_input_their_output_or_write_it(activation):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), activation, nn.Conv2d(8, 8, 3, stride=2, groups=2), activation, nn.Flatten(),
        nn.Linear(8 * 4 * 4, 20), activation, nn.Linear(20, 5),
    )  # fmt: skip
    x = torch.randn(4, 3, 10, 10)
    bs.integer_(model, x, w=4, a=4, g=4)
    same(model, x)
    same(model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last))


def test_what_is_kept_shrinks_by_the_results():
    model, x = vit(), torch.randn(8, 3, 32, 32)
    plain = kept(lambda: model(x))
    with bs.recompute_outputs():
        again = kept(lambda: model(x))
    tokens = 8 * 64
    assert plain - again == 2 * tokens * 4 * (3 * 48 + 4 * 48)  # of two blocks: queries, keys, values; GELU's input


def test_graphs_that_are_walked_twice_and_checkpoints():
    model, x = vit(), torch.randn(3, 3, 32, 32)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    loss = first(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    with bs.recompute_outputs():
        loss = second(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)

    def run(network: nn.Module, *, again: bool) -> Tensor:
        with bs.recompute_outputs() if again else nullcontext():
            tokens = network.patches(x).flatten(2).transpose(1, 2) + network.positions
            for block in network.blocks:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            network.head(network.norm(tokens).mean(1)).square().mean().backward()
        return network.blocks[0].fc1.weight.grad

    assert torch.equal(run(copy.deepcopy(model), again=False), run(copy.deepcopy(model), again=True))


def test_layers_that_keep_nothing_are_left_alone():
    model, x = vit(), torch.randn(3, 3, 32, 32)
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    same(model, x)


def test_addresses_that_pass_to_other_tensors():
    x, weight = torch.randn(256, 64), torch.randn(64, 64, requires_grad=True)
    with bs.recompute_outputs():
        at = set()
        for _ in range(4):
            y = integer_linear(x, weight)  # nobody keeps it
            at.add(y.data_ptr())
            del y
            gc.collect()
        other = torch.from_numpy(memory._pool.take((256, 64), "float32")).requires_grad_()
        with torch.no_grad():
            other.copy_(torch.randn(256, 64))
        assert other.data_ptr() in at
        result = F.gelu(other * 1).sum()
        direct = F.gelu(other)
    direct.sum().backward()
    twin = other.detach().clone().requires_grad_()
    F.gelu(twin).sum().backward()
    assert torch.equal(other.grad, twin.grad)
    result.backward()


def test_writing_in_place_is_an_error():
    x, weight, bias = torch.randn(6, 8), torch.randn(4, 8, requires_grad=True), torch.zeros(4, requires_grad=True)
    for victim in (weight, bias):
        with bs.recompute_outputs():
            loss = F.gelu(integer_linear(x, weight, bias)).sum()
        with torch.no_grad():
            victim.add_(1)
        with pytest.raises(RuntimeError, match="integer layer: its weight or bias was written in place"):
            loss.backward()
    with bs.recompute_outputs():
        hidden = weight * 2
        loss = hidden.square().sum()
    hidden.detach().add_(1)
    with pytest.raises(RuntimeError, match=r"a tensor \(4, 8\) .* was written in place"):
        loss.backward()


def test_the_context_ends():
    assert not recomputes()
    with bs.recompute_outputs():
        assert recomputes()
    assert not recomputes()
    with pytest.raises(ValueError, match="must be"), bs.recompute_outputs():
        integer_linear(torch.ones(2, 3), torch.ones(2, 4))
    assert not recomputes()


def test_memory_of_results_serves_the_next_step():
    model, x = vit(), torch.randn(32, 3, 32, 32)

    def step() -> None:
        with bs.recompute_outputs():
            loss = model(x).sum()
        loss.backward()

    step()
    gc.collect()
    before, size = memory._pool.lent, memory._pool.nbytes
    for _ in range(3):
        step()
    gc.collect()
    assert (memory._pool.lent, memory._pool.nbytes) == (before, size)
