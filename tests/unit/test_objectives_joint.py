"""Options of the joint objective: how gradients are combined, who teaches, and unusual parameters."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.objectives import cosine_distillation, joint_backward, kl_distillation, make_loss, min_norm_point

WIDTHS = (1, 2, 4)
COMBINATIONS = ("scalarization", "mgd")


def network(**fields: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).double()
    x, _ = data()
    bs.quantize_(model, dataclasses.replace(bs.recipes.strata(w=WIDTHS), **fields), x)
    return bs.calibrate_(model, [x])


def data(seed: int = 1, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.arange(count) % 3


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def owners(model: nn.Module) -> dict[str, int]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(q)]: p for p, group in bs.precision_parameters(model).items() for q in group}


def runs(
    model: nn.Module, x: Tensor, y: Tensor, teach: Callable[[int, dict[int, Tensor], Tensor], Tensor | float]
) -> dict[int, dict[str, Tensor]]:
    """Gradients of each precision in a copy of its own; `teach` gives the distillation term of its logits."""
    result, logits = {}, {}
    for p in sorted(WIDTHS, reverse=True):
        twin = copy.deepcopy(model)
        twin.zero_grad()
        bs.set_precision(twin, p)
        z = twin(x)
        (F.cross_entropy(z, y) + teach(p, logits, z)).backward()
        logits[p] = z.detach()
        result[p] = gradients(twin)
    return result


def untaught(*_: object) -> float:
    return 0.0


def assert_combined(model: nn.Module, alone: dict[int, dict[str, Tensor]], alphas: dict[int, float]) -> None:
    found, own = gradients(model), owners(model)
    assert set(found) == set().union(*(set(g) for g in alone.values()))
    for name, gradient in found.items():
        if name in own:
            expected = alone[own[name]][name]
        else:
            expected = sum((alphas[p] * g[name] for p, g in alone.items() if name in g), torch.zeros(()))
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


# ---- how gradients are combined


@pytest.mark.parametrize(("reduction", "factor"), [("mean", 1 / 3), ("sum", 1.0)])
def test_scalarization(reduction, factor):
    model, (x, y) = network(), data()
    alone = runs(model, x, y, untaught)
    result = joint_backward(model, x, y, distill=None, reduction=reduction)
    assert [r.alpha for r in result.values()] == [factor] * 3
    assert_combined(model, alone, dict.fromkeys(WIDTHS, factor))


def test_mgd_makes_the_shared_gradient_shortest():
    model, (x, y) = network(), data()
    alone = runs(model, x, y, untaught)
    result = joint_backward(model, x, y, distill=None, combine="mgd")
    own = owners(model)
    shared = [name for name in alone[4] if name not in own]
    rows = {p: torch.cat([g[name].flatten() for name in shared]) for p, g in alone.items()}
    alphas = {p: r.alpha for p, r in result.items()}
    expected = min_norm_point([rows[p] for p in result])
    assert list(alphas.values()) == pytest.approx(expected.tolist(), abs=1e-9)
    assert sum(alphas.values()) == pytest.approx(1)
    assert_combined(model, alone, alphas)
    found = gradients(model)
    length = torch.cat([found[name].flatten() for name in shared]).norm()
    plain = sum(rows.values()) / 3
    assert length <= min(float(r.norm()) for r in (*rows.values(), plain)) + 1e-9


def test_mgd_and_scalarization_differ_in_shared_parameters_only():
    model, (x, y) = network(), data()
    twin = copy.deepcopy(model)
    joint_backward(model, x, y)
    joint_backward(twin, x, y, combine="mgd")
    own, mine, other = owners(model), gradients(model), gradients(twin)
    for name in own:
        torch.testing.assert_close(mine[name], other[name])
    assert not torch.allclose(mine["3.weight"], other["3.weight"], rtol=1e-3)


def test_mgd_of_one_precision_is_its_own_gradient():
    model, (x, y) = network(), data()
    twin = copy.deepcopy(model)
    (one,) = joint_backward(model, x, y, combine="mgd", precisions=[2]).values()
    assert one.alpha == 1.0
    joint_backward(twin, x, y, precisions=[2])
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(model)[name], gradient)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"combine": "mgd"}])
def test_gradients_accumulate(options):
    model = network()
    once = {}
    for seed in (1, 2):
        twin = copy.deepcopy(model)
        joint_backward(twin, *data(seed), **options)
        once[seed] = gradients(twin)
    for seed in (1, 2):
        joint_backward(model, *data(seed), **options)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, once[1][name] + once[2][name])


# ---- who teaches


def test_the_widest_precision_teaches_all():
    model, (x, y) = network(), data()
    alone = runs(model, x, y, lambda p, logits, z: 0.0 if p == 4 else cosine_distillation(z, logits[4]))
    joint_backward(model, x, y, teacher="widest")
    assert_combined(model, alone, dict.fromkeys(WIDTHS, 1 / 3))


def test_kl_and_its_weight():
    model, (x, y) = network(), data()
    alone = runs(model, x, y, lambda p, logits, z: 0.0 if p == 4 else 2.5 * kl_distillation(z, logits[{2: 4, 1: 2}[p]]))
    joint_backward(model, x, y, distill="kl", distill_weight=2.5)
    assert_combined(model, alone, dict.fromkeys(WIDTHS, 1 / 3))


def test_a_distillation_of_ones_own():
    model, (x, y) = network(), data()
    alone = runs(model, x, y, lambda p, logits, z: 0.0 if p == 4 else F.mse_loss(z, logits[{2: 4, 1: 2}[p]]))
    joint_backward(model, x, y, distill=F.mse_loss)
    assert_combined(model, alone, dict.fromkeys(WIDTHS, 1 / 3))


class Teacher(nn.Module):
    """A float network that behaves otherwise in training, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 3)).double()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not any(m.training for m in self.modules())
        self.calls += 1
        return self.body(x)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_a_network_of_its_own_teaches_every_precision(combine):
    torch.manual_seed(5)
    teacher = Teacher().train()
    teacher.body[2].eval()  # a mode of its own, to be kept
    model, (x, y) = network(), data()
    with torch.no_grad():
        answers = copy.deepcopy(teacher).eval()(x)
    alone = runs(model, x, y, lambda p, logits, z: cosine_distillation(z, answers))
    statistics = teacher.body[1].running_mean.clone()
    result = joint_backward(model, x, y, teacher=teacher, combine=combine)
    assert_combined(model, alone, {p: r.alpha for p, r in result.items()})
    assert teacher.calls == 1
    assert [m.training for m in teacher.body] == [True, True, False, True]
    assert teacher.training
    assert torch.equal(teacher.body[1].running_mean, statistics)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_mode_of_a_teacher_that_fails_is_kept():
    teacher = nn.Sequential(nn.Linear(1, 1)).train()
    model, (x, y) = network(), data()
    with pytest.raises(RuntimeError):
        joint_backward(model, x, y, teacher=teacher)
    assert teacher.training
    assert teacher[0].training


