"""Fused fake quantizers without a step, MaQD's and DoReFa's, against their formulas and against scalar closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_fake import DTYPES, FREE, NAN, name_of, sample
from torch import Tensor

from bitstrata.functional import engine_fake, fused_kernels
from bitstrata.functional.companded import Companded
from bitstrata.functional.dorefa import dorefa_codes, tanh_normalize
from bitstrata.functional.fake_quantize import fake_quantize
from bitstrata.functional.formula import Formula, rule_of
from bitstrata.functional.multi_state import Scaled, Sigmoids, surrogate_slope
from bitstrata_runtime import _engine

SIZES = (1, 2, 7, 8, 15, 17, 63, 64, 65, 129, 4097, 16385)
ONE = torch.ones(1)
BY_CHANNEL = (Companded(4, False, 0.5, True, False), Companded(3, True, 0.5, True, True))


def run(case: Formula, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    value = fake_quantize(leaf, ONE, None, case)
    value.backward(grad)
    return value.detach(), leaf.grad


def upstream(x: Tensor, seed: int = 3) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


def compare(case: Formula, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels, checked to be what ran, against the formula: values to the bit, gradients too where they can be.

    Sigmoids differ by their exponential, in units of the largest slope; with the gradient of a maximum, the elements
    that are the maximum differ by the rounding of a sum.
    """
    inner, step = case.prepared(x, ONE)
    assert engine_fake.forward(inner, step, None, case) is not None
    value, d_x = run(case, x, grad)
    with fused_kernels(False):
        value_, d_x_ = run(case, x, grad)
    for a, b in ((value, value_), (d_x, d_x_)):
        assert a.dtype == b.dtype == x.dtype
        assert a.stride() == b.stride()
    torch.testing.assert_close(value, value_, rtol=0, atol=0, equal_nan=True)
    if isinstance(case, Sigmoids):
        assert_slopes(case, grad, d_x, d_x_.double())
    elif isinstance(case, Companded) and not case.detach_max and not inner.isnan().any():
        largest = (inner.abs() == step).reshape(x.shape)
        torch.testing.assert_close(d_x[~largest], d_x_[~largest], rtol=0, atol=0)
        rough = (0.01 if x.dtype == torch.bfloat16 else 2e-6) * float((grad / step).float().abs().sum())
        torch.testing.assert_close(d_x[largest], d_x_[largest], rtol=0, atol=rough)
    else:
        torch.testing.assert_close(d_x, d_x_, rtol=0, atol=0, equal_nan=True)
    return value, d_x


def assert_slopes(case: Sigmoids, grad: Tensor, found: Tensor, expected: Tensor) -> None:
    """Within 2e-6 of the largest slope, or half a unit of bfloat16's last place."""
    most = float(surrogate_slope(torch.linspace(0, 1, 101, dtype=torch.float64), case.top + 1, case.alpha).max())
    error = (found.double() - expected).abs()
    allowed = 2e-6 * most * case.gain * grad.double().abs()
    if found.dtype == torch.bfloat16:
        allowed += 2**-7 * expected.abs()
    both = found.isnan() & expected.isnan()
    assert bool((both | (error <= allowed)).all()), float((error / allowed).nan_to_num(0).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FREE, ids=name_of)
def test_sizes_ties_bounds_infinity_and_nan(case, dtype):
    for size in SIZES:
        x = sample((size,), torch.tensor([0.25]), dtype, size)  # whose ties are ties of the grids above
        if size > 20 and not isinstance(case, Companded):
            x[size // 2] = NAN
        compare(case, x, upstream(x, size))
    if isinstance(case, Companded):
        for values in ([0.0, 0.0, -0.0], [0.7, -0.7, 0.7, 0.1], [1e-39, -2e-39], [20.0, -30.0, 1.0], [NAN, 1.0]):
            x = torch.tensor(values, dtype=dtype)
            compare(case, x, upstream(x))


@pytest.mark.parametrize("case", FREE, ids=name_of)
def test_layouts(case):
    x = sample((4, 6, 8, 10), torch.tensor([0.3]), torch.float32)
    for other in (
        x.to(memory_format=torch.channels_last),
        x.permute(3, 1, 0, 2),
        x[:, ::2, 1:],
        x[:, :1].expand(-1, 7, -1, -1),
        x[0, 0, 0, 0],
    ):
        for grad in (upstream(other), torch.ones(()).expand(other.shape)):
            compare(case, other, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BY_CHANNEL, ids=name_of)
def test_a_maximum_an_output_channel(case, dtype):
    for shape in ((5, 3, 3, 3), (3, 20_000), (40, 9), (2, 3, 4, 5, 6)):
        x = sample(shape, torch.tensor([0.3]), dtype).clamp(-3, 3)
        x[0] *= 0.01
        found, grad = compare(case, x, upstream(x)), upstream(x)
        if len(shape) == 4:
            last = {"memory_format": torch.channels_last}
            compare(case, x.to(**last), grad.to(**last))
        whole = Companded(case.bits, case.floors, case.offset, False, case.detach_max)
        for row in range(shape[0]):
            alone = run(whole, x[row].clone(), grad[row])
            torch.testing.assert_close(found[0][row], alone[0], rtol=0, atol=0)
            torch.testing.assert_close(
                found[1][row], alone[1], rtol=0.01 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in FREE if isinstance(c, Scaled)], ids=name_of)
