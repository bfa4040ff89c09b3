"""How the objectives of several precisions pull at the weights they share (vertical layering, figure 7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..objectives import min_norm_point
from ..prepare.parameters import precision_parameters
from ..prepare.precision import precision, precisions
from .kept import kept


@dataclass(frozen=True)
class ObjectiveGeometry:
    """precisions: ascending. losses, norms: of each, the norm of its gradient to the shared parameters. cosines: (n, n)
    between those gradients. factors: of the shortest convex combination (multiple gradient descent), NaN where
    a gradient is not finite."""

    precisions: tuple[int, ...]
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    cosines: Tensor
    factors: tuple[float, ...]


def objective_geometry(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, *, training: bool | None = True
) -> ObjectiveGeometry:
    """Gradients of every precision's loss to the parameters that all share; the model is left as it was.

    Args:
        loss: called with (model, batch) at each precision, widest first, gives one number as a tensor.
        training: as for `gradient_variance`.

    Raises:
        ValueError: a model with fewer than two precisions.
    """
    known = precisions(model)
    if len(known) < 2:
        raise ValueError(f"objective_geometry: the model must be quantized for several precisions, it has {known}")
    owned = {id(q) for group in precision_parameters(model).values() for q in group}
    shared = [q for q in model.parameters() if q.requires_grad and id(q) not in owned]
    losses: list[float] = []
    rows: list[Tensor] = []
    with kept(model, training=training), torch.enable_grad():
        for p in reversed(known):
            with precision(model, p):
                value = loss(model, batch)
                found = torch.autograd.grad(value, shared, allow_unused=True)
            losses.insert(0, float(value.detach()))
            parts = [(torch.zeros_like(q) if g is None else g).flatten() for q, g in zip(shared, found, strict=True)]
            rows.insert(0, torch.cat(parts).double())
    gradients = torch.stack(rows)
    gram = gradients @ gradients.T
    norms = gram.diagonal().clamp_min(0).sqrt()
    cosines = gram / (norms[:, None] * norms[None, :]).clamp_min(torch.finfo(torch.float64).tiny)
    finite = bool(torch.isfinite(gram).all())
    factors = tuple(map(float, min_norm_point(gram=gram))) if finite else (math.nan,) * len(known)
    return ObjectiveGeometry(known, tuple(losses), tuple(norms.tolist()), cosines, factors)
