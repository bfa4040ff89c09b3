"""What a configuration makes the trainer compute, and that runs with every option resume to the same bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.objectives import cosine_distillation, joint_backward, kl_distillation, maqd
from bitstrata.train import CheckpointError, TrainConfig, Trainer


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(24) % 3
    return torch.randn(24, 6, generator=generator) + y.view(-1, 1).float() - 1, y


def batches() -> list[tuple[Tensor, Tensor]]:
    x, y = data()
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)]


def floating(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def network(seed: int = 1) -> nn.Module:
    model = floating(seed)
    bs.quantize_(model, bs.recipes.strata(w=(1, 2, 3)), data()[0])
    return bs.calibrate_(model, [data()[0]])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"loss": "maqd", "loss_gamma": 0.4}, {"loss": lambda z, y: maqd(z, y, gamma=0.4)}),
    ({"distill": None}, {"distill": None}),
    ({"distill": "kl"}, {"distill": "kl"}),
    (
        {"distill": "kl", "distill_temperature": 3.0, "distill_weight": 0.5},
        {"distill": lambda s, t: kl_distillation(s, t, temperature=3.0), "distill_weight": 0.5},
    ),
    ({"teacher": "widest"}, {"teacher": "widest"}),
    ({"combine": "mgd"}, {"combine": "mgd"}),
    ({"reduction": "sum"}, {"reduction": "sum"}),
    ({"precisions": (1, 3)}, {"precisions": (1, 3)}),
    ({"label_smoothing": 0.2}, {"loss": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2)}),
]


@pytest.mark.parametrize(("fields", "arguments"), OPTIONS)
def test_each_field_is_the_argument_it_names(fields, arguments):
    one, other, plain = network(), network(), network()
    x, y = data()
    Trainer(one, TrainConfig(**fields), batches()).objective(one, x, y)
    joint_backward(other, x, y, **arguments)
    joint_backward(plain, x, y)
    found, expected, default = gradients(one), gradients(other), gradients(plain)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    differs = any(not torch.allclose(found[name], default[name], rtol=1e-3) for name in found)
    assert differs or set(found) != set(default)


def test_the_maqd_loss_for_a_float_network():
    model, (x, y) = floating().eval(), data()
    result = Trainer(model, TrainConfig(loss="maqd", loss_gamma=0.3), batches()).objective(model, x, y)["float"]
    torch.testing.assert_close(result.loss, maqd(model(x), y, gamma=0.3).detach())


def test_a_teacher_of_its_own():
    model, teacher, (x, y) = network(), floating(9), data()
    twin = copy.deepcopy(model)
    result = Trainer(model, TrainConfig(), batches(), teacher=teacher).objective(model, x, y)
    for p, found in result.items():
        with bs.precision(twin, p):
            logits = twin(x)
        expected = F.cross_entropy(logits, y) + cosine_distillation(logits, teacher.eval()(x))
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    Trainer(model, TrainConfig(epochs=2, batch_size=8), batches(), teacher=teacher).fit()
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


def test_evaluation_covers_the_precisions_trained():
    config = TrainConfig(epochs=1, batch_size=8, precisions=(1, 3))
    trainer = Trainer(network(), config, batches(), batches())
    assert set(trainer.fit()) == {1, 3}
    assert set(trainer.evaluate((2,))) == {2}


@pytest.mark.parametrize(
    ("model", "config", "arguments", "message"),
    [
        (
            floating,
            {},
            {"teacher": nn.Linear(1, 1)},
            r"^Trainer: teacher is for a quantized network, and this one is float$",
        ),
        (floating, {"precisions": (1,)}, {}, r"^Trainer: precisions=\(1,\) is for a quantized network"),
        (floating, {"sampling": "sandwich"}, {}, r"^Trainer: sampling='sandwich' is for a quantized network"),
        (
            network,
            {"precisions": (1, 4)},
            {},
            r"^Trainer: precisions=\(1, 4\) must be among those of the model, \(1, 2, 3\)$",
        ),
        (
            network,
            {},
            {"teacher": nn.Linear(1, 1), "objective": joint_backward},
            r"give either an objective or a teacher",
        ),
    ],
)
def test_refusals(model, config, arguments, message):
    with pytest.raises(ValueError, match=message):
        Trainer(model(), TrainConfig(**config), batches(), **arguments)


# ---- the optimizer


def optimizer_of(**fields: Any) -> torch.optim.Optimizer:
    return Trainer(network(), TrainConfig(**fields), batches()).optimizer


def test_nesterov_momentum_is_an_option():
    assert optimizer_of().param_groups[0]["nesterov"] is True
    assert optimizer_of(nesterov=False).param_groups[0]["nesterov"] is False
    assert optimizer_of(momentum=0.0).param_groups[0]["nesterov"] is False
    assert isinstance(optimizer_of(optimizer="adam"), torch.optim.Adam)


def test_what_decays_is_an_option():
    counts = {}
    for decay in ("all", "weights"):
        groups = optimizer_of(decay=decay, weight_decay=0.1).param_groups
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        counts[decay] = len(groups[0]["params"])
    assert counts["weights"] == 3
    assert counts["all"] > 3


def test_the_warm_up_reaches_the_optimizer():
    config = TrainConfig(epochs=2, batch_size=8, lr=0.04, warmup=1, warmup_lr=0.01, schedule="cosine_epoch")
    seen: list[float] = []
    trainer = Trainer(network(), config, batches())
    objective = trainer.objective

    def watched(model: nn.Module, x: Tensor, y: Tensor):
        seen.extend(group["lr"] for group in trainer.optimizer.param_groups[:1])
        return objective(model, x, y)

    trainer.objective = watched
    trainer.fit()
    assert seen == pytest.approx([0.01] * 3 + [0.04] * 3)


# ---- exact resume


class InterruptError(Exception):
    pass


@pytest.mark.parametrize(
    "fields",
    [
        {"combine": "mgd", "distill": "kl", "teacher": "widest"},
        {"loss": "maqd", "reduction": "sum", "decay": "weights", "nesterov": False, "precisions": (1, 3)},
        {"schedule": "cosine_epoch", "warmup": 1, "warmup_lr": 0.01, "optimizer": "adam"},
        {"warmup": 2, "warmup_start": 0.5},
    ],
)
def test_interrupted_runs_end_in_the_same_bits(tmp_path: Path, fields):
    config = TrainConfig(epochs=3, lr=0.02, batch_size=8, checkpoint_every=2, clip_grad=5.0, **fields)
    whole, resumed = network(), network()
    teacher = floating(9) if config.teacher == "widest" else None
    Trainer(whole, config, batches(), teacher=teacher).fit()
    trainer = Trainer(resumed, config, batches(), out_dir=tmp_path, teacher=teacher)
    objective = trainer.objective

    def failing(model: nn.Module, x: Tensor, y: Tensor):
        if trainer.position.step == 5:
            raise InterruptError
        return objective(model, x, y)

    trainer.objective = failing
    with pytest.raises(InterruptError):
        trainer.fit()
    again = network(5)
    Trainer(again, config, batches(), out_dir=tmp_path, teacher=teacher).fit()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_resume_with_another_objective_is_an_error(tmp_path: Path):
    config = TrainConfig(epochs=1, batch_size=8)
    Trainer(network(), config, batches(), out_dir=tmp_path).fit()
    other = TrainConfig(epochs=1, batch_size=8, combine="mgd")
    with pytest.raises(CheckpointError, match=r"\(combine: 'scalarization' saved, 'mgd' now\)"):
        Trainer(network(), other, batches(), out_dir=tmp_path).fit()
