"""How kernels of fake quantization see tensors: as rows in memory that share a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .formula import Formula, Rule, positive, rule_of

SHORTEST_RUN = 8  # neighbours in memory that share a step; fewer leave vectors empty
_DTYPES = (torch.float32, torch.bfloat16)


class Layout(NamedTuple):
    """A dense tensor as (outer, channels, inner) in memory, with contiguous float32 parameters, (channels,) each.

    narrow: x / step is rounded to bfloat16.
    """

    rule: Rule
    outer: int
    channels: int
    inner: int
    narrow: bool
    step: Tensor
    extra: Tensor | None


def _rows(x: Tensor, step: Tensor) -> tuple[int, int, int] | None:
    """How a dense x lies in memory, seen from a step an element of one dimension; None if that is not how it is."""
    if step.dim() != x.dim():
        return None
    wide = [d for d in range(x.dim()) if step.shape[d] != 1]
    if len(wide) != 1 or step.shape[wide[0]] != x.shape[wide[0]]:
        return None
    channels, inner = x.shape[wide[0]], x.stride(wide[0])
    return (x.numel() // (channels * inner), channels, inner) if inner >= SHORTEST_RUN else None


def layout_of(x: Tensor, step: Tensor, extra: Tensor | None, formula: Formula) -> Layout | None:
    """What kernels need to know of a dense x, or None if they do not do this."""
    rule = rule_of(formula)
    count = step.numel()
    if rule is None or x.dtype not in _DTYPES or step.device != x.device or x.numel() == 0 or count == 0:
        return None
    if (extra is not None) != formula.takes_extra:
        return None
    if extra is not None and (extra.dtype != torch.float32 or extra.shape != step.shape or extra.device != x.device):
        return None
    rows = (1, 1, x.numel()) if count == 1 else _rows(x, step)
    if rows is None:
        return None
    narrow = formula.narrows and x.dtype == torch.bfloat16 and (count == 1 or step.dtype == torch.bfloat16)
    if step.dtype != torch.float32:
        if step.dtype != torch.bfloat16 or not formula.half_steps:
            return None
        step = positive(step).float()
    return Layout(rule, *rows, narrow, step.contiguous(), None if extra is None else extra.contiguous())


def laid_out(t: Tensor, like: Tensor) -> Tensor:
    """t in the layout and dtype of `like`, both of one shape; itself, if it has them."""
    same = t.stride() == like.stride() and t.dtype == like.dtype and not t.is_neg()
    return t if same else torch.empty_like(like).copy_(t)
