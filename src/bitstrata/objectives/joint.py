"""Joint training of all precisions: unitary scalarization with self-distillation (vertical layering, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..prepare.parameters import precision_parameters
from ..prepare.precision import precision, precisions
from .distill import DISTILLATIONS

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class JointLoss:
    """One precision's share of a joint step: its whole loss (with distillation) and its logits, both detached."""

    loss: Tensor
    logits: Tensor


def joint_backward(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss = F.cross_entropy,
    distill: str | None = "cosine",
    precisions: Iterable[int] | None = None,
    amp: torch.dtype | None = None,
) -> dict[int, JointLoss]:
    """Run one batch at every precision, widest first, and add the gradients of the joint objective to `.grad`.

    L_b = loss(logits_b, targets) + distill(logits_b, logits of the next higher precision). Parameters that all
    precisions share (weights, source steps, edge layers) receive the mean over precisions of dL_b; those of one
    precision (normalization, activation steps, scale ratios) the unscaled dL_b. The caller zeroes gradients and steps
    the optimizer, so gradient accumulation and clipping work as usual.

    Args:
        model: a quantized model, in training mode.
        inputs, targets: as the model and `loss` take them.
        loss: called with (logits, targets), returns a scalar.
        distill: "cosine", or None for no distillation.
        precisions: which to train; all by default.
        amp: dtype for torch.autocast on the forward pass, e.g. torch.bfloat16; None for none.

    Returns:
        precision -> `JointLoss`, widest first.

    Raises:
        ValueError: a float model, an unknown precision, or an unknown distillation.
    """
    chosen = _chosen(model, precisions)
    if distill is not None and distill not in DISTILLATIONS:
        raise ValueError(f"joint_backward: distill must be one of {sorted(DISTILLATIONS)} or None, got {distill!r}")
    result: dict[int, JointLoss] = {}
    teacher: Tensor | None = None
    with _unscaled_precision_gradients(model, len(chosen)):
        for p in chosen:
            with precision(model, p):
                with torch.autocast(inputs.device.type, amp or torch.bfloat16, enabled=amp is not None):
                    logits = model(inputs)
                    total = loss(logits, targets)
                    if distill is not None and teacher is not None:
                        total = total + DISTILLATIONS[distill](logits, teacher)
                (total / len(chosen)).backward()
            teacher = logits.detach()
            result[p] = JointLoss(total.detach(), teacher)
    return result


def _chosen(model: nn.Module, wanted: Iterable[int] | None) -> tuple[int, ...]:
    known = precisions(model)
    if not known:
        raise ValueError("joint_backward: the model has no quantized layers; call quantize_ first")
    chosen = known if wanted is None else tuple(sorted(set(wanted)))
    unknown = [p for p in chosen if p not in known]
    if unknown or not chosen:
        raise ValueError(f"joint_backward: precisions must be among {known}, got {chosen}")
    return tuple(reversed(chosen))


@contextmanager
def _unscaled_precision_gradients(model: nn.Module, count: int) -> Iterator[None]:
    """Multiply what flows into per-precision parameters by `count`, undoing the mean's 1/count for them."""
    own = {id(p): p for group in precision_parameters(model).values() for p in group if p.requires_grad}
    handles = [p.register_hook(lambda grad: grad * count) for p in own.values()] if count > 1 else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
