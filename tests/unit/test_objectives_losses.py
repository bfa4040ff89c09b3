"""Losses and distillation losses against worked examples and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitstrata.objectives import DISTILLATIONS, LOSSES, cross_entropy, kl_distillation, make_loss, maqd


def logits(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


# ---- MaQD's loss


def test_maqd_worked_example():
    z, y = logits((2, 0, -1), (0, 1, 0)), torch.tensor([0, 2])
    assert F.cross_entropy(z, y).item() == pytest.approx(0.86064537, abs=1e-8)
    assert F.mse_loss(z, F.one_hot(y, 3).double()).item() == pytest.approx(0.66666667, abs=1e-8)
    loss = maqd(z, y)
    loss.backward()
    assert loss.item() == pytest.approx(0.85094643, abs=1e-8)
    expected = [-0.05753083, 0.05424272, 0.00328811, 0.10067224, 0.29032219, -0.39099443]
    assert z.grad.flatten().tolist() == pytest.approx(expected, abs=1e-8)


def test_maqd_gamma_goes_from_cross_entropy_to_squared_error():
    z, y = logits((2, 0, -1), (0, 1, 0)).detach(), torch.tensor([0, 2])
    assert maqd(z, y, gamma=0).item() == pytest.approx(0.86064537, abs=1e-8)
    assert maqd(z, y, gamma=1).item() == pytest.approx(2 / 3, abs=1e-15)
    assert maqd(z, y, gamma=0.5).item() == pytest.approx((0.86064537 + 2 / 3) / 2, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integer_targets_of_any_width(dtype):
    z, y = logits((2, 0, -1), (0, 1, 0)).detach(), torch.tensor([0, 2], dtype=dtype)
    assert maqd(z, y).item() == pytest.approx(0.85094643, abs=1e-8)
    assert cross_entropy(z, y).item() == pytest.approx(0.86064537, abs=1e-8)


def test_maqd_of_bfloat16_logits_is_computed_in_float32():
    z = torch.tensor([[2.0, 0, -1], [0, 1, 0]], dtype=torch.bfloat16)  # exact in bfloat16
    loss = maqd(z, torch.tensor([0, 2]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.85094643, abs=1e-6)


def test_maqd_gradient_by_finite_differences():
    z = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.tensor([0, 4, 2, 2])
    assert torch.autograd.gradcheck(lambda v: maqd(v, y, gamma=0.3), (z,), atol=1e-6)


@pytest.mark.parametrize("gamma", [-0.01, 1.01, float("nan"), "half"])
def test_maqd_refuses_gamma(gamma):
    with pytest.raises(ValueError, match=r"^maqd: gamma must be in \[0, 1\], got"):
        maqd(torch.zeros(1, 2), torch.tensor([0]), gamma=gamma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_maqd_refuses_targets_that_are_no_class_numbers(dtype):
    with pytest.raises(ValueError, match=rf"^maqd: targets must be integer class numbers, got dtype {dtype}$"):
        maqd(torch.zeros(1, 2), torch.zeros(1, dtype=dtype))


def test_maqd_refuses_other_shapes_and_labels():
    with pytest.raises(
        ValueError, match=r"^maqd: logits must be \(N, K\) and targets \(N,\), got \(2, 3\) and \(3,\)$"
    ):
        maqd(torch.zeros(2, 3), torch.tensor([0, 1, 2]))
    with pytest.raises(IndexError, match="Target 3 is out of bounds"):
        maqd(torch.zeros(1, 3), torch.tensor([3]))


# ---- cross entropy and the registry


def test_cross_entropy_with_smoothing_by_hand():
    z, y = logits((2, 0, -1)).detach(), torch.tensor([0])
    log = [v - math.log(math.exp(2) + 1 + math.exp(-1)) for v in (2, 0, -1)]
    assert cross_entropy(z, y).item() == pytest.approx(-log[0])
    smooth = -(0.7 + 0.1) * log[0] - 0.1 * log[1] - 0.1 * log[2]
    assert cross_entropy(z, y, label_smoothing=0.3).item() == pytest.approx(smooth)
    probabilities = torch.tensor([[0.8, 0.1, 0.1]], dtype=torch.float64)
    assert cross_entropy(z, probabilities).item() == pytest.approx(smooth)


def test_losses_by_name_and_options():
    z, y = logits((2, 0, -1), (0, 1, 0)).detach(), torch.tensor([0, 2])
    assert set(LOSSES) == {"cross_entropy", "maqd"}
    assert make_loss("maqd")(z, y).item() == pytest.approx(0.85094643, abs=1e-8)
    assert make_loss("maqd", gamma=1.0)(z, y).item() == pytest.approx(2 / 3)
    assert make_loss("cross_entropy", label_smoothing=0.1)(z, y) == cross_entropy(z, y, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hinge", {}, r"^make_loss: no loss named 'hinge'; there are: cross_entropy, maqd$"),
        ("maqd", {"beta": 1.0}, r"^make_loss: loss 'maqd' has no option 'beta'; it has: gamma$"),
        ("maqd", {"gamma": "x"}, r"^make_loss: option gamma of loss 'maqd' must be a finite number, got 'x'$"),
        ("cross_entropy", {"logits": 1.0}, r"has no option 'logits'; it has: label_smoothing$"),
    ],
)
def test_registry_refuses(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_loss(name, **options)


def test_cross_entropy_refuses_smoothing():
    with pytest.raises(ValueError, match=r"^cross_entropy: label_smoothing must be in \[0, 1\), got 1.0$"):
        cross_entropy(torch.zeros(1, 2), torch.tensor([0]), label_smoothing=1.0)


# ---- distillation


def test_kl_worked_example_and_gradient():
    teacher, student = logits((2, 0, -1)), logits((1, 1, 0))
    loss = kl_distillation(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0.37973825, abs=1e-8)
    expected = student.detach().softmax(1) - teacher.detach().softmax(1)  # closed form of KL's gradient
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-12)
    assert teacher.grad is None


def test_kl_temperature_softens_both_and_keeps_the_magnitude():
    teacher, student = logits((2, 0, -1)), logits((1, 1, 0))
    kl_distillation(student, teacher, temperature=4.0).backward()
    expected = 4.0 * ((student.detach() / 4).softmax(1) - (teacher.detach() / 4).softmax(1))
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-12)


def test_kl_averages_the_batch_in_float32_at_least():
    student = torch.tensor([[1.0, 1, 0], [0, 0, 0]], dtype=torch.bfloat16)
    teacher = torch.tensor([[2.0, 0, -1], [3, 3, 3]], dtype=torch.bfloat16)
    loss = kl_distillation(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.37973825 / 2, abs=1e-6)


def test_kl_is_finite_for_a_certain_teacher():
    student, teacher = logits((0, 0)), logits((2000, 0))
    assert kl_distillation(student, teacher).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", sorted(DISTILLATIONS))
def test_distillation_gradients_by_finite_differences(name):
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda z: DISTILLATIONS[name](z, teacher), (student,), atol=1e-6)


@pytest.mark.parametrize("name", sorted(DISTILLATIONS))
def test_distillation_refuses_other_shapes(name):
    with pytest.raises(
        ValueError,
        match=rf"^{name}_distillation: student and teacher logits must have one shape, got \(2, 3\) and \(2, 4\)$",
    ):
        DISTILLATIONS[name](torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_kl_refuses_temperature(temperature):
    with pytest.raises(ValueError, match=r"^kl_distillation: temperature must be positive, got"):
        kl_distillation(torch.zeros(1, 2), torch.zeros(1, 2), temperature=temperature)