def test_teachers_that_cannot_be():
    model, (x, y) = network(), data()
    with pytest.raises(ValueError, match=r"^joint_backward: the teacher shares modules with the model"):
        joint_backward(model, x, y, teacher=nn.Sequential(model[0]))
    with pytest.raises(ValueError, match=r"^joint_backward: a teacher network is given, but distill is None$"):
        joint_backward(model, x, y, teacher=Teacher(), distill=None)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(32, 7)).double()
    with pytest.raises(ValueError, match=r"must have one shape, got \(6, 3\) and \(6, 7\)$"):
        joint_backward(model, x, y, teacher=wide)


# ---- losses


def test_the_maqd_loss_in_joint_training():
    model, (x, y) = network(), data()
    loss = make_loss("maqd", gamma=0.5)
    result = joint_backward(model, x, y, loss=loss, distill=None)
    for p, found in result.items():
        with bs.precision(model, p):
            assert found.loss.item() == pytest.approx(loss(model(x), y).item())


# ---- unusual parameters


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_frozen_parameters_stay_without_gradient(combine):
    model, (x, y) = network(), data()
    model[1].levels["2"].requires_grad_(False)
    model[3].weight.requires_grad_(False)
    joint_backward(model, x, y, combine=combine)
    found = gradients(model)
    assert not {"3.weight", "1.levels.2.weight", "1.levels.2.bias"} & set(found)
    assert {"1.levels.1.weight", "0.weight"} <= set(found)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_only_parameters_of_the_precisions_trained(combine):
    model, (x, y) = network(), data()
    for group in ([p for n, p in model.named_parameters() if n not in owners(model)],):
        for p in group:
            p.requires_grad_(False)
    result = joint_backward(model, x, y, distill=None, combine=combine)
    assert [r.alpha for r in result.values()] == [pytest.approx(1 / 3)] * 3
    assert set(gradients(model)) == set(owners(model))
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match=r"the loss at precision 4 depends on no parameter that is trained$"):
        joint_backward(model, x, y, combine=combine)


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("fields", [{"norm_levels": "statistics"}, {"norm_levels": "shared"}, {"own_edges": True}])
def test_what_precisions_share_follows_from_the_recipe(fields, combine):
    model, (x, y) = network(**fields), data()
    alone = runs(model, x, y, untaught)
    result = joint_backward(model, x, y, distill=None, combine=combine)
    assert_combined(model, alone, {p: r.alpha for p, r in result.items()})
    individual = network()
    assert len(owners(model)) != len(owners(individual))


