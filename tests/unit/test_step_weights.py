"""Quantized weights shared within a training step: the same gradients, computed once, or an error."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bitstrata as bs
from bitstrata.objectives import joint_backward
from bitstrata.quantizers.base import WeightQuantizer

WIDTHS = (1, 2, 4)
STANDARDIZED = {"transform": bs.recipes.Part("standardize", "transform", {})}
FIELDS = [{}, STANDARDIZED, {"per_channel": True}, {"rescale": bs.recipes.Part("constant", "rescale", {})}]


def data(seed: int = 1, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 2, 4, 4, generator=generator, dtype=torch.float64).mul(255).round().div(255)
    return x, torch.arange(count) % 3


class Recurrent(nn.Module):
    """A layer used three times between a first and a last one; its region can be checkpointed."""

    def __init__(self, region: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(64, 3)
        self.region = region

    def turn(self, h: Tensor) -> Tensor:
        return self.again(h.relu()) + h

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        for _ in range(3):
            h = self.turn(h) if self.region is None else self.region(self.turn, h)
        return self.last(h.relu().flatten(1))


def network(region: Callable[..., Tensor] | None = None, **fields: object) -> nn.Module:
    torch.manual_seed(0)
    model = Recurrent().double()
    x, _ = data()
    recipe = dataclasses.replace(bs.recipes.strata(w=WIDTHS), **fields)
    bs.quantize_(model, recipe, x, input=bs.Pixels((0.5, 0.4), (0.25, 0.2)))
    bs.calibrate_(model, [x])
    model.region = region
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, expected: dict[str, Tensor], rtol: float = 1e-10) -> None:
    found = gradients(model)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


def accumulated(model: nn.Module, *, block: bool) -> dict[str, Tensor]:
    """Gradients of three parts of a batch."""
    model.zero_grad()

    def parts() -> None:
        for seed in (1, 2, 3):
            x, y = data(seed)
            (F.cross_entropy(model(x.to(model.last.weight)), y) / 3).backward()

    if block:
        with bs.step_weights(model):
            parts()
    else:
        parts()
    return gradients(model)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """(quantizer, precision) -> number of times that it quantized a weight."""
    seen: Counter[tuple[int, int]] = Counter()
    whole = WeightQuantizer.__call__

    def counting(self: WeightQuantizer, x: Tensor) -> Tensor:
        seen[id(self), self.precision] += 1
        return whole(self, x)

    monkeypatch.setattr(WeightQuantizer, "__call__", counting)
    return seen


# ---- the same gradients


@pytest.mark.parametrize("fields", FIELDS)
def test_parts_of_a_batch(fields, calls):
    model, twin = network(**fields), network(**fields)
    calls.clear()
    expected = accumulated(twin, block=False)
    accumulated(model, block=True)
    assert_same(model, expected)
    assert calls[id(twin.again.weight_quant), 4] == 9
    assert calls[id(model.again.weight_quant), 4] == 1
    assert all(layer.step_weights is None for layer in (model.first, model.again, model.last))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("fields", [{}, STANDARDIZED])
def test_checkpointed_regions(reentrant, fields, calls):
    expected = accumulated(network(**fields), block=False)
    model = network(lambda f, h: checkpoint(f, h, use_reentrant=reentrant), **fields)
    calls.clear()
    accumulated(model, block=True)
    assert_same(model, expected)
    assert calls[id(model.again.weight_quant), 4] == 1


def test_several_precisions_in_one_block(calls):
    model, twin = network(), network()
    x, y = data()
    for p in WIDTHS:
        with bs.precision(twin, p):
            F.cross_entropy(twin(x), y).backward()
    expected = gradients(twin)
    calls.clear()
    with bs.step_weights(model):
        for p in WIDTHS:
            with bs.precision(model, p):
                F.cross_entropy(model(x), y).backward()
    assert_same(model, expected)
    assert [calls[id(model.again.weight_quant), p] for p in WIDTHS] == [1, 1, 1]
    assert sum(calls[id(model.first.weight_quant), p] for p in WIDTHS) == 1  # 8 bits at all of them


def test_layers_with_integer_gradients(calls):
    fields = {"gradient": bs.recipes.Part("shiftquant", "gradient", {"rounding": "nearest"})}
    expected = accumulated(network(**fields).float(), block=False)
    model = network(**fields).float()
    calls.clear()
    accumulated(model, block=True)
    assert_same(model, expected, rtol=1e-3)
    assert calls[id(model.again.weight_quant), 4] == 1


def test_autocast_and_none_in_one_block():
    def passes(model: nn.Module) -> None:
        x, y = (t.float() if t.is_floating_point() else t for t in data())
        for cast in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                F.cross_entropy(model(x), y).backward()

    model, twin = network().float(), network().float()
    passes(twin)
    with bs.step_weights(model):
        passes(model)
    expected = gradients(twin)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() <= 0.02 * expected[name].norm() + 1e-6, name


def test_without_gradients_there_is_none():
    model = network()
    x, _ = data()
    with torch.no_grad():
        expected = model(x)
        with bs.step_weights(model):
            assert torch.equal(model(x), expected)
            assert not model.again.quantized_weight().requires_grad
    assert gradients(model) == {}


def test_frozen_weights_stay_without_gradient():
    model = network()
    model.again.weight.requires_grad_(False)
    model.first.requires_grad_(False)
    expected = accumulated(copy.deepcopy(model), block=False)
    accumulated(model, block=True)
    assert_same(model, expected)
    assert "again.weight" not in expected
    assert "first.weight" not in expected


# ---- joint training


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_joint_training_has_the_gradients_of_single_runs(fields, reduction, calls):
    model = network(**fields)
    x, y = data()
    shared: dict[str, Tensor] = {}
    owner = {id(q): p for p, group in bs.precision_parameters(model).items() for q in group}
    for p in WIDTHS:
        twin = copy.deepcopy(model)
        with bs.precision(twin, p):
            F.cross_entropy(twin(x), y).backward()
        for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            if other.grad is not None:
                factor = 1 if id(mine) in owner or reduction == "sum" else 1 / 3
                shared[name] = shared.get(name, torch.zeros(())) + factor * other.grad
    calls.clear()
    joint_backward(model, x, y, distill=None, reduction=reduction)
    assert_same(model, shared)
    assert sum(calls[id(model.last.weight_quant), p] for p in WIDTHS) == 1


def test_weights_used_once_keep_every_bit():
    """Order and rounding of sums are those of one backward pass a precision, but for steps that all share."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(16, 8), torch.arange(16) % 3
    bs.calibrate_(bs.quantize_(model, bs.recipes.strata(w=WIDTHS), x), [x])
    twin = copy.deepcopy(model)
    for p in reversed(WIDTHS):
        with bs.precision(twin, p):
            F.cross_entropy(twin(x), y).backward()
    joint_backward(model, x, y, distill=None, reduction="sum")
    expected = gradients(twin)
    for name, gradient in gradients(model).items():
        if name in ("0.weight_quant.step", "4.weight_quant.step"):
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=0)
        else:
            assert torch.equal(gradient, expected[name]), name


