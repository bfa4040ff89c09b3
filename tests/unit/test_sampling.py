"""Precisions sampled a step: draws that a counter determines, gradients that are right on average, exact resume."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.objectives import PrecisionSampler, cosine_distillation, joint_backward
from bitstrata.train import TrainConfig, Trainer

WIDTHS = (1, 2, 3, 4)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(24) % 3
    return torch.randn(24, 6, generator=generator, dtype=torch.float64) + y.view(-1, 1).double() - 1, y


def batches() -> list[tuple[Tensor, Tensor]]:
    x, y = data()
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)]


def network(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model = nn.Sequential(*layers).double()
    bs.quantize_(model, bs.recipes.strata(w=WIDTHS), data()[0])
    return bs.calibrate_(model, [data()[0]])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def owners(model: nn.Module) -> dict[str, int]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(q)]: p for p, group in bs.precision_parameters(model).items() for q in group}


# ---- draws


def test_all_is_every_precision_widest_first():
    assert list(PrecisionSampler((2, 1, 4)).at(7).items()) == [(4, 1.0), (2, 1.0), (1, 1.0)]


@pytest.mark.parametrize(
    ("precisions", "sampling"), [((3,), "sandwich"), ((1, 8), "sandwich"), ((1, 8), "pair"), ((2,), "pair")]
)
def test_where_there_is_no_choice_all_are_trained(precisions, sampling):
    assert PrecisionSampler(precisions, sampling).at(0) == dict.fromkeys(precisions, 1.0)


def test_a_pair_is_the_widest_and_one_more():
    samples = [PrecisionSampler(WIDTHS, "pair").at(step) for step in range(60)]
    assert {tuple(sample) for sample in samples} == {(4, 1), (4, 2), (4, 3)}
    assert all(list(sample.values()) == [1.0, 3.0] for sample in samples)


def test_a_sandwich_is_both_ends_and_one_between():
    sampler = PrecisionSampler((1, 2, 3, 4, 8), "sandwich", seed=3)
    drawn: Counter[int] = Counter()
    for step in range(3000):
        sample = sampler.at(step)
        widest, middle, narrowest = sample
        assert (widest, narrowest) == (8, 1)
        assert list(sample.values()) == [1.0, 3.0, 1.0]
        drawn[middle] += 1
    assert set(drawn) == {2, 3, 4}
    assert all(abs(count - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for count in drawn.values())  # five standard deviations


def test_a_draw_depends_on_seed_and_step_alone():
    middles = [list(PrecisionSampler(WIDTHS, "sandwich", seed=0).at(step))[1] for step in range(16)]
    assert middles == DRAWS_OF_SEED_0
    assert [list(PrecisionSampler(WIDTHS, "sandwich").at(step))[1] for step in reversed(range(16))] == middles[::-1]
    others = {tuple(list(PrecisionSampler(WIDTHS, "sandwich", s).at(t))[1] for t in range(16)) for s in (1, 2, -1)}
    assert len(others | {tuple(middles)}) == 4


DRAWS_OF_SEED_0 = [3, 2, 3, 3, 2, 2, 3, 2, 3, 2, 2, 3, 3, 3, 3, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((),), r"precisions must be one or more different ones, got \(\)$"),
        (((2, 1, 2),), r"precisions must be one or more different ones, got \(1, 2, 2\)$"),
        (((1, 2), "some"), r"sampling must be one of \('all', 'sandwich', 'pair'\), got 'some'$"),
    ],
)
def test_samplers_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match="^PrecisionSampler: " + message):
        PrecisionSampler(*arguments)


def test_steps_before_the_first():
    with pytest.raises(ValueError, match=r"^PrecisionSampler: step must not be negative, got -1$"):
        PrecisionSampler(WIDTHS).at(-1)


# ---- gradients


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_shared_gradient_is_right_on_average(reduction):
    """Over the two draws, each of probability one half, the shared gradient has the full one as its mean."""
    whole, (x, y) = network(), data()
    own = owners(whole)
    samples = []
    for middle in (2, 3):
        model = copy.deepcopy(whole)
        result = joint_backward(
            model, x, y, distill=None, precisions={1: 1.0, middle: 2.0, 4: 1.0}, reduction=reduction
        )
        unit = 0.25 if reduction == "mean" else 1.0
        assert {p: r.alpha for p, r in result.items()} == {4: unit, middle: 2 * unit, 1: unit}
        samples.append(gradients(model))
    joint_backward(whole, x, y, distill=None, reduction=reduction)
    for name, gradient in gradients(whole).items():
        if name in own:
            found = [s[name] for s in samples if name in s]
            assert len(found) == (1 if own[name] in (2, 3) else 2)
            for sample in found:
                torch.testing.assert_close(sample, gradient, rtol=1e-12, atol=1e-14)
        else:
            mean = (samples[0][name] + samples[1][name]) / 2
            torch.testing.assert_close(mean, gradient, rtol=1e-10, atol=1e-14)


def test_the_next_teacher_is_the_next_of_those_sampled():
    model, (x, y) = network(), data()
    logits = {}
    for p in (4, 2, 1):
        with bs.precision(copy.deepcopy(model), p) as twin:
            logits[p] = twin(x).detach()
    result = joint_backward(model, x, y, precisions={1: 1.0, 2: 2.0, 4: 1.0})
    for p, teacher in ((2, 4), (1, 2)):
        expected = F.cross_entropy(logits[p], y) + cosine_distillation(logits[p], logits[teacher])
        assert result[p].loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert result[4].loss.item() == pytest.approx(F.cross_entropy(logits[4], y).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precisions": {1: 1.0, 5: 1.0}}, r"precisions must be among \(1, 2, 3, 4\), got \(1, 5\)$"),
        ({"precisions": {}}, r"precisions must be among \(1, 2, 3, 4\), got \(\)$"),
        ({"precisions": {1: 0.0}}, r"the weight of precision 1 must be positive, got 0\.0$"),
        ({"precisions": {1: float("inf")}}, r"the weight of precision 1 must be positive, got inf$"),
        ({"precisions": {1: 1.0, 2: 2.0}, "combine": "mgd"}, r"combine='mgd' chooses the factors itself, so weights"),
    ],
)
def test_weights_that_cannot_be(options, message):
    model, (x, y) = network(), data()
    with pytest.raises(ValueError, match="^joint_backward: " + message):
        joint_backward(model, x, y, **options)
    assert gradients(model) == {}


# ---- training


def test_a_precision_that_is_not_drawn_stays_as_it_is():
    """No momentum, no decay and no batch statistics move what belongs to it."""
    model, (x, y) = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for sample in ({4: 1.0, 3: 2.0, 1: 1.0}, {4: 1.0, 2: 2.0, 1: 1.0}):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        joint_backward(model, x, y, precisions=sample)
        optimizer.step()
        names = [name for name, p in owners(model).items() if p not in sample]
        names += [name for name in before if f"levels.{next(iter({2, 3} - set(sample)))}." in name]
        assert any("running_mean" in name for name in names)
        assert any("steps" in name for name in names)
        for name in names:
            assert torch.equal(model.state_dict()[name], before[name]), name
        assert not torch.equal(model.state_dict()["3.weight"], before["3.weight"])


def test_the_trainer_follows_the_sampler(tmp_path: Path):
    config = TrainConfig(epochs=2, batch_size=8, sampling="sandwich", seed=4, log_every=1)
    Trainer(network(), config, batches(), batches(), out_dir=tmp_path).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    expected = [PrecisionSampler(WIDTHS, "sandwich", 4).at(step) for step in range(6)]
    assert [{int(p) for p in line["loss"]} for line in steps] == [set(sample) for sample in expected]
    for epoch in (line for line in lines if line["event"] == "epoch"):
        for p, mean in epoch["loss"].items():
            values = [line["loss"][p] for line in steps if line["epoch"] == epoch["epoch"] and p in line["loss"]]
            assert mean == pytest.approx(sum(values) / len(values))
    assert all(set(line["accuracy"]) == {"1", "2", "3", "4"} for line in lines if line["event"] == "eval")


class InterruptError(Exception):
    pass


def test_interrupted_runs_draw_the_same(tmp_path: Path):
    config = TrainConfig(epochs=3, lr=0.02, batch_size=8, checkpoint_every=2, sampling="sandwich", seed=2)
    whole = network()
    Trainer(whole, config, batches()).fit()
    trainer = Trainer(network(), config, batches(), out_dir=tmp_path)
    objective = trainer.objective

    def failing(model: nn.Module, x: Tensor, y: Tensor):
        if trainer.position.step == 5:
            raise InterruptError
        return objective(model, x, y)

    trainer.objective = failing
    with pytest.raises(InterruptError):
        trainer.fit()
    again = network(5)
    Trainer(again, config, batches(), out_dir=tmp_path).fit()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_sandwich_has_no_place_in_multiple_gradient_descent():
    with pytest.raises(ValueError, match=r"^TrainConfig: sampling='sandwich' cannot be with combine='mgd'"):
        TrainConfig(sampling="sandwich", combine="mgd")
