"""Quantized models in loops that are not ours: what torch and trainers do to a model and its gradients."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import bitstrata as bs

BITS = (1, 2, 4)
Grads = dict[str, Tensor]


class Net(nn.Module):
    """Two convolutions and a linear layer, with batch normalization or without."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten())
        self.fc = nn.Linear(96, 5)
        self.again = False  # compute once more in the backward pass

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, self.second):
            x = checkpoint(part, x, use_reentrant=False) if self.again else part(x)
        return self.fc(x)


def prepared(norm: bool = True, seed: int = 0) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(seed)
    model, x, y = Net(norm), torch.randn(16, 1, 8, 8), torch.randint(0, 5, (16,))
    bs.quantize_(model, bs.recipes.strata(w=BITS), x, input=bs.Pixels((0.5,), (0.25,)))
    bs.calibrate_(model, [x])
    return model.train(), x, y


def gradients(model: nn.Module) -> Grads:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) >= 15
    model.zero_grad()
    return found


def assert_same(left: Grads, right: Grads) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def assert_close(left: Grads, right: Grads) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert float((value - right[name]).norm() / value.norm().clamp_min(1e-12)) < 1e-4, name


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.SGD(bs.parameter_groups(model, 1e-4), 0.05)
    bs.joint_backward(model, x, y)
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"distill": None}, {"reduction": "sum"}, {"combine": "mgd"}])
def test_joint_loss_has_the_gradients_of_joint_backward(options: dict[str, Any]) -> None:
    model, x, y = prepared()
    twin = copy.deepcopy(model)
    results = bs.joint_backward(twin, x, y, **options)
    wanted = gradients(twin)
    loss = bs.joint_loss(model, x, y, **options)
    assert all(p.grad is None for p in model.parameters())  # until backward
    loss.backward()
    assert_same(gradients(model), wanted)
    assert float(loss.detach()) == pytest.approx(sum(r.alpha * float(r.loss) for r in results.values()))


def test_joint_loss_scales_and_accumulates() -> None:
    model, x, y = prepared(norm=False)
    bs.joint_backward(model, x, y)
    once = gradients(model)
    for _ in range(2):
        (bs.joint_loss(model, x, y) / 4).backward()  # the second keeps and adds to what the first has left in .grad
    assert_close(gradients(model), {name: value / 2 for name, value in once.items()})
    with torch.no_grad():
        assert not bs.joint_loss(model, x, y).requires_grad


@pytest.mark.parametrize("through", ["joint_loss", "joint_backward"])
def test_micro_batches_equal_the_whole_batch(through: str) -> None:
    model, x, y = prepared(norm=False)
    bs.joint_backward(model, x, y)
    whole = gradients(model)
    bs.accumulate_(model, 4)
    for part in range(4):
        few = slice(4 * part, 4 * part + 4)
        if through == "joint_loss":
            (bs.joint_loss(model, x[few], y[few]) / 4).backward()
        else:
            quarter = lambda logits, labels: F.cross_entropy(logits, labels) / 4  # noqa: E731
            bs.joint_backward(model, x[few], y[few], loss=quarter, distill_weight=0.25)
    assert_close(gradients(model), whole)


def test_micro_batches_with_frozen_normalization() -> None:
    model, x, y = prepared()
    model.eval()
    bs.joint_backward(model, x, y)
    whole = gradients(model)
    bs.accumulate_(model, 2)
    for few in (slice(0, 8), slice(8, 16)):
        (bs.joint_loss(model, x[few], y[few]) / 2).backward()
    assert_close(gradients(model), whole)


def test_accumulation_is_checked() -> None:
    model, _, _ = prepared()
    with pytest.raises(ValueError, match="accumulate_: batches must be at least 1, got 0"):
        bs.accumulate_(model, 0)
    with pytest.raises(ValueError, match="accumulate_: the model has no quantized activations; call quantize_ first"):
        bs.accumulate_(Net(norm=True), 2)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, x, y = prepared(norm=False)
    bs.joint_backward(model, x, y)
    whole = gradients(model)
    for call in (bs.joint_backward, lambda *args: bs.joint_loss(*args).backward()):
        model.again = True
        call(model, x, y)
        assert_same(gradients(model), whole)


def test_autocast_leaves_float32_parameters_and_finite_gradients() -> None:
    model, x, y = prepared()
    with torch.autocast("cpu", torch.bfloat16):
        bs.joint_loss(model, x, y).backward()
    outside = gradients(model)
    bs.joint_backward(model, x, y, amp=torch.bfloat16)
    found = gradients(model)
    assert all(bool(torch.isfinite(g).all()) and g.dtype == torch.float32 for g in (*found.values(), *outside.values()))


def test_averaged_weights_lower_as_the_wrapper_and_as_the_network() -> None:
    model, x, y = prepared()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    before = {name: p.detach().clone() for name, p in averaged.module.named_parameters()}
    averaged.update_parameters(model)
    step(model, x, y)
    averaged.update_parameters(model)
    for name, p in model.named_parameters():
        expected = 0.5 * before[name] + 0.5 * p.detach()
        assert torch.allclose(dict(averaged.module.named_parameters())[name], expected, atol=1e-6), name
    for bits in BITS:
        with bs.precision(averaged, bits):
            update_bn(DataLoader(TensorDataset(x, y), 8), averaged)
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    inner = bs.lower(averaged.module.eval(), x)
    outer = bs.lower(averaged.eval(), x)
    assert set(outer.layers) == {f"module.{name}" for name in inner.layers}
    assert bs.verify(averaged, outer, images).ok


