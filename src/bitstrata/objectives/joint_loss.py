"""The joint objective as a tensor, for loops and trainers that call `backward` themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .joint import JointLoss, joint_backward


def joint_loss(model: nn.Module, inputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """The joint loss of all precisions, a scalar; its `backward` adds the gradients that `joint_backward` adds.

    The backward passes run here, a precision at a time, so that memory holds one graph as in `joint_backward`; their
    gradients are kept, and `backward` of the result adds them to `.grad`, times the gradient that reaches it. Dividing
    the result, as trainers do to accumulate gradients, so divides all gradients, those of single precisions too. For a
    Hugging Face `Trainer` return it from `compute_loss`; in a loop of one's own `joint_backward` is simpler.

    Args:
        model, inputs, targets, options: as `joint_backward` takes them.

    Returns:
        sum_b alpha_b L_b: the mean over precisions, unless `options` say otherwise. Without gradient where gradients
        are disabled.

    Raises:
        What `joint_backward` raises.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> dict[int, JointLoss]:
        return joint_backward(model, inputs, targets, **options)

    return cast(Tensor, _JointLoss.apply(run, *parameters))


class _JointLoss(torch.autograd.Function):
    """Gradients found in the forward pass, handed out in the backward pass."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], dict[int, JointLoss]], *parameters: nn.Parameter) -> Tensor:
        kept = [p.grad for p in parameters]
        try:
            for p in parameters:
                p.grad = None
            with torch.enable_grad():
                results = run()
            ctx.gradients = [p.grad for p in parameters]
        finally:
            for p, grad in zip(parameters, kept, strict=True):
                p.grad = grad
        return torch.stack([result.alpha * result.loss.float() for result in results.values()]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = ctx.gradients
        return (None, *(None if g is None else g * grad.to(g.dtype) for g in found))
