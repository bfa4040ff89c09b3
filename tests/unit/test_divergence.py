"""Numbers that stop being finite: the error names layer, tensor, direction, precision and step; steps left out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.train import TrainConfig, Trainer
from bitstrata.train.divergence import StepSizes, gradient_norm, trace
from bitstrata.train.metrics import read


class BadBackward(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


class Plant(nn.Module):
    """The identity until it is told to fail: at a step of a trainer, in one direction, at one precision."""

    def __init__(self) -> None:
        super().__init__()
        self.trainer: Trainer | None = None
        self.when: tuple[int, ...] = ()
        self.way = ""
        self.level: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.trainer is None or self.trainer.position.step not in self.when or not self.training:
            return x
        if self.level is not None and self.level not in {layer.precision for layer in quantized(self.trainer.model)}:
            return x
        return BadBackward.apply(x) if self.way == "backward" else x.masked_fill(x > -1e9, torch.inf)


def quantized(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "weight_quant")]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), Plant(), nn.Dropout(0.1), nn.Linear(8, 3)
    )


def joint() -> nn.Module:
    model = network()
    x = batches()[0][0]
    bs.quantize_(model, bs.recipes.strata(w=(1, 2, 3)), x)
    return bs.calibrate_(model, [x])


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(24) % 3
    x = torch.randn(24, 6, generator=generator) + y.view(-1, 1).float() - 1
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)]


def planted(model: nn.Module, way: str, when: tuple[int, ...], level: int | None = None, **options: Any) -> Trainer:
    out = options.pop("out", None)
    trainer = Trainer(model, TrainConfig(epochs=3, lr=0.01, batch_size=8, **options), batches(), out_dir=out)
    plant = next(module for module in model.modules() if isinstance(module, Plant))
    plant.trainer, plant.way, plant.when, plant.level = trainer, way, when, level
    return trainer


def message_of(trainer: Trainer) -> str:
    with pytest.raises(FloatingPointError) as caught:
        trainer.fit()
    return str(caught.value)


@pytest.mark.parametrize("make", [network, joint])
def test_a_weight_that_is_not_finite(make):
    model = make()
    trainer = planted(model, "", ())
    with torch.no_grad():
        model[5].weight[0, 0] = torch.nan
    message = message_of(trainer)
    level = "precision 3" if make is joint else "float precision"
    assert "Trainer: step 0: the loss at precision" in message
    assert f"first in the forward pass at {level}: the weight of layer '5' is not finite" in message
    assert "lower lr=0.01 or set clip_grad" in message


def test_an_infinite_weight_that_its_grid_hides_never_gets_into_a_checkpoint(tmp_path: Path):
    model = joint()
    trainer = planted(model, "", (), out=tmp_path, weight_decay=0.0)
    with torch.no_grad():
        model[5].weight[0, 0] = torch.inf
    assert "after step 3, the weight of layer '5' is not finite" in message_of(trainer)
    assert not (tmp_path / "train.ckpt").exists()


def test_a_step_size_that_is_not_finite():
    model = joint()
    trainer = planted(model, "", ())
    with torch.no_grad():
        model[5].act_quant.step.fill_(torch.nan)
    assert "the step size 'steps.shared' of quantizer '5.act_quant' is not finite" in message_of(trainer)


def test_a_batch_that_is_not_finite():
    trainer = planted(network(), "", ())
    trainer.train_loader.batches[1][0][0, 0] = torch.nan  # type: ignore[attr-defined]
    assert "step 1: the loss at precision float is nan; the batch itself holds values that are" in message_of(trainer)


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_forward_of_a_layer(clip_grad):
    message = message_of(planted(network(), "forward", (4,), clip_grad=clip_grad))
    assert "step 4: the loss at precision float is nan; first in the forward pass at float precision" in message
    assert "the output of layer '3' is not finite, from a finite input and finite parameters" in message


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_backward_of_a_layer(clip_grad):
    message = message_of(planted(network(), "backward", (4,), clip_grad=clip_grad))
    assert "step 4: the norm of the gradients is nan; first in the backward pass at float precision: the" in message
    assert "the gradient of the input of layer '3', which gives it to layer '2', is not finite" in message


@pytest.mark.parametrize(
    ("way", "found"), [("forward", "the output of layer '3'"), ("backward", "the input of layer '3'")]
)
@pytest.mark.parametrize("combine", ["scalarization", "mgd"])
def test_one_precision_of_joint_training(way, found, combine):
    message = message_of(planted(joint(), way, (3,), level=2, combine=combine))
    assert f"first in the {way} pass at precision 2: " in message
    assert found in message
    assert message.startswith("Trainer: step 3: ")


def test_a_gradient_from_the_loss():
    model = network()

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        logits = model(x)
        loss = (logits - logits.detach()).norm()  # 0, where the norm has no gradient but torch's is 0
        loss = loss + (logits.sum() - logits.sum().detach()).sqrt()  # 0, with an infinite gradient
        loss.backward()
        return {"float": type("Loss", (), {"loss": loss.detach(), "logits": logits})}

    trainer = Trainer(model, TrainConfig(epochs=1, batch_size=8), batches(), objective=objective)
    assert "the gradient that layer '5' receives from the loss, or from an operation that is no layer," in message_of(
        trainer
    )


def test_weights_are_those_of_before_the_step_and_its_run_is_repeated_exactly():
    model = network()
    trainer = planted(model, "forward", (4,))
    before: list[Tensor] = []
    seen: list[Tensor] = []
    objective = trainer.objective

    def watched(model: nn.Module, x: Tensor, y: Tensor) -> Any:
        before[:] = [p.detach().clone() for p in model.parameters()]
        seen.append(torch.get_rng_state())
        return objective(model, x, y)

    trainer.objective = watched
    message_of(trainer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(seen) == 6  # steps 0 to 4, and 4 once more
    assert torch.equal(seen[-1], seen[-2])


def test_errors_about_something_else_stay_what_they_are():
    trainer = planted(network(), "", ())

    def objective(*_: Any) -> Any:
        raise ValueError("my own")

    trainer.objective = objective
    with pytest.raises(ValueError, match=r"^my own$"):
        trainer.fit()


@pytest.mark.parametrize("make", [network, joint])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_steps_are_left_out_and_counted(make, way, tmp_path: Path):
    model = make()
    trainer = planted(model, way, (2, 5, 6), on_nonfinite="skip", out=tmp_path, checkpoint_every=1)
    trainer.fit()
    assert (trainer.position.step, trainer.position.skipped, trainer.position.in_a_row) == (9, 3, 0)
    skipped = [event for event in read(tmp_path / "metrics.jsonl") if event["event"] == "skipped"]
    assert [event["step"] for event in skipped] == [3, 6, 7]
    assert f"first in the {way} pass" in skipped[0]["reason"]
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values() if value.is_floating_point())


def test_a_step_left_out_changes_neither_weights_nor_statistics():
    model = network()
    trainer = planted(model, "forward", (4,), on_nonfinite="skip")
    states: list[dict[str, Tensor]] = []
    step = trainer._step

    def watched(images: Tensor, labels: Tensor) -> Any:
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return step(images, labels)

    trainer._step = watched  # type: ignore[method-assign]
    trainer.fit()
    assert all(torch.equal(value, states[5][name]) for name, value in states[4].items())
    assert any(not torch.equal(value, states[6][name]) for name, value in states[5].items())


def test_too_many_in_a_row_are_an_error():
    trainer = planted(network(), "forward", (3, 4, 5), on_nonfinite="skip", nonfinite_limit=3)
    assert "step 5 (3 in a row): the loss" in message_of(trainer)


def test_an_exploded_step_size_is_an_error_and_one_below_zero_a_warning():
    model = joint()
    watch = StepSizes(model)
    assert watch.problem() == ""
    with torch.no_grad():
        model[0].weight_quant.step.fill_(-0.5)
    with pytest.warns(UserWarning, match=r"the step size 'step' of quantizer '0\.weight_quant' is -0\.5 and no longer"):
        assert watch.problem() == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watch.problem() == ""  # warned already
    with torch.no_grad():
        model[5].act_quant.step.mul_(2e4)
    assert watch.problem().startswith("the step size 'steps.shared' of quantizer '5.act_quant' has grown from ")


def test_exploded_step_sizes_never_get_into_a_checkpoint(tmp_path: Path):
    model = joint()
    trainer = planted(model, "", (), out=tmp_path, checkpoint_every=2)
    objective = trainer.objective

    def explode(model: nn.Module, x: Tensor, y: Tensor) -> Any:
        if trainer.position.step == 3:
            with torch.no_grad():
                model[5].weight_quant.step.mul_(1e6)
        return objective(model, x, y)

    trainer.objective = explode
    assert "after step 4, the step size 'step' of quantizer '5.weight_quant' has grown" in message_of(trainer)
    saved = bs.train.checkpoint.load(tmp_path / "train.ckpt")
    assert saved["position"]["step"] == 3  # the end of the first epoch


def test_the_norm_of_all_gradients():
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(1, 1)])
    for p in [*model[0].parameters(), *model[1].parameters()]:
        p.grad = torch.randn_like(p)
    expected = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    assert gradient_norm(model.parameters()) == pytest.approx(expected, rel=1e-6)
    assert gradient_norm([]) == 0.0
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    assert gradient_norm(table.parameters()) == pytest.approx(8**0.5)


def test_nothing_is_found_where_all_is_finite_and_no_hook_stays():
    model, (x, y) = joint(), batches()[0]
    counts = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert trace(model, lambda: bs.objectives.joint_backward(model, x, y)) is None
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == counts
    assert not any(p._backward_hooks for p in model.parameters())
