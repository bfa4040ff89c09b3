"""Fake quantization in one pass over memory each way, where kernels do it, else by the formula's tensor expressions.

Graphs (`torch.compile`, `torch.export`) see one node, `bitstrata::fake_quantize`, and one for its gradients. Outside
of graphs the operators' Python code is called directly, which takes a third of the time that their dispatch does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import engine_fake
from .formula import Formula, Gradients, Needs, restore

_PLAIN = (Tensor, torch.nn.Parameter)


def wanted() -> bool:
    """Whether the environment asks for kernels: unless BITSTRATA_FUSED=0."""
    return os.environ.get("BITSTRATA_FUSED", "1") != "0"


_enabled = wanted()


@contextmanager
def fused_kernels(enabled: bool) -> Iterator[None]:
    """Inside, fake quantizers use their kernels or, with False, the formulas' tensor expressions; for all threads.

    The environment variable BITSTRATA_FUSED=0 does the latter from the start. Graphs that were compiled before keep
    their node, which follows the switch when it runs.
    """
    global _enabled  # noqa: PLW0603  (a switch of the process, as the environment variable is)
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def _kernels(x: Tensor) -> Any:
    """The module whose `forward` and `backward` run on x's device, or None."""
    if not _enabled:
        return None
    if x.device.type == "cpu":
        return engine_fake if engine_fake.AVAILABLE else None
    return _triton() if x.device.type == "cuda" else None


@cache
def _triton() -> Any:
    try:
        from . import triton_fake
    except ImportError:  # the package triton is missing, or knows no such machine
        return None
    return triton_fake


def _value(x: Tensor, step: Tensor, extra: Tensor | None, formula: Formula) -> Tensor:
    """Of what `formula.prepared` returned."""
    kernels = _kernels(x)
    value = None if kernels is None else kernels.forward(x, step, extra, formula)
    return formula.value(x, step, extra) if value is None else value


def _gradients(
    grad: Tensor,
    x: Tensor,
    step: Tensor,
    extra: Tensor | None,
    formula: Formula,
    *,
    needs: Needs,
    factor: float,
) -> Gradients:
    kernels = _kernels(x)
    found: Gradients | None = None
    if kernels is not None:
        asked = formula.kernel_needs(needs)
        found = kernels.backward(grad, x, step, extra, formula, needs=asked, factor=factor)
    if found is None:
        return formula.gradients(grad, x, step, extra, needs=needs, factor=factor)
    return formula.completed(found, x, step)


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  (autograd functions take positional arguments only)
        ctx: Any, x: Tensor, step: Tensor, extra: Tensor | None, formula: Formula, factor: float
    ) -> Tensor:
        dtype = x.dtype
        x, step = formula.prepared(x, step)
        ctx.save_for_backward(x, step, extra)
        ctx.config = (formula, factor)
        return _value(x, step, extra, formula).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, extra = ctx.saved_tensors
        formula, factor = ctx.config
        found = _gradients(grad, x, step, extra, formula, needs=ctx.needs_input_grad[:3], factor=factor)
        return None if found[0] is None else found[0].to(grad.dtype), *found[1:], None, None


def _exporting() -> bool:
    """Whether `torch.export` is at work, which keeps values only. Torch before 2.7 cannot tell."""
    return bool(getattr(torch.compiler, "is_exporting", bool)())


def fake_quantize(
    x: Tensor, step: Tensor, extra: Tensor | None, formula: Formula, *, grad_scale: float = 1.0
) -> Tensor:
    """The formula's value of x, with its gradients; those of step and extra are multiplied by `grad_scale`.

    Only x, step and extra are kept for the backward pass, which is differentiable once.

    Args:
        x: any shape and layout, floating; the result has its shape and dtype and, if x is dense, its strides.
        step, extra: as the formula says.

    Kernels run for float32 and bfloat16 on the CPU, float32 steps (for some formulas bfloat16 too), and steps of one
    element or of one dimension whose elements apply to 8 neighbours in memory each or more.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or type(step) not in _PLAIN
        or is_in_torch_dispatch_mode()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
    ):
        if _exporting():  # a factor that counts the batch would tie the exported program to its size
            grad_scale = 1.0
        return torch.ops.bitstrata.fake_quantize(x, step, extra, formula.name, formula.numbers(), grad_scale)
    if not torch.is_grad_enabled():
        return _value(*formula.prepared(x, step), extra, formula).to(x.dtype)
    return _Direct.apply(x, step, extra, formula, grad_scale)


# ---- the operators

_library = torch.library.Library("bitstrata", "FRAGMENT")
_library.define(
    "fake_quantize(Tensor x, Tensor step, Tensor? extra, str formula, float[] numbers, float grad_scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(  # of what is not needed, tensors without elements
    "fake_quantize_backward(Tensor grad, Tensor x, Tensor step, Tensor? extra, str formula, float[] numbers, "
    "float grad_scale, bool[] needs) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _run(  # noqa: PLR0917  (the operator's schema)
    x: Tensor, step: Tensor, extra: Tensor | None, name: str, numbers: Sequence[float], factor: float
) -> Tensor:
    formula = restore(name, tuple(numbers))
    return _value(*formula.prepared(x, step), extra, formula).to(x.dtype)


def _run_backward(  # noqa: PLR0917  (the operator's schema)
    grad: Tensor,
    x: Tensor,
    step: Tensor,
    extra: Tensor | None,
    name: str,
    numbers: Sequence[float],
    factor: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    formula = restore(name, tuple(numbers))
    inputs = formula.prepared(x, step)
    d_x, *rest = _gradients(grad, *inputs, extra, formula, needs=(needs[0], needs[1], needs[2]), factor=factor)
    found = (None if d_x is None else d_x.to(x.dtype), *rest)
    like = (x, step, x if extra is None else extra)
    return tuple(  # a formula may ignore its step
        x.new_empty(0) if not n else torch.zeros_like(t) if f is None else f
        for f, n, t in zip(found, needs, like, strict=True)
    )


def _shape(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _shape_backward(  # noqa: PLR0917  (the operator's schema)
    grad: Tensor,
    x: Tensor,
    step: Tensor,
    extra: Tensor | None,
    name: str,
    numbers: Sequence[float],
    factor: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    like = (x, step, extra)
    return tuple(
        x.new_empty(0) if t is None or not n else torch.empty_like(t) for t, n in zip(like, needs, strict=True)
    )


class _Operator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, extra: Tensor | None, *config: Any) -> Tensor:
        ctx.save_for_backward(x, step, extra)
        ctx.config = config
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.bitstrata.fake_quantize(x, step, extra, *config)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        found = torch.ops.bitstrata.fake_quantize_backward(grad, *ctx.saved_tensors, *ctx.config, list(needs))
        return *(f if n else None for f, n in zip(found, needs, strict=True)), None, None, None


_apply: Callable[..., Tensor] = _Operator.apply
_library.impl("fake_quantize", _run, "CompositeExplicitAutograd")
_library.impl("fake_quantize_backward", _run_backward, "CompositeExplicitAutograd")
_library.impl("fake_quantize", _apply, "Autograd")
torch.library.register_fake("bitstrata::fake_quantize", _shape, lib=_library)
torch.library.register_fake("bitstrata::fake_quantize_backward", _shape_backward, lib=_library)
