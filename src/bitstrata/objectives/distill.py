"""Distillation losses between the logits of a teacher and a student."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def cosine_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """mean over the batch of 1 - cos(softmax(teacher), softmax(student)); the teacher gets no gradient.

    Source: vertical layering (Wu et al.), eq. 11.

    Args:
        student, teacher: logits (N, classes); the probabilities are computed in float32 at least.
    """
    p = student.float().softmax(dim=-1) if student.dtype.itemsize < 4 else student.softmax(dim=-1)
    q = teacher.detach().to(p.dtype).softmax(dim=-1)
    cosine = (p * q).sum(-1) / (p.norm(dim=-1) * q.norm(dim=-1))
    return (1 - cosine).mean()


DISTILLATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine_distillation}