def test_a_module_in_several_places_is_quantized_once_a_precision(calls):
    torch.manual_seed(3)
    tied = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), tied, nn.ReLU(), tied, nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(16, 8, dtype=torch.float64), torch.arange(16) % 3
    bs.calibrate_(bs.quantize_(model, bs.recipes.strata(w=WIDTHS), x), [x])
    twin = copy.deepcopy(model)
    for p in reversed(WIDTHS):
        with bs.precision(twin, p):
            F.cross_entropy(twin(x), y).backward()
    calls.clear()
    joint_backward(model, x, y, distill=None, reduction="sum")
    assert_same(model, gradients(twin))
    assert [calls[id(model[2].weight_quant), p] for p in WIDTHS] == [1, 1, 1]


def test_transforms_run_once_for_all_precisions():
    model = network(**STANDARDIZED)
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    model.again.weight_transform.register_forward_hook(counted)
    joint_backward(model, *data())
    assert count == 1


def test_joint_training_within_a_block(calls):
    model, twin = network(), network()
    for seed in (1, 2):
        joint_backward(twin, *data(seed))
    calls.clear()
    with bs.step_weights(model):
        for seed in (1, 2):
            joint_backward(model, *data(seed))
    assert_same(model, gradients(twin))
    assert [calls[id(model.again.weight_quant), p] for p in WIDTHS] == [1, 1, 1]


def test_blocks_in_blocks_are_one(calls):
    model = network()
    expected = accumulated(network(), block=False)
    calls.clear()
    with bs.step_weights(model):
        accumulated(model, block=True)
        assert model.again.weight.grad is None
    assert_same(model, expected)


# ---- what cannot be


def test_changing_weights_with_gradients_outstanding():
    model = network()
    x, y = data()

    def changing() -> None:
        with bs.step_weights(model):
            F.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                model.again.weight.add_(0.1)

    with pytest.raises(RuntimeError, match=r"^step_weights: the weight of shape \(4, 4, 3, 3\) of a QuantConv2d, or a"):
        changing()
    assert model.again.step_weights is None
    assert model.again.weight.grad is None


def test_weights_changed_between_uses_are_quantized_anew():
    model = network().eval()
    x, _ = data()
    with torch.no_grad(), bs.step_weights(model):
        before = model(x)
        model.again.weight.mul_(-1)
        assert not torch.equal(model(x), before)
        model.again.weight.mul_(-1)
        model.again.weight_quant.step.mul_(3)
        assert not torch.equal(model(x), before)
        model.again.weight_quant.step.div_(3)
        torch.testing.assert_close(model(x), before)


def test_a_backward_pass_after_the_block():
    model = network()
    x, y = data()
    with bs.step_weights(model):
        loss = F.cross_entropy(model(x), y)
    with pytest.raises(RuntimeError, match=r"^step_weights: a backward pass ran after the block"):
        loss.backward()


def test_an_exception_ends_the_block():
    model = network()
    with pytest.raises(KeyError), bs.step_weights(model):
        raise KeyError
    assert model.again.step_weights is None
    expected = accumulated(network(), block=False)
    accumulated(model, block=False)
    assert_same(model, expected)


def test_copies_made_inside_have_no_part():
    model = network()
    x, y = data()
    with bs.step_weights(model):
        F.cross_entropy(model(x), y).backward()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.again.step_weights is None
            assert twin.again.weight.grad is None


class DistributedDataParallel(nn.Module):
    """Stands for torch's, which needs a group of processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_wrapped_models_are_left_alone():
    model = DistributedDataParallel(network())
    with (
        pytest.raises(ValueError, match=r"^step_weights: not for a model in DistributedDataParallel, which handles"),
        bs.step_weights(model),
    ):
        pytest.fail("a block for a wrapped model")
    used = []
    model.module.again.register_forward_hook(lambda layer, *_: used.append(layer.step_weights))
    joint_backward(model, *data())
    assert used == [None] * 9
