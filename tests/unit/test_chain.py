"""Warm start chains: what a stage takes over from the one before, what it does not, and resumption."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.objectives import warm_start_chain
from bitstrata.train import TrainConfig, Trainer, fit_chain

PIXELS = bs.Pixels((0.5, 0.4), (0.25, 0.2))
RECIPES = [bs.recipes.strata(w=(b,)) for b in (4, 2, 1)]


def floating(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3),
    )  # fmt: skip


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 2, 4, 4, generator=generator), torch.arange(24) % 3


def batches() -> list[tuple[Tensor, Tensor]]:
    x, y = data()
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_each_stage_starts_from_the_weights_of_the_one_before():
    model = floating()
    original = state(model)
    before: nn.Module = model
    widths, ends = [], {}
    for stage in warm_start_chain(model, RECIPES, data()[0], [data()[0]], input=PIXELS):
        for at in (0, 3, 7):
            assert torch.equal(stage.model[at].weight, before[at].weight)
        mine = stage.model[1].levels[str(stage.recipe.precisions[0])]
        theirs = before[1] if before is model else before[1].levels[str(widths[-1])]
        assert torch.equal(mine.weight, theirs.weight)
        fresh = copy.deepcopy(stage.model[3].weight_quant)
        fresh.init_(stage.model[3].weight)
        assert torch.equal(stage.model[3].weight_quant.step, fresh.step)
        assert stage.model[3].act_quant.is_initialized()
        widths.append(*stage.recipe.precisions)
        Trainer(stage.model, TrainConfig(epochs=1, lr=0.05, batch_size=8), batches()).fit()
        assert not torch.equal(stage.model[3].weight, before[3].weight)
        ends[stage.name] = stage.model
        before = stage.model
    assert widths == [4, 2, 1]
    assert list(ends) == ["0-4", "1-2", "2-1"]
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())


def test_a_chain_that_ends_in_several_precisions():
    *_, last = warm_start_chain(floating(), [RECIPES[0], bs.recipes.strata(w=(1, 2))], data()[0], [data()[0]])
    assert last.name == "1-1-2"
    assert bs.precisions(last.model) == (1, 2)


@pytest.mark.parametrize("taught", [False, True])
def test_a_chain_continues_to_the_same_bits(tmp_path: Path, taught, monkeypatch):
    model = floating()
    config = TrainConfig(epochs=1, lr=0.0005, batch_size=8, checkpoint_every=1)
    stages = [(recipe, config) for recipe in RECIPES]
    teacher = floating(5) if taught else None
    options = {"example": data()[0], "batches": [data()[0]], "teacher": teacher}
    whole = fit_chain(model, stages, batches(), **options)
    assert bs.precisions(whole) == (1,)
    step, steps = Trainer._step, []

    def failing(self: Trainer, *args: Tensor):
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(self.name)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", failing)
        with pytest.raises(KeyboardInterrupt):
            fit_chain(model, stages, batches(), out_dir=tmp_path, **options)
    assert steps == ["chain-0-4"] * 3 + ["chain-1-2"]
    again = fit_chain(model, stages, batches(), out_dir=tmp_path, **options)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    if taught:
        untaught = fit_chain(model, stages, batches(), **{**options, "teacher": None})
        assert not torch.equal(untaught[3].weight, whole[3].weight)


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ([], r"recipes must name at least one stage$"),
        ([bs.recipes.shiftquant()], r"recipe 'shiftquant' trains in integers, which has no warm start$"),
    ],
)
def test_chains_that_cannot_be(recipes, message):
    with pytest.raises(ValueError, match="^warm_start_chain: " + message):
        warm_start_chain(floating(), recipes, data()[0], [data()[0]])


def test_a_chain_starts_from_a_float_network():
    model = bs.quantize_(floating(), RECIPES[0], data()[0])
    with pytest.raises(ValueError, match=r"^warm_start_chain: the model is quantized already; a chain starts from a"):
        warm_start_chain(model, RECIPES, data()[0], [data()[0]])


def test_a_teacher_without_distillation():
    stages = [(RECIPES[0], TrainConfig(distill=None))]
    with pytest.raises(ValueError, match=r"^fit_chain: a teacher is given, but a stage has distill=None$"):
        fit_chain(floating(), stages, batches(), example=data()[0], batches=[], teacher=floating(1))