def test_scaled_is_the_closed_form(case, dtype):
    x = sample((400,), torch.tensor([0.25]), dtype).nan_to_num(0, 50, -50)
    grad = upstream(x)
    value, d_x = compare(case, x, grad)
    z = x.float() * case.s  # rounded as the products are
    for at, (one, product) in enumerate(zip(z.tolist(), (z * case.rounded).tolist(), strict=True)):
        doubled = case.top != case.rounded
        code = round(product) * (2 if doubled else 1)  # ties to even
        code = min(max(code, -case.top), case.top)
        expected = torch.tensor(code * torch.tensor(1 / case.top).item()).to(dtype)
        torch.testing.assert_close(value[at], expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
        slope = torch.tensor(case.gain if abs(one) < 1 else 0.0)
        torch.testing.assert_close(d_x[at], (grad[at].float() * slope).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in FREE if isinstance(c, Sigmoids)], ids=name_of)
def test_sigmoids_are_the_closed_form(case, dtype):
    x = torch.cat(
        [sample((150,), torch.tensor([0.25]), dtype).nan_to_num(0, 9, -9), torch.linspace(-3, 4, 99).to(dtype)]
    )
    grad = upstream(x)
    value, d_x = compare(case, x, grad)
    expected = []
    for one in x.tolist():
        slopes = 0.0
        for m in range(1, case.top + 1):
            rise = math.exp(-abs(one - (m - 0.5) / case.top) / case.alpha)
            slopes += rise / (1 + rise) ** 2 / case.alpha
        expected.append(slopes * case.gain)
    assert_slopes(case, grad, d_x, grad.double() * torch.tensor(expected, dtype=torch.float64))
    levels = value.double() * case.top
    exact = (x.double() * case.top).clamp(0, case.top)
    near = 0.5 + (1e-5 if dtype == torch.float32 else 2**-8 * case.top)
    assert float((levels - exact).abs().max()) <= near


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in FREE if isinstance(c, Companded)], ids=name_of)
def test_companded_values_are_those_of_the_quotient_and_gradients_its_derivative(case, dtype):
    w = torch.randn(31, 17, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad = upstream(w)
    value, d_x = compare(case, w, grad)
    quotient = tanh_normalize(w.float())
    codes = dorefa_codes(quotient, case.bits, "modified" if case.floors else "original")
    unit = 2.0 ** (1 - case.bits) if case.floors else 2 / (2**case.bits - 1)
    assert torch.equal(value, ((codes + case.offset) * unit).to(dtype))
    leaf = w.double().requires_grad_()
    t = [[math.tanh(v) for v in row] for row in leaf.tolist()]
    peak = max(abs(v) for row in t for v in row)
    inner = sum(g * v / peak for gs, row in zip(grad.tolist(), t, strict=True) for g, v in zip(gs, row, strict=True))
    rough = 0.01 if dtype == torch.bfloat16 else 2e-6
    for i, row in enumerate(t):
        for j, v in enumerate(row):
            through = 0.0 if case.detach_max or abs(v) != peak else inner * math.copysign(1, v)
            expected = (1 - v * v) / peak * (grad[i, j].item() - through)
            scale = abs(expected) + (abs(through) and grad.double().abs().sum().item())
            assert abs(d_x[i, j].item() - expected) <= rough * (scale + 1)


def test_bits_depend_neither_on_threads_nor_on_the_instruction_set(monkeypatch):
    threads = torch.get_num_threads()
    for case in (FREE[2], FREE[5], FREE[8], FREE[9]):
        for dtype in DTYPES:
            x = sample((5, 9_011), torch.tensor([0.25]), dtype)
            grad = upstream(x)
            found = []
            for isa in _engine.available_isas():
                monkeypatch.setenv("BITSTRATA_ISA", isa)
                found.append(run(case, x, grad))
            try:
                torch.set_num_threads(3)
                found.append(run(case, x, grad))
            finally:
                torch.set_num_threads(threads)
            for other in found[1:]:
                for a, b in zip(found[0], other, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_graphs_have_one_node_whose_gradient_is_the_same():
    for case in (FREE[0], FREE[5], FREE[8], FREE[9]):
        x = torch.randn(3, 40)
        given = (x.requires_grad_(), torch.ones(1), None, case.name, case.numbers(), 1.0)
        if case is FREE[8]:  # opcheck takes seconds
            quick = ("test_schema", "test_faketensor")
            torch.library.opcheck(torch.ops.bitstrata.fake_quantize, given, test_utils=quick)
        value, d_x = run(case, x, torch.ones_like(x))
        node = torch.ops.bitstrata.fake_quantize(*given)
        (d_node,) = torch.autograd.grad(node.sum(), x)
        assert torch.equal(node, value)
        assert torch.equal(d_node, d_x)
        step = torch.ones(1, requires_grad=True)  # which these grids do not have
        found = torch.autograd.grad(torch.ops.bitstrata.fake_quantize(x, step, *given[2:]).sum(), (x, step))
        assert torch.equal(found[0], d_x)
        assert not found[1].any()


def test_what_is_kept_for_the_backward_pass():
    kept: list[Tensor] = []
    x = torch.randn(50, requires_grad=True)

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        fake_quantize(x, ONE, None, FREE[0])
        fake_quantize(x, ONE, None, FREE[8])  # its tangent in the place of the weight
    assert [t.numel() for t in kept] == [50, 1, 50, 1]


def test_what_kernels_do_not_take_falls_to_the_formula():
    for case in (Sigmoids(3, 0.04, 1.0), Scaled(511, 511.0, 0.5, 1.0)):
        assert rule_of(case) is None
        x = torch.randn(9, requires_grad=True)
        fake_quantize(x, ONE, None, case).sum().backward()
        assert bool(x.grad.isfinite().all())
    with pytest.raises(ValueError, match=r"sigmoids must be 0\.05 wide or wider, got 0\.01"):
        _engine.FakeRule("sigmoids", 0, 3, factor=0.01)
