"""Distillation losses between the logits of a teacher and a student."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Distillation = Callable[[Tensor, Tensor], Tensor]


def cosine_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """mean over the batch of 1 - cos(softmax(teacher), softmax(student)); the teacher gets no gradient.

    Source: vertical layering (Wu et al.), eq. 11.

    Args:
        student, teacher: logits (N, classes); the probabilities are computed in float32 at least.

    Raises:
        ValueError: logits of different shapes.
    """
    student, teacher = _pair("cosine_distillation", student, teacher)
    p, q = student.softmax(dim=-1), teacher.softmax(dim=-1)
    cosine = (p * q).sum(-1) / (p.norm(dim=-1) * q.norm(dim=-1))
    return (1 - cosine).mean()


def kl_distillation(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 times the mean over the batch of KL(softmax(teacher/T) || softmax(student/T)), in nats.

    The teacher gets no gradient. The factor T^2 keeps the gradient's magnitude when T grows (Hinton et al., 2015,
    section 2); vertical layering (Wu et al., section 6.3.4) uses T = 1.

    Args:
        student, teacher: logits (N, classes); computed in float32 at least.
        temperature: T > 0.

    Raises:
        ValueError: logits of different shapes, or a temperature that is not positive.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"kl_distillation: temperature must be positive, got {temperature!r}")
    student, teacher = _pair("kl_distillation", student, teacher)
    log_p, log_q = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def _pair(operation: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the student's dtype, float32 at least; the teacher detached."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"{operation}: student and teacher logits must have one shape, got {tuple(student.shape)} "
            f"and {tuple(teacher.shape)}"
        )
    wide = student.float() if student.dtype.itemsize < 4 else student
    return wide, teacher.detach().to(wide.dtype)


DISTILLATIONS: dict[str, Distillation] = {"cosine": cosine_distillation, "kl": kl_distillation}
