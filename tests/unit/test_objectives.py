"""Distillation and the joint objective: every gradient against runs of one precision by itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.objectives import DISTILLATIONS, JointLoss, cosine_distillation, joint_backward

WIDTHS = (1, 2, 4)


def double(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


# ---- distillation


def test_cosine_golden_value_and_gradient():
    teacher = double(2, 0, -1).requires_grad_()
    student = double(1, 1, 0).requires_grad_()
    loss = cosine_distillation(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0.21860210, abs=1e-8)
    assert student.grad[0].tolist() == pytest.approx([-0.31138925, 0.27427074, 0.03711851], abs=1e-8)
    assert teacher.grad is None


def test_cosine_of_equal_logits_is_zero_and_a_shift_changes_nothing():
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.0]], dtype=torch.float64)
    assert cosine_distillation(logits, logits + 5).item() == pytest.approx(0, abs=1e-15)


def test_cosine_averages_the_batch_in_float32_at_least():
    student, teacher = torch.tensor([[1.0, 1, 0], [0, 0, 0]]), torch.tensor([[2.0, 0, -1], [0, 0, 0]])
    assert cosine_distillation(student, teacher).item() == pytest.approx(0.21860210 / 2, abs=1e-6)
    half = cosine_distillation(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(0.21860210 / 2, abs=1e-6)  # these logits are exact in bfloat16


# ---- the joint objective


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    ).double()
    x, _ = data()
    bs.quantize_(model, bs.recipes.strata(w=WIDTHS), x)
    return bs.calibrate_(model, [x])


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 2, 4, 4, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(
    model: nn.Module, p: int, teacher: Tensor | None, x: Tensor, y: Tensor
) -> tuple[dict[str, Tensor], Tensor, float]:
    """Gradients, logits and loss of one precision run in a copy."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    bs.set_precision(twin, p)
    logits = twin(x)
    loss = F.cross_entropy(logits, y)
    if teacher is not None:
        a, b = logits.softmax(1), teacher.softmax(1)
        loss = loss + (1 - (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()).mean()
    loss.backward()
    return gradients(twin), logits.detach(), loss.item()


def separate_runs(model: nn.Module, widths: tuple[int, ...], x: Tensor, y: Tensor, distill: bool) -> dict:
    runs, teacher = {}, None
    for p in sorted(widths, reverse=True):
        runs[p] = alone(model, p, teacher, x, y)
        teacher = runs[p][1] if distill else None
    return runs


def owners(model: nn.Module) -> dict[str, int]:
    """Name -> precision, for every parameter that one precision has to itself."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(q)]: p for p, group in bs.precision_parameters(model).items() for q in group}


@pytest.mark.parametrize("distill", ["cosine", None])
@pytest.mark.parametrize("widths", [WIDTHS, (1, 4), (2,)])
def test_gradients_are_those_of_separate_runs(widths, distill):
    model, (x, y) = network(), data()
    runs = separate_runs(model, widths, x, y, distill is not None)
    result = joint_backward(model, x, y, distill=distill, precisions=None if widths == WIDTHS else widths)
    assert list(result) == sorted(widths, reverse=True)
    for p in widths:
        assert isinstance(result[p], JointLoss)
        assert result[p].loss.item() == pytest.approx(runs[p][2], rel=1e-12)
        torch.testing.assert_close(result[p].logits, runs[p][1], rtol=1e-12, atol=0)
        assert not result[p].loss.requires_grad
        assert not result[p].logits.requires_grad
    found, own = gradients(model), owners(model)
    trained = {name for name, _ in model.named_parameters() if own.get(name) in (None, *widths)}
    assert set(found) == trained
    for name, gradient in found.items():
        if name in own:
            expected = runs[own[name]][0][name]
        else:
            expected = sum(runs[p][0][name] for p in widths) / len(widths)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")


def test_every_kind_of_parameter_is_among_the_checked_ones():
    model, (x, y) = network(), data()
    own = owners(model)
    joint_backward(model, x, y)
    moved = {name for name, g in gradients(model).items() if float(g.abs().sum()) > 0}
    for shared in ("0.weight", "3.weight", "3.weight_quant.step", "0.weight_quant.step", "0.act_quant.steps.shared"):
        assert shared in moved
        assert shared not in own
    for p in WIDTHS:
        for name in (f"3.act_quant.steps.{p}", f"1.levels.{p}.weight", f"4.levels.{p}.bias"):
            assert name in moved
            assert own[name] == p
    assert own["3.weight_quant.ratios.1"] == 1
    assert "3.weight_quant.ratios.2" in moved
    assert "3.weight_quant.ratios.4" not in dict(model.named_parameters())


def test_the_teacher_is_the_next_higher_precision_and_gets_no_gradient(monkeypatch):
    seen = []

    def spy(student: Tensor, teacher: Tensor) -> Tensor:
        seen.append((student.detach().clone(), teacher))
        return cosine_distillation(student, teacher)

    monkeypatch.setitem(DISTILLATIONS, "cosine", spy)
    model, (x, y) = network(), data()
    result = joint_backward(model, x, y)
    assert len(seen) == 2
    for (student, teacher), (wide, narrow) in zip(seen, ((4, 2), (2, 1)), strict=True):
        assert torch.equal(teacher, result[wide].logits)
        assert torch.equal(student, result[narrow].logits)
        assert not teacher.requires_grad


def test_gradients_accumulate():
    model = network()
    once = {}
    for seed in (1, 2):
        twin = copy.deepcopy(model)
        joint_backward(twin, *data(seed))
        once[seed] = gradients(twin)
    for seed in (1, 2):
        joint_backward(model, *data(seed))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, once[1][name] + once[2][name])


def hooks(model: nn.Module) -> int:
    return sum(len(p._backward_hooks or {}) for p in model.parameters())


def test_nothing_is_left_behind():
    model, (x, y) = network(), data()
    bs.set_precision(model, {"3": 2})
    joint_backward(model, x, y)
    assert hooks(model) == 0
    assert (model[0].precision, model[3].precision, model[4].precision) == (4, 2, 2)
    model.zero_grad()
    with bs.precision(model, 1):  # an ordinary step afterwards is not scaled
        expected = alone(model, 1, None, x, y)[0]
        F.cross_entropy(model(x), y).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_nothing_is_left_behind_by_an_exception():
    model, (x, y) = network(), data()
    calls = []

    def failing(logits: Tensor, targets: Tensor) -> Tensor:
        calls.append(hooks(model))
        if len(calls) == 2:
            raise KeyError("second precision")
        return F.cross_entropy(logits, targets)

    with pytest.raises(KeyError, match="second precision"):
        joint_backward(model, x, y, loss=failing)
    assert calls[0] > 0
    assert hooks(model) == 0
    assert model[0].precision == 4


def test_a_loss_of_ones_own():
    model, (x, _) = network(), data()
    target = torch.zeros(6, 3, dtype=torch.float64)
    result = joint_backward(model, x, target, loss=F.mse_loss, distill=None, precisions=[2])
    with bs.precision(model, 2):
        assert result[2].loss.item() == pytest.approx(model(x).square().mean().item())


def test_frozen_parameters_stay_without_gradient():
    model, (x, y) = network(), data()
    model[1].levels["2"].requires_grad_(False)
    model[3].weight.requires_grad_(False)
    joint_backward(model, x, y)
    found = gradients(model)
    assert not {"3.weight", "1.levels.2.weight", "1.levels.2.bias"} & set(found)
    assert "1.levels.1.weight" in found


def test_a_wrapped_model():
    model, (x, y) = network(), data()
    twin = nn.Sequential(copy.deepcopy(model))
    joint_backward(model, x, y)
    joint_backward(twin, x, y)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradients(twin)[f"0.{name}"], gradient)


def test_bfloat16_autocast():
    model, (x, y) = network().float(), data()
    result = joint_backward(model, x.float(), y, amp=torch.bfloat16)
    assert all(r.logits.dtype == torch.bfloat16 for r in result.values())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert not torch.is_autocast_enabled("cpu")
    exact = joint_backward(copy.deepcopy(model), x.float(), y)
    for p in WIDTHS:
        assert result[p].loss.item() == pytest.approx(exact[p].loss.item(), rel=0.2)


def test_training_lowers_every_loss():
    model, (x, y) = network(), data()
    optimizer = torch.optim.SGD(bs.parameter_groups(model, 1e-4), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append({p: r.loss.item() for p, r in joint_backward(model, x, y).items()})
        optimizer.step()
    for p in WIDTHS:
        assert losses[-1][p] < 0.5 * losses[0][p]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"distill": "mse"},
            r"^joint_backward: distill must be one of \['cosine', 'kl'\] or None, got 'mse'$",
        ),
        (
            {"teacher": "last"},
            r"^joint_backward: teacher must be one of \('next', 'widest'\) or a network, got 'last'$",
        ),
        ({"combine": "min"}, r"^joint_backward: combine must be one of \('scalarization', 'mgd'\), got 'min'$"),
        ({"reduction": "max"}, r"^joint_backward: reduction must be one of \('mean', 'sum'\), got 'max'$"),
        (
            {"combine": "mgd", "reduction": "sum"},
            r"combine='mgd' chooses the factors itself, so reduction='sum' is void$",
        ),
        ({"distill_weight": -1.0}, r"^joint_backward: distill_weight must not be negative, got -1.0$"),
        ({"precisions": (2, 3)}, r"^joint_backward: precisions must be among \(1, 2, 4\), got \(2, 3\)$"),
        ({"precisions": ()}, r"^joint_backward: precisions must be among \(1, 2, 4\), got \(\)$"),
    ],
)
def test_refusals(options, message):
    model, (x, y) = network(), data()
    with pytest.raises(ValueError, match=message):
        joint_backward(model, x, y, **options)
    assert gradients(model) == {}


def test_a_float_model_is_refused():
    with pytest.raises(ValueError, match=r"^joint_backward: the model has no quantized layers; call quantize_ first$"):
        joint_backward(nn.Linear(2, 2), torch.ones(1, 2), torch.tensor([0]))
