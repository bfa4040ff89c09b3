"""Schemes of training several widths: what each stage trains, freezes and starts from."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.objectives import (
    Stage,
    ascending_stages,
    copy_norms_,
    cotrain,
    joint_backward,
    top_then_finetune,
    warm_start_,
)
from bitstrata.recipes import Part, Recipe
from bitstrata.train import TrainConfig, Trainer

WIDTHS = (2, 3, 4)


def ascending() -> Recipe:
    return dataclasses.replace(
        bs.recipes.strata(w=WIDTHS), weight=Part("ascending", "weight"), activation=Part("lsq", "activation")
    )


def floating(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 3),
    )


def data(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(count) % 3
    return torch.randn(count, 2, 4, 4, generator=generator) + y.view(-1, 1, 1, 1).float() - 1, y


def network(recipe: Recipe | None = None, seed: int = 0) -> nn.Module:
    model = floating(seed)
    bs.quantize_(model, recipe or ascending(), data()[0])
    return bs.calibrate_(model, [data()[0]])


def names(model: nn.Module, parameters: tuple[nn.Parameter, ...]) -> set[str]:
    known = {id(p): name for name, p in model.named_parameters()}
    return {known[id(p)] for p in parameters}


def own(model: nn.Module, p: int) -> set[str]:
    return names(model, tuple(bs.precision_parameters(model)[p]))


def answers(model: nn.Module, p: int) -> Tensor:
    mode = model.training
    with bs.precision(model.eval(), p), torch.no_grad():
        result = model(data()[0])
    model.train(mode)
    return result


def train(model: nn.Module, stage: Stage, steps: int = 25, lr: float = 0.05) -> list[float]:
    optimizer = torch.optim.SGD(stage.parameters, lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        result = joint_backward(model, *data(), distill=None, precisions=[stage.precision])
        losses.append(result[stage.precision].loss.item())
        optimizer.step()
    return losses


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


# ---- ascending layers


def test_ascending_stages_train_one_plane_after_the_other():
    model = network()
    seen = [(stage.precision, names(model, stage.parameters)) for stage in ascending_stages(model)]
    assert [p for p, _ in seen] == [2, 3, 4]
    everything = {name for name, _ in model.named_parameters()}
    planes = {"3.weight_quant.planes.3", "3.weight_quant.planes.4"}
    assert planes <= everything
    assert seen[0][1] == everything - planes - own(model, 3) - own(model, 4)
    assert {"3.weight", "3.weight_quant.step", "0.weight", "7.bias", "0.act_quant.steps.shared"} <= seen[0][1]
    assert seen[1][1] == {"3.weight_quant.planes.3"} | own(model, 3)
    assert seen[2][1] == {"3.weight_quant.planes.4"} | own(model, 4)
    assert {"4.levels.3.weight", "3.act_quant.steps.3"} <= seen[1][1]


def test_narrower_models_are_untouched_by_later_stages():
    model = network().train()
    found: dict[int, Tensor] = {}
    for stage in ascending_stages(model):
        losses = train(model, stage)
        assert losses[-1] < losses[0]
        for p, logits in found.items():
            assert torch.equal(answers(model, p), logits)
        found[stage.precision] = answers(model, stage.precision)
    assert set(found) == set(WIDTHS)
    codes = {}
    for p in WIDTHS:
        with bs.precision(model, p):
            codes[p] = model[3].weight_quant.codes(model[3].weight)
    assert torch.equal(codes[4] >> 1, codes[3])
    assert torch.equal(codes[4] >> 2, codes[2])


def test_a_model_trained_in_stages_becomes_a_program():
    model = network().train()
    for stage in ascending_stages(model):
        train(model, stage, steps=5)
    model.double().eval()
    x = data(4)[0].double()
    report = bs.verify(model, bs.lower(model, x), x)
    assert report.ok, report
    assert set(report.logit_error) == set(WIDTHS)


def test_a_stage_changes_what_it_names_and_nothing_else():
    model = network().train()
    stages = ascending_stages(model)
    train(model, next(stages), steps=3)
    stage = next(stages)
    before = snapshot(model)
    train(model, stage, steps=3)
    statistics = {f"{n}.levels.3.{s}" for n in (1, 4) for s in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed(model, before) == names(model, stage.parameters) | statistics
    stages.close()


def test_planes_and_normalizations_start_from_the_stage_before():
    model = network().train()
    stages = ascending_stages(model)
    train(model, next(stages))
    next(stages)
    fresh = copy.deepcopy(model[3].weight_quant)
    fresh.start_planes_(model[3].weight.detach(), 3)
    assert torch.equal(fresh.planes["3"], model[3].weight_quant.planes["3"])
    assert torch.equal(model[4].levels["3"].running_mean, model[4].levels["2"].running_mean)
    assert torch.equal(model[4].levels["3"].weight, model[4].levels["2"].weight)
    stages.close()


def test_restart_false_leaves_planes_and_normalizations():
    model = network().train()
    stages = ascending_stages(model, restart=False)
    train(model, next(stages))
    before = snapshot(model)
    next(stages)
    assert changed(model, before) == set()
    stages.close()


def both_generators(model: nn.Module) -> Iterator[Iterator[Stage]]:
    yield ascending_stages(model)
    yield top_then_finetune(model)


@pytest.mark.parametrize("ending", ["exhausted", "closed"])
def test_requires_grad_comes_back(ending):
    model = network()
    model[0].weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for stages in both_generators(model):
        for stage in stages:
            assert "0.weight" not in names(model, stage.parameters)
            assert all(p.requires_grad for p in stage.parameters)
            assert sum(p.requires_grad for p in model.parameters()) == len(stage.parameters)
            if ending == "closed":
                stages.close()
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_gradients_of_the_stage_before_do_not_reach_frozen_parameters():
    model = network().train()
    for stage in ascending_stages(model):
        assert all(p.grad is None for p in model.parameters())
        joint_backward(model, *data(), distill=None, precisions=[stage.precision])


def test_stages_with_the_trainer(tmp_path):
    x, y = data()
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)]

    def run() -> nn.Module:
        model = network().train()
        for stage in ascending_stages(model):
            config = TrainConfig(
                epochs=2, lr=0.02, batch_size=8, distill=None, precisions=(stage.precision,), weight_decay=0.01
            )
            trainer = Trainer(model, config, batches, batches, tmp_path, name=f"stage-{stage.precision}")
            assert set(trainer.fit()) == {stage.precision}
        return model

    first, again = run(), run()  # the second run finds every stage finished and takes its result
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_ascending_needs_planes():
    with pytest.raises(
        ValueError, match=r"^ascending_stages: no layer has bit-planes to learn; quantize with 'ascending'"
    ):
        next(ascending_stages(network(bs.recipes.strata(w=WIDTHS))))
    with pytest.raises(
        ValueError, match=r"^ascending_stages: the model has no quantized layers; call quantize_ first$"
    ):
        next(ascending_stages(floating()))


# ---- the widest alone, then fine-tuning


def test_top_then_finetune_trains_shared_weights_once():
    model = network(bs.recipes.strata(w=WIDTHS))
    seen = [(stage.precision, names(model, stage.parameters)) for stage in top_then_finetune(model)]
    assert [p for p, _ in seen] == [4, 3, 2]
    everything = {name for name, _ in model.named_parameters()}
    assert seen[0][1] == everything - own(model, 3) - own(model, 2)
    assert seen[1][1] == own(model, 3)
    assert seen[2][1] == own(model, 2)
    assert "3.weight_quant.ratios.3" in seen[1][1]


def test_fine_tuning_leaves_wider_models_and_the_planes():
    model = network(bs.recipes.strata(w=WIDTHS)).train()
    found: dict[int, Tensor] = {}
    for stage in top_then_finetune(model):
        if found:
            wider = stage.precision + 1
            for key in ("weight", "running_var"):
                source, target = (getattr(model[4].levels[str(p)], key) for p in (wider, stage.precision))
                assert torch.equal(source, target)
            weights = [model[n].weight.clone() for n in (0, 3, 7)]
        losses = train(model, stage)
        assert losses[-1] < losses[0]
        if found:
            assert all(torch.equal(w, model[n].weight) for w, n in zip(weights, (0, 3, 7), strict=True))
        for p, logits in found.items():
            assert torch.equal(answers(model, p), logits)
        found[stage.precision] = answers(model, stage.precision)


def test_copy_norms_false_leaves_them():
    model = network(bs.recipes.strata(w=WIDTHS)).train()
    stages = top_then_finetune(model, copy_norms=False)
    train(model, next(stages), steps=2)
    before = snapshot(model)
    next(stages)
    assert changed(model, before) == set()
    stages.close()


def test_fine_tuning_needs_nested_codes():
    model = network(bs.recipes.strata(w=WIDTHS))
    model[3].weight_quant.nested = False
    with pytest.raises(
        ValueError,
        match=r"^top_then_finetune: narrower codes of layer '3' are not the upper bits of the widest \(Nested",
    ):
        next(top_then_finetune(model))


def test_copy_norms_refuses_a_precision_that_is_not_there():
    with pytest.raises(ValueError, match=r"^copy_norms_: '1' has no precision 5; it has \['2', '3', '4'\]$"):
        copy_norms_(network(), 2, 5)


@pytest.mark.parametrize("scheme", [ascending_stages, top_then_finetune])
def test_statistics_that_all_precisions_share_are_refused(scheme):
    with pytest.raises(
        ValueError, match=rf"^{scheme.__name__}: all precisions share the normalization '1', so training"
    ):
        next(scheme(network(dataclasses.replace(ascending(), norm_levels="shared"))))


def test_a_shared_affine_is_frozen_after_the_first_stage():
    model = network(dataclasses.replace(ascending(), norm_levels="statistics")).train()
    first, second, _ = [names(model, stage.parameters) for stage in ascending_stages(model)]
    assert {name for name in first if name.startswith("4.levels")}
    assert not {name for name in second if name.startswith("4.levels")}


def test_a_rescaled_quantizer_has_the_planes_that_it_wraps():
    model = network(dataclasses.replace(ascending(), rescale=Part("constant", "rescale", {"convs": "all"})))
    stages = [names(model, stage.parameters) for stage in ascending_stages(model)]
    assert ["3.weight_quant.inner.planes.3" in group for group in stages] == [False, True, False]


# ---- co-training and AdaBits


@pytest.mark.parametrize("recipe", [ascending(), bs.recipes.strata(w=WIDTHS), bs.recipes.get("adabits")])
def test_cotraining_is_the_plain_sum_of_the_losses(recipe):
    model, (x, y) = network(recipe).train(), data()
    twin = copy.deepcopy(model)
    result = cotrain(model, x, y)
    total = torch.zeros(())
    for p in sorted(recipe.precisions, reverse=True):
        bs.set_precision(twin, p)
        total = total + F.cross_entropy(twin(x), y)
    total.backward()
    assert sum(r.loss.item() for r in result.values()) == pytest.approx(total.item(), rel=1e-6)
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_cotraining_reaches_every_plane_from_every_wider_precision():
    model, (x, y) = network().train(), data()
    found = {}
    for p in WIDTHS:
        model.zero_grad()
        joint_backward(model, x, y, distill=None, precisions=[p])
        planes = model[3].weight_quant.planes
        found[p] = {
            key for key, plane in planes.items() if plane.grad is not None and float(plane.grad.abs().sum()) > 0
        }
    assert found == {2: set(), 3: {"3"}, 4: {"3", "4"}}


# ---- starting from another width


def trained(bits: int, seed: int = 3) -> nn.Module:
    model = network(bs.recipes.strata(w=(bits,)), seed).train()
    stage = Stage(bits, tuple(model.parameters()))
    train(model, stage, steps=5)
    return model


def test_one_bit_starts_from_two():
    wide = trained(2)
    narrow = network(bs.recipes.strata(w=(1,)))
    warm_start_(narrow, wide.state_dict())
    for n in (0, 3, 7):
        assert torch.equal(narrow[n].weight, wide[n].weight)
    for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(narrow[4].levels["1"], key), getattr(wide[4].levels["2"], key))
    quantizer = narrow[3].weight_quant
    expected = copy.deepcopy(quantizer)
    expected.init_(wide[3].weight)
    assert torch.equal(quantizer.step, expected.step)
    assert not torch.equal(quantizer.step, wide[3].weight_quant.step)
    codes = quantizer.codes(narrow[3].weight)
    assert sorted(codes.unique().tolist()) == [-1, 0]  # two levels, whatever the state had
    assert (quantizer.grid(narrow[3].weight).lo, quantizer.grid(narrow[3].weight).hi) == (-1, 0)
    with pytest.raises(RuntimeError, match="calibrate_"):
        narrow.eval()(data()[0])
    bs.calibrate_(narrow, [data()[0]])
    assert torch.isfinite(answers(narrow, 1)).all()


def test_normalizations_of_a_chosen_precision():
    wide = network(bs.recipes.strata(w=WIDTHS), 3).train()
    for p in WIDTHS:
        with torch.no_grad():
            wide[4].levels[str(p)].weight.fill_(p)
    for precision, expected in ((None, 2.0), (4, 4.0)):
        narrow = network(bs.recipes.strata(w=(1, 2)))
        warm_start_(narrow, wide.state_dict(), precision=precision)
        for p in ("1", "2"):
            assert set(narrow[4].levels[p].weight.tolist()) == {expected}
    with pytest.raises(
        ValueError, match=r"^warm_start_: the state has normalizations of precisions \[2, 3, 4\], not of 8$"
    ):
        warm_start_(narrow, wide.state_dict(), precision=8)


def test_layers_that_one_side_leaves_in_float():
    wide = trained(2)
    narrow = floating()
    bs.quantize_(narrow, bs.recipes.strata(w=(1,)), data()[0], filter=lambda name, layer: name != "0")
    assert isinstance(narrow[1], nn.BatchNorm2d)
    warm_start_(narrow, wide.state_dict())
    assert torch.equal(narrow[0].weight, wide[0].weight)
    assert torch.equal(narrow[1].running_mean, wide[1].levels["2"].running_mean)
    wider = network(bs.recipes.strata(w=(2,)))
    warm_start_(wider, narrow.state_dict())
    assert torch.equal(wider[1].levels["2"].running_mean, narrow[1].running_mean)


def test_edge_layers_of_their_own_at_every_precision():
    own_edges = dataclasses.replace(bs.recipes.strata(w=(2, 3)), own_edges=True)
    wide = network(own_edges, 3)
    assert any(".levels.2.weight" in name and name.startswith("0.") for name, _ in wide.named_parameters())
    narrow = network(bs.recipes.strata(w=(1,)))
    warm_start_(narrow, wide.state_dict())
    assert torch.equal(narrow[0].weight, wide.state_dict()["0.levels.2.weight"])
    warm_start_(wide, network(bs.recipes.strata(w=(1,)), 4).state_dict())
    assert torch.equal(wide.state_dict()["0.levels.2.weight"], floating(4)[0].weight)


def test_a_float_state_is_a_start_too():
    source, narrow = floating(7), network(bs.recipes.strata(w=(1, 2)))
    warm_start_(narrow, source.state_dict())
    assert torch.equal(narrow[3].weight, source[3].weight)


def test_a_state_of_another_network_changes_nothing():
    narrow = network(bs.recipes.strata(w=(1,)))
    before = snapshot(narrow)
    other = nn.Sequential(*list(floating().children())[:3], nn.Conv2d(6, 5, 3)).state_dict()
    with pytest.raises(ValueError, match=r"(?s)^warm_start_: the state does not fit the model: .*3\.weight"):
        warm_start_(narrow, other)
    assert changed(narrow, before) == set()
    with pytest.raises(ValueError, match=r"^warm_start_: the model has no quantized layers; call quantize_ first$"):
        warm_start_(floating(), floating().state_dict())
