"""Fake quantization by the engine's kernels: tensors on the CPU."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .fake_layout import Layout, laid_out, layout_of
from .formula import Formula, Gradients, Needs, Rule

_engine: Any
try:
    from bitstrata_runtime import _engine
except ImportError:  # a source tree whose extension was never built: the formulas still train
    _engine = None

AVAILABLE = _engine is not None
FASTEST = ""  # as an instruction set: the engine takes the one BITSTRATA_ISA names, else the fastest


def share_threads() -> bool:
    """Let the engine use torch's own threads. Else those of both, which wait busily, are in each other's way."""
    folder = Path(torch.__file__).parent / "lib"
    return AVAILABLE and any(_engine.use_openmp(str(library)) for library in folder.glob("lib*omp*"))


SHARED_THREADS = share_threads()


@lru_cache(maxsize=1024)
def _native(rule: Rule) -> Any:
    return _engine.FakeRule(**vars(rule))


def _arguments(layout: Layout, x: Tensor) -> tuple[Any, ...]:
    return (
        _native(layout.rule),
        layout.outer,
        layout.channels,
        layout.inner,
        x.dtype == torch.bfloat16,
        layout.narrow,
        layout.step.data_ptr(),
        0 if layout.extra is None else layout.extra.data_ptr(),
    )


def forward(x: Tensor, step: Tensor, extra: Tensor | None, formula: Formula) -> Tensor | None:
    """The formula's value in one pass, or None if the kernels do not do this."""
    out = torch.empty_like(x)
    dense = laid_out(x, out)
    layout = layout_of(dense, step, extra, formula)
    if layout is None:
        return None
    _engine.fake_quantize(
        *_arguments(layout, dense), dense.data_ptr(), out.data_ptr(), FASTEST, torch.get_num_threads()
    )
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
    dense = laid_out(x, out)
    layout = layout_of(dense, step, extra, formula)
    if layout is None:
        return None
    g = laid_out(grad, out)
    wanted = [torch.empty(step.shape) if n else None for n in needs[1:]]
    _engine.fake_quantize_gradient(
        *_arguments(layout, dense),
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