class WithSpares(nn.Module):
    """A parameter that is never used, and one that only the first of three forward passes uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.once = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        z = self.body(x)
        return z * self.once if self.passes == 1 else z


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_unused_parameters_have_no_gradient(combine):
    model, (x, y) = WithSpares(), data()
    result = joint_backward(model, x, y, distill=None, combine=combine)
    assert model.unused.grad is None
    z = result[4].logits / model.once.detach()
    leaf = torch.ones(3, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(z * leaf, y).backward()
    torch.testing.assert_close(model.once.grad, result[4].alpha * leaf.grad)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_tied_weights_get_the_gradient_of_both_places(combine):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[4].weight = model[2].weight
    model.double()
    x, y = torch.randn(6, 8, dtype=torch.float64), data()[1]
    bs.calibrate_(bs.quantize_(model, bs.recipes.strata(w=WIDTHS), x), [x])
    assert model[4].weight is model[2].weight
    alone = runs(model, x, y, untaught)
    result = joint_backward(model, x, y, distill=None, combine=combine)
    assert_combined(model, alone, {p: r.alpha for p, r in result.items()})


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_a_batch_of_one(combine):
    model, (x, y) = network(), data(count=1)
    alone = runs(model, x, y, untaught)
    result = joint_backward(model, x, y, distill=None, combine=combine)
    assert_combined(model, alone, {p: r.alpha for p, r in result.items()})


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_bfloat16_autocast(combine):
    model, (x, y) = network().float(), data()
    twin = copy.deepcopy(model)
    result = joint_backward(model, x.float(), y, combine=combine, amp=torch.bfloat16)
    assert all(r.logits.dtype == torch.bfloat16 for r in result.values())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    exact = joint_backward(twin, x.float(), y, combine=combine)
    for p in WIDTHS:
        assert result[p].loss.item() == pytest.approx(exact[p].loss.item(), rel=0.2)


def test_mgd_keeps_the_memory_format_of_the_weights():
    model, (x, y) = network().to(memory_format=torch.channels_last), data()
    joint_backward(model, x, y, combine="mgd")
    assert model[3].weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_mgd_refuses_gradients_that_are_not_finite():
    model, (x, y) = network(), data()
    x[0, 0, 0, 0] = float("inf")
    with pytest.raises(
        FloatingPointError, match=r"^joint_backward: gradients at precisions \[4, 2, 1\] are not finite$"
    ):
        joint_backward(model, x, y, combine="mgd", distill=None, loss=lambda z, t: z.sum() * float("nan"))
    assert gradients(model) == {}


def test_mgd_refuses_sparse_gradients():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 8, sparse=True)
            self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, words: Tensor) -> Tensor:
            return self.body(self.table(words))

    model, words, y = Words(), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])
    bs.calibrate_(bs.quantize_(model, bs.recipes.strata(w=WIDTHS), words), [words])
    with pytest.raises(ValueError, match=r"combine='mgd' needs dense gradients, that of 'table.weight' is sparse$"):
        joint_backward(model, words, y, combine="mgd")
    joint_backward(model, words, y)
    assert model.table.weight.grad.is_sparse


@pytest.mark.parametrize("options", [{"combine": "mgd"}, {"reduction": "sum"}, {"distill": "kl", "teacher": "widest"}])
def test_training_lowers_every_loss(options):
    model, (x, y) = network(), data()
    optimizer = torch.optim.SGD(bs.parameter_groups(model, 1e-4), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append({p: r.loss.item() for p, r in joint_backward(model, x, y, **options).items()})
        optimizer.step()
    for p in WIDTHS:
        assert losses[-1][p] < 0.6 * losses[0][p]
