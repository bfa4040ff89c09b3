"""Fused fake quantization against the formulas: values and input gradients to the last bit, sums to their rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from helpers_fake import BY_CHANNEL, CASES, DTYPES, FREE, NAN, name_of, parameters, sample
from torch import Tensor

from bitstrata.functional import engine_fake, fused_kernels
from bitstrata.functional.affine import Affine
from bitstrata.functional.clipping import Clipping
from bitstrata.functional.fake_quantize import fake_quantize
from bitstrata.functional.formula import FORMULAS, Formula, restore
from bitstrata.functional.nested import Nested
from bitstrata.functional.symmetric import Symmetric
from bitstrata.functional.uniform import Uniform
from bitstrata.functional.vertical import Vertical
from bitstrata.quantizers import build, names
from bitstrata_runtime import _engine

ISAS = _engine.available_isas()
SIZES = (*range(1, 11), 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 4095, 4097, 16383, 16385, 40_000)


def run(case: Formula, x: Tensor, step: Tensor, extra: Tensor | None, grad: Tensor) -> list[Tensor | None]:
    """The value, and the gradients of x, step and extra, the last two times 0.37."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, step, extra)]
    value = fake_quantize(leaves[0], leaves[1], leaves[2], case, grad_scale=0.37)
    value.backward(grad)
    return [value.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def identical(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.stride() == b.stride()
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def compare(case: Formula, x: Tensor, step: Tensor, extra: Tensor | None, grad: Tensor) -> list[Tensor | None]:
    """The kernels, checked to be what ran, against the formula."""
    assert engine_fake.forward(x, step, extra, case) is not None
    fused = run(case, x, step, extra, grad)
    with fused_kernels(False):
        eager = run(case, x, step, extra, grad)
    identical(fused[0], eager[0])
    identical(fused[1], eager[1])
    return fused


def closed_form(case: Formula, x: float, u: float, s: float, e: float) -> tuple[float, float, float]:
    """Of one element: the gradients of x, step and extra for an upstream gradient of 1; u = x/s, or (x - e)/s."""
    if isinstance(case, Uniform):
        inside = case.lo < u < case.hi if case.open_range else case.lo <= u <= case.hi
        code = round(min(max(u, case.lo), case.hi))
        return float(inside or case.everywhere), code - u if inside or case.everywhere else code, 0.0
    if isinstance(case, Symmetric):
        most = 2**case.bits - 1
        level = round(min(max(Fraction(u) + Fraction(most, 2), 0), most)) - most / 2  # exact near 0
        inside = abs(u) < most / 2
        return float(inside), level - u if inside else level, 0.0
    if isinstance(case, Nested | Vertical):
        half, power = 2 ** (case.source_bits - 1), 2 ** (case.source_bits - case.bits)
        nested = isinstance(case, Nested)
        clipped = min(max(u, -half), half - 1)
        code = (math.floor(clipped) if nested else round(clipped)) // power
        centre = power * (code + (0.5 if nested else case.grad_offset))
        inside = abs(u) < half if nested else -half <= u <= half - 1
        r = e if nested else 1.0
        return r * inside, r * (centre - u if inside else centre), s * centre if nested else 0.0
    if isinstance(case, Affine):
        inside = 0 <= u <= case.hi
        return float(inside), round(min(max(u, 0), case.hi)) - (u if inside else 0.0), float(not inside)
    assert isinstance(case, Clipping)
    low = -1.0 if case.signed else 0.0
    inside = low <= u <= 1 if case.closed else low < u < 1
    clipped = min(max(u, low), 1.0)
    value = low + (1 - low) * round((clipped - low) / (1 - low) * case.top) / case.top
    return float(inside), (value - u if case.calibrated else 0.0) if inside else clipped, 0.0


def quotient(case: Formula, x: Tensor, step: Tensor, extra: Tensor | None) -> Tensor:
    """u as the formula has it, float32."""
    u = (x.float() - (extra if isinstance(case, Affine) and extra is not None else 0.0)) / step
    return u.bfloat16().float() if case.narrows and x.dtype == torch.bfloat16 else u


def test_every_formula_is_among_the_cases():
    assert {case.name for case in CASES + FREE} == set(FORMULAS)
    assert all(restore(case.name, tuple(case.numbers())) == case for case in CASES + FREE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradients_are_the_closed_forms(case, dtype):
    step, extra = parameters(case)
    x = sample((300,), step, dtype).nan_to_num(0, 7.25, -7.25)
    x = x.clamp(-400, 400)
    grad = torch.randn(300, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = compare(case, x, step, extra, grad)
    e = 0.0 if extra is None else extra.item()
    u = quotient(case, x, step, extra)
    terms = [closed_form(case, *pair, step.item(), e) for pair in zip(x.tolist(), u.tolist(), strict=True)]
    dx, ds, de = torch.tensor(terms, dtype=torch.float64).T
    torch.testing.assert_close(found[1], (grad.float() * dx.float()).to(dtype), rtol=0, atol=0)
    for gradient, each in ((found[2], ds), (found[3], de)):
        if gradient is not None and not getattr(case, "everywhere", False):
            weighted = 0.37 * each * grad.double()
            assert abs(gradient.item() - weighted.sum().item()) <= 2e-6 * weighted.abs().sum().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_sizes_ties_bounds_infinity_and_nan(case, dtype):
    for size in SIZES:
        step, extra = parameters(case, seed=size)
        x = sample((size,), step, dtype, size)
        if size > 20:
            x[size // 2] = NAN
        grad = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        compare(case, x, step, extra, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in CASES if c.name in BY_CHANNEL], ids=name_of)
def test_a_step_an_output_channel(case, dtype):
    for shape in ((5, 3, 3, 3), (8, 2, 1, 5), (3, 20_000), (40, 9), (2, 3, 4, 5, 6)):
        step, extra = parameters(case, shape[0], len(shape))
        x, grad = sample(shape, step, dtype), torch.randn(shape).to(dtype)
        fused = compare(case, x, step, extra, grad)
        if len(shape) == 4:
            last = {"memory_format": torch.channels_last}
            again = compare(case, x.to(**last), step, extra, grad.to(**last))
            if not getattr(case, "everywhere", False):
                torch.testing.assert_close(again[2], fused[2], rtol=1e-5, atol=1e-5)
        for row in range(shape[0]):  # every channel by itself; bfloat16 quotients are rounded only for one step
            one = None if extra is None else extra[row].reshape(1)
            if dtype == torch.float32 or not case.narrows:
                alone = run(case, x[row], step[row].reshape(1), one, grad[row])
                identical(fused[0][row], alone[0].reshape_as(fused[0][row]))
                if not getattr(case, "everywhere", False):  # which says nothing of the step
                    torch.testing.assert_close(fused[2][row].reshape(1), alone[2], rtol=1e-6, atol=1e-6)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 1, 0, 2),
    "every-other": lambda x: x[:, ::2, 1:],
    "expanded": lambda x: x[:, :1].expand(-1, 7, -1, -1),
    "scalar": lambda x: x[0, 0, 0, 0],
    "negative-stride": lambda x: x.flip(1)[..., :3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASES[0], CASES[8], Affine(15), Clipping(15, False, True)], ids=name_of)
def test_layouts(case, layout):
    step, extra = parameters(case)
    x = LAYOUTS[layout](sample((4, 6, 8, 10), step, torch.float32))
    for grad in (torch.randn(x.shape), torch.ones(()).expand(x.shape)):
        compare(case, x, step, extra, grad)


def test_any_subset_of_inputs_may_need_gradients():
    x0, grad = torch.randn(3, 50), torch.randn(3, 50)
    for case in (Nested(4, 2), Affine(15), Uniform(-8, 7)):
        step, extra = parameters(case)
        full = run(case, x0, step, extra, grad)
        inputs = [x0, step, extra]
        for wanted in range(1, 8):
            leaves = [
                None if t is None else t.clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(inputs)
            ]
            if not any(t is not None and t.requires_grad for t in leaves):
                continue
            fake_quantize(*leaves, case, grad_scale=0.37).backward(grad)
            for leaf, expected in zip(leaves, full[1:], strict=True):
                if leaf is not None:
                    assert (leaf.grad is not None) == leaf.requires_grad
                    assert leaf.grad is None or torch.equal(leaf.grad, expected)


def test_bits_depend_neither_on_threads_nor_on_the_instruction_set(monkeypatch):
    threads = torch.get_num_threads()
    for case in (CASES[0], Symmetric(4), Nested(8, 3), CASES[-1], Affine(15), Vertical(8, 2, 0.5, 0.5)):
        for channels in (1, 5) if case.name in BY_CHANNEL else (1,):
            step, extra = parameters(case, channels, 2)
            for dtype in DTYPES:
                x, grad = sample((5, 17_011), step, dtype), torch.randn(5, 17_011).to(dtype)
                found = []
                for isa in ISAS:
                    monkeypatch.setenv("BITSTRATA_ISA", isa)
                    found.append((run if found else compare)(case, x, step, extra, grad))
                try:
                    torch.set_num_threads(3)
                    found.append(run(case, x, step, extra, grad))
                finally:
                    torch.set_num_threads(threads)
                for other in found[1:]:
                    for a, b in zip(found[0], other, strict=True):
                        assert (a is None) == (b is None)
                        assert a is None or bool((a == b).logical_or(a.isnan() & b.isnan()).all())


def test_steps_in_bfloat16_below_zero_and_nan():
    x, grad = torch.randn(700), torch.randn(700)
    for case in (Uniform(-8, 7), Symmetric(3), Vertical(4, 2, 0.375, 0.375)):
        for dtype in DTYPES:
            compare(case, x.to(dtype), torch.tensor([0.3], dtype=torch.bfloat16), None, grad.to(dtype))
    for case in CASES:
        extra = parameters(case)[1]
        for step in (-0.2, 0.0, NAN):
            compare(case, x, torch.tensor([step]), extra, grad)


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_every_registered_quantizer(role):
    """Fused or not, a registered quantizer gives the same; a new one is tested without a line here."""
    for name in names(role):
        for channels in (None, 6) if role == "weight" else (None,):
            for width in (4, 8):
                options = {"channels": channels} if role == "weight" else {"signed": True}
                quantizer = build(name, role, {}, bits={width: width}, **options)
                x = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(1))
                if hasattr(quantizer, "init_"):
                    quantizer.init_(x)
                for dtype in DTYPES:  # sums of sigmoids, and sums over a weight for its maximum, are rounded elsewhere
                    rough = 0.0 if name not in {"maqd", "dorefa"} else 0.01 if dtype == torch.bfloat16 else 5e-6
                    check_quantizer(quantizer, x.to(dtype).to(memory_format=torch.channels_last), rough)


def check_quantizer(quantizer: torch.nn.Module, x: Tensor, rough: float) -> None:
    found = []
    for enabled in (True, False):
        leaf = x.detach().requires_grad_()
        quantizer.zero_grad()
        with fused_kernels(enabled):
            value = quantizer(leaf)
            value.backward(torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype))
        found.append((value.detach(), leaf.grad, [p.grad for p in quantizer.parameters()]))
    (value, dx, rest), (value_, dx_, rest_) = found
    torch.testing.assert_close(value, value_, rtol=0, atol=0)
    torch.testing.assert_close(dx, dx_, rtol=rough, atol=rough)
    loose = 0.02 if x.dtype == torch.bfloat16 else 1e-5
    for a, b in zip(rest, rest_, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=loose, atol=loose)
