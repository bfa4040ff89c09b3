"""Fake quantization by the engine's kernels: tensors on the CPU."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .formula import Formula, Gradients, Needs, positive, rule_of

_engine: Any
try:
    from bitstrata_runtime import _engine
except ImportError:  # a source tree whose extension was never built: the formulas still train
    _engine = None

AVAILABLE = _engine is not None
FASTEST = ""  # as an instruction set: the engine takes the one BITSTRATA_ISA names, else the fastest
SHORTEST_RUN = 8  # neighbours in memory that share a step; fewer leave vectors empty
_DTYPES = (torch.float32, torch.bfloat16)


def share_threads() -> bool:
    """Let the engine use torch's own threads. Else those of both, which wait busily, are in each other's way."""
    folder = Path(torch.__file__).parent / "lib"
    return AVAILABLE and any(_engine.use_openmp(str(library)) for library in folder.glob("lib*omp*"))


SHARED_THREADS = share_threads()


@lru_cache(maxsize=1024)
def _native_rule(formula: Formula) -> Any:
    rule = rule_of(formula)
    return None if rule is None else _engine.FakeRule(**vars(rule))


class _Call(NamedTuple):
    """A tensor as the kernels take it: (outer, channels, inner) in memory, with float32 parameters."""

    rule: Any
    outer: int
    channels: int
    inner: int
    narrow: bool
    step: Tensor
    extra: Tensor | None

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        step, extra = self.step, self.extra
        return (
            *self[:4],
            x.dtype == torch.bfloat16,
            self.narrow,
            step.data_ptr(),
            0 if extra is None else extra.data_ptr(),
        )


def _rows(x: Tensor, step: Tensor) -> tuple[int, int, int] | None:
    """How a dense x lies in memory, seen from a step an element of one dimension; None if that is not how it is."""
    if step.dim() != x.dim():
        return None
    wide = [d for d in range(x.dim()) if step.shape[d] != 1]
    if len(wide) != 1 or step.shape[wide[0]] != x.shape[wide[0]]:
        return None
    channels, inner = x.shape[wide[0]], x.stride(wide[0])
    return (x.numel() // (channels * inner), channels, inner) if inner >= SHORTEST_RUN else None


def _call(x: Tensor, step: Tensor, extra: Tensor | None, formula: Formula) -> _Call | None:
    """How to call the kernels for a dense x, or None if they do not do this."""
    rule = _native_rule(formula)
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
    return _Call(rule, *rows, narrow, step.contiguous(), None if extra is None else extra.contiguous())


def _like(t: Tensor, x: Tensor) -> Tensor:
    """t in the layout and dtype of x, both of one shape."""
    same = t.stride() == x.stride() and t.dtype == x.dtype and not t.is_neg()
    return t if same else torch.empty_like(x).copy_(t)


def forward(x: Tensor, step: Tensor, extra: Tensor | None, formula: Formula) -> Tensor | None:
    """The formula's value in one pass, or None if the kernels do not do this."""
    out = torch.empty_like(x)
    dense = _like(x, out)
    call = _call(dense, step, extra, formula)
    if call is None:
        return None
    _engine.fake_quantize(*call.arguments(dense), dense.data_ptr(), out.data_ptr(), FASTEST, torch.get_num_threads())
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    step: Tensor,
    extra: Tensor | None,
    formula: Formula,
    *,
    needs: Needs,
    factor: float,
) -> Gradients | None:
    """The formula's gradients in one pass, or None if the kernels do not do this."""
    out = torch.empty_like(x)
    dense = _like(x, out)
    call = _call(dense, step, extra, formula)
    if call is None:
        return None
    g = _like(grad, out)
    wanted = [torch.empty(step.shape) if n else None for n in needs[1:]]
    _engine.fake_quantize_gradient(
        *call.arguments(dense),
        factor,
        g.data_ptr(),
        dense.data_ptr(),
        out.data_ptr() if needs[0] else 0,
        *(0 if w is None else w.data_ptr() for w in wanted),
        FASTEST,
        torch.get_num_threads(),
    )
    d_step, d_extra = wanted
    return (
        out if needs[0] else None,
        None if d_step is None else d_step.to(step.dtype),
        d_extra,  # float32, as extra is
    )
