"""freeze_: ranges of networks trained in integers fixed for evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_integer import batches, network, spread, trained
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.integer import shift_quantize
from bitstrata.integer.frozen import FrozenRange, frozen_quantize
from bitstrata.nn import QuantizedL1BatchNorm2d
from bitstrata.nn.layer_batch_norm import fold
from bitstrata.prepare import freezable_layers

# --- the quantizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_frozen_at_its_own_range_a_tensor_has_the_codes_of_shiftquant(bits: int, groups: int) -> None:
    x = spread(5, 8, 3)
    frozen = FrozenRange.of(x.abs().amax((0, 2)), groups)
    ours, theirs = frozen_quantize(x, frozen, bits, groups, 1), shift_quantize(x, bits, groups, 1)
    assert torch.equal(ours.exponents, theirs.exponents)
    assert torch.equal(ours.scale, theirs.scale)
    assert int((ours.codes.int() - theirs.codes.int()).abs().max()) <= 1  # ties of quotients in float32
    assert float((ours.codes == theirs.codes).double().mean()) > 0.99


def test_outside_the_range_is_the_outermost_code() -> None:
    frozen = FrozenRange(torch.tensor(7.0), torch.tensor([0, 1], dtype=torch.uint8))
    x = torch.tensor([[100.0, 100.0], [-100.0, 1.2], [2.5, -1.25]])
    assert frozen_quantize(x, frozen, 4, 4, 1).codes.tolist() == [[7, 7], [-7, 2], [2, -2]]
    unsigned = FrozenRange(torch.tensor(15.0), torch.tensor([0, 0], dtype=torch.uint8), signed=False)
    assert frozen_quantize(x, unsigned, 4, 4, 1).codes.tolist() == [[15, 15], [0, 1], [2, 0]]


def test_a_range_of_zero_gives_zeros() -> None:
    frozen = FrozenRange.of(torch.zeros(3), 4)
    assert not frozen_quantize(torch.ones(2, 3), frozen, 4, 4, 1).codes.any()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 3), r"x of shape \(2, 3\) has 3 channels along axis 1, the frozen exponents are of 2"),
        (torch.tensor([[1.0, torch.nan]]), "x contains NaN or infinity"),
        (torch.ones(2, 2, dtype=torch.int32), "x must be floating"),
        (torch.ones(0, 2), r"x of shape \(0, 2\) has no elements"),
    ],
)
def test_frozen_quantize_refuses(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"frozen_quantize: {message}"):
        frozen_quantize(x, FrozenRange.of(torch.ones(2), 4), 4, 4, 1)


# --- freeze_ ----------------------------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 3)
        nn.init.eye_(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_ranges_are_those_of_the_batches(reduce: str) -> None:
    model = bs.integer_(TwoLayers(), torch.ones(1, 4), w=8, a=8, g=8)
    data = [torch.tensor([[8.0, 3.0, 0.9, 0.5], [-2.0, 0.0, 0.0, 0.0]]), torch.tensor([[4.0, 5.0, 0.9, 0.25]])]
    bs.freeze_(model, data, reduce=reduce)
    first, second = model.first.frozen, model.second.frozen
    assert float(first.range) == (6.0 if reduce == "mean" else 8.0)
    assert first.exponents.tolist() == [0, 0, 0, 0]  # the network's input has one step
    assert first.range.dtype == torch.float32
    # the second layer reads what the first has quantized
    seen = torch.stack([model.first.train()(x).detach().abs().amax(0) for x in data])
    ranges = seen.mean(0) if reduce == "mean" else seen.amax(0)
    assert float(second.range) == pytest.approx(float(ranges.max()), rel=1e-6)
    assert second.exponents.tolist() == ([0, 0, 2, 3] if reduce == "mean" else [0, 0, 3, 3])
    assert second.signed


def test_a_layer_that_runs_twice_in_a_batch_has_its_wider_range() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.last = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(x) + self.layer(3 * x))

    model = bs.integer_(Twice(), torch.ones(1, 2))
    bs.freeze_(model, [torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 4.0]])])
    assert float(model.layer.frozen.range) == 9.0


def test_evaluation_no_longer_depends_on_the_batch() -> None:
    model = trained()
    x = torch.cat(batches())
    with torch.no_grad():
        assert not torch.allclose(model(x)[:1], model(x[:1]))
        bs.freeze_(model, batches())
        torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-6, atol=1e-6)
        assert not torch.allclose(model(100 * x)[:1], model(x[:1]))
    assert all("frozen" in m.extra_repr() for m in freezable_layers(model).values())
    assert all(m.is_frozen and ", frozen" in repr(m) for m in model.modules() if isinstance(m, QuantizedL1BatchNorm2d))


def test_training_goes_on_as_if_it_were_not_frozen() -> None:
    plain, frozen = trained(), bs.freeze_(trained(), batches())
    x = batches()[0]
    found = []
    for model in (plain, frozen):
        y = model.train()(x)
        y.square().mean().backward()
        found.append([y, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert bs.prepare.noise_state(plain) == bs.prepare.noise_state(frozen)


def test_frozen_evaluation_has_gradients() -> None:
    model = bs.freeze_(trained(g=8), batches())
    x = batches()[0].requires_grad_()
    model(x).square().sum().backward()
    assert float(x.grad.abs().sum()) > 0
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert float(model.bn1.weight.grad.abs().sum()) > 0


def test_a_state_freezes_and_thaws() -> None:
    frozen = bs.freeze_(trained(), batches())
    x = batches(1)[0]
    state = frozen.state_dict()
    added = {key.rpartition(".")[2] for key in set(state) - set(trained().state_dict())}
    assert added == {"frozen_range", "frozen_exponents", "frozen_signed", "frozen"}
    plain = trained()
    fresh = network().eval()
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(fresh(x), frozen(x))
        fresh.load_state_dict(plain.state_dict())
        assert torch.equal(fresh(x), plain(x))
    assert all(layer.frozen is None for layer in freezable_layers(fresh).values())
    twin = copy.deepcopy(frozen)
    assert torch.equal(twin(x), frozen(x))


def test_a_frozen_model_resumes_exactly(tmp_path: Path) -> None:
    data = [(x, torch.arange(8)) for x in batches()]

    def trainer(model: nn.Module, epochs: int) -> bs.Trainer:
        config = bs.TrainConfig(epochs=epochs, lr=0.05, schedule="constant", distill=None)
        return bs.Trainer(model, config, data, data, out_dir=tmp_path)

    model = bs.freeze_(trained(), batches())
    trainer(model, 2).fit()
    again = bs.freeze_(trained(), batches())
    trainer(again, 2).fit()
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert all(layer.frozen is not None for layer in freezable_layers(again).values())


def test_other_number_formats_keep_the_range() -> None:
    model = bs.freeze_(trained(), batches())
    before = model.linear.frozen
    after = model.to(torch.bfloat16).linear.frozen
    assert after.range.dtype == torch.float32
    assert torch.equal(after.range, before.range)
    assert torch.equal(model.double().linear.frozen.exponents, before.exponents)


def test_nonnegative_inputs_get_unsigned_codes_if_they_are_to() -> None:
    model = bs.freeze_(trained(unsigned_nonneg=True), batches())
    signs = {name: layer.frozen.signed for name, layer in freezable_layers(model).items()}
    assert signs["conv1"]
    assert not signs["linear"]
    assert all(m.frozen.signed for m in freezable_layers(bs.freeze_(trained(), batches())).values())


@pytest.mark.parametrize("l2", [False, True])
def test_a_frozen_normalization_is_the_affine_map_that_fold_gives(l2: bool) -> None:
    norm = QuantizedL1BatchNorm2d(3, l2=l2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.4, 2.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, -3.0]))
    norm(spread(4, 3, 5, 5) * 3 + 1)
    norm.eval().freeze_()
    x = spread(2, 3, 4, 4, seed=4).double()
    gain, shift = fold(norm)
    torch.testing.assert_close(norm.double()(x), x * gain.view(-1, 1, 1) + shift.view(-1, 1, 1))
    codes = norm.affine_codes()
    assert torch.equal(codes.mean.codes, codes.mean.codes.round())
    norm.freeze_(False)
    with pytest.raises(TypeError, match="freeze_ the model first"):
        fold(norm)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: bs.freeze_(nn.Linear(2, 2), [torch.ones(1, 2)]), ValueError, "has no Linear or convolution that"),
        (lambda m: bs.freeze_(m, []), ValueError, "freeze_: no batches given"),
        (lambda m: bs.freeze_(m, torch.ones(2, 1, 8, 8)), TypeError, "freeze_: batches must be an iterable of batches"),
        (lambda m: bs.freeze_(m, [torch.ones(0, 1, 8, 8)]), ValueError, "freeze_: batch 0 has no elements"),
        (
            lambda m: bs.freeze_(m, [torch.full((1, 1, 8, 8), torch.nan)]),
            ValueError,
            "freeze_: 64 of 64 values of batch 0",
        ),
        (lambda m: bs.freeze_(m, batches(), reduce="min"), ValueError, "reduce must be one of mean, max, got 'min'"),
    ],
)
def test_freeze_refuses_and_changes_nothing(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    model = trained()
    with pytest.raises(error, match=message):
        call(model)
    assert all(layer.frozen is None for layer in freezable_layers(model).values())


def test_what_fails_on_the_way_leaves_the_former_ranges() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
            self.idle = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return y if self.idle else self.other(y / (x.sum() != 0))

    model = bs.integer_(Picky(), torch.ones(1, 2))
    bs.freeze_(model, [torch.ones(1, 2)])
    before = model.other.frozen.range
    with pytest.raises(ValueError, match=r"freeze_: the input of layer 'other' in batch 1: 2 of 2 values"):
        bs.freeze_(model, [torch.ones(1, 2) * 5, torch.tensor([[1.0, -1.0]])])
    model.idle = True
    with pytest.raises(ValueError, match=r"freeze_: layer 'other' did not run on the batches"):
        bs.freeze_(model, [torch.ones(1, 2) * 5])
    assert torch.equal(model.other.frozen.range, before)