@pytest.mark.soak
def test_a_compiled_model_trains_and_lowers() -> None:
    model, x, y = prepared(norm=False)
    bs.joint_backward(model, x, y)
    wanted = gradients(model)
    compiled = torch.compile(model, backend="aot_eager")
    bs.joint_backward(compiled, x, y)
    assert_close(gradients(model), wanted)
    assert bs.lower(compiled.eval(), x).layers.keys() == bs.lower(model, x).layers.keys()


def test_outputs_that_are_no_logits() -> None:
    model, x, y = prepared()
    model.forward = lambda x: {"logits": x}  # type: ignore[assignment,method-assign]
    with pytest.raises(TypeError, match=r"joint_backward: the model returns a dict, expected one tensor of logits"):
        bs.joint_backward(model, x, y)
    with pytest.raises(TypeError, match=r"pack: program must be what lower\(model, example\) returns, got Net"):
        bs.pack(model, "never.strata")  # type: ignore[arg-type]


EXAMPLE = torch.rand(4, 1, 8, 8)


@pytest.mark.parametrize(
    ("example", "remedy"),
    [
        (EXAMPLE[0], r"shape \(1, 8, 8\); the first dimension is the batch: give x\[None\]"),
        ((EXAMPLE * 255).to(torch.uint8), r"uint8 of shape .*; give floats as the model reads them"),
        ((EXAMPLE, torch.zeros(4, dtype=torch.int64)), "the second looks like labels: give the inputs alone"),
        (EXAMPLE.numpy(), "ndarray; give torch tensors"),
    ],
)
def test_examples_on_which_a_model_does_not_run(example: Any, remedy: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        bs.quantize_(Net(norm=True), bs.recipes.strata(), example)
    assert re.search(remedy, "".join(caught.value.__notes__))


def test_pixels_take_one_number_and_warn_of_other_units() -> None:
    assert bs.Pixels(0.5, 0.25) == bs.Pixels((0.5,), (0.25,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \(123\.0,\) and \(58\.0,\); they are of pixel / 255"):
        bs.Pixels((123.0,), (58.0,))
    with pytest.warns(UserWarning, match=r"the example stands for pixels from \d+ to \d{5}, not 0 to 255"):
        bs.quantize_(Net(norm=True), bs.recipes.strata(), EXAMPLE * 255, input=bs.Pixels((0.0,), (1.0,)))


def test_copies_are_whole_and_apart() -> None:
    model, x, y = prepared()
    step(model, x, y)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in copies:
        for bits in BITS:
            bs.set_precision(twin, bits)  # the copy's normalizations follow the copy's layers
            norm = next(m for m in twin.modules() if isinstance(m, bs.PrecisionBatchNorm))
            assert norm.precision == bits
            with bs.precision(model, bits):
                assert torch.equal(twin.eval()(x), model.eval()(x))
        assert next(m for m in model.modules() if isinstance(m, bs.PrecisionBatchNorm)).precision == BITS[-1]


FRESH = """
import sys
import torch
import bitstrata as bs
sys.path.insert(0, sys.argv[1])
from test_own_loop import Net, prepared
model, _, _ = prepared(seed=7)
state = torch.load(sys.argv[2], weights_only=True)
model.load_state_dict(state["model"])
optimizer = torch.optim.AdamW(bs.parameter_groups(model, 1e-2), 1e-3)
optimizer.load_state_dict(state["optimizer"])
bs.joint_backward(model, state["x"], state["y"])
optimizer.step()
torch.save(model.state_dict(), sys.argv[3])
"""


def test_state_goes_on_in_another_process(tmp_path: Path) -> None:
    model, x, y = prepared()
    optimizer = torch.optim.AdamW(bs.parameter_groups(model, 1e-2), 1e-3)
    bs.joint_backward(model, x, y)
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "x": x, "y": y}
    torch.save(state, tmp_path / "state.pt")
    optimizer.zero_grad()
    bs.joint_backward(model, x, y)
    optimizer.step()
    files = [str(Path(__file__).parent), str(tmp_path / "state.pt"), str(tmp_path / "next.pt")]
    done = subprocess.run([sys.executable, "-c", FRESH, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "next.pt", weights_only=True)
    mine = model.state_dict()
    assert theirs.keys() == mine.keys()
    for key, value in mine.items():
        assert torch.allclose(value, theirs[key], rtol=1e-5, atol=1e-7), key  # threads may differ


def test_loaders_with_workers_and_schedules() -> None:
    model, x, y = prepared()
    loader = DataLoader(TensorDataset(x, y), 8, num_workers=1)
    bs.calibrate_(model, loader)  # takes the inputs of the pairs
    optimizer = torch.optim.SGD(bs.parameter_groups(model, 1e-4), 0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=2)
    for images, labels in loader:
        optimizer.zero_grad()
        bs.joint_backward(model, images, labels)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        assert float(norm) > 1e-3
        assert sum(float(p.grad.norm() ** 2) for p in model.parameters() if p.grad is not None) <= 1.1e-6
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.05)] * 2
