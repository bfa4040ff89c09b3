"""Fake quantization: golden values, gradients against scalar closed forms and autograd of straight-through forms.

Every input holds a zero and exact ties.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitstrata.functional import nested_codes, nested_fake_quantize, uniform_codes, uniform_fake_quantize
from bitstrata.functional.reduce import sum_to

TIES = [-3, -2, -1.5, -1.25, -1, -0.75, -0.6, -0.5, -0.25, -0.1, 0, 0.2, 0.25, 0.5, 0.75, 1, 1.4, 1.5, 2, 9]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradients(function, *arguments: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients of sum(upstream * function(*arguments))."""
    leaves = [a.clone().requires_grad_() for a in arguments]
    value = function(*leaves)
    value.backward(torch.ones_like(value) if upstream is None else upstream)
    return value.detach(), [leaf.grad for leaf in leaves]


def elementwise(function, x: Tensor, step: Tensor) -> Tensor:
    """The step's gradient of each element by itself."""
    return torch.stack([gradients(function, v.reshape(1), step)[1][1].sum() for v in x])


def straight_through(x: Tensor, hard: Tensor) -> Tensor:
    return x + (hard - x).detach()


# ---- the uniform grid


def uniform(lo: int, hi: int, grad_scale: float = 1.0, open_range: bool = False):
    return lambda x, s: uniform_fake_quantize(x, s, lo, hi, grad_scale=grad_scale, open_range=open_range)


LSQ_WEIGHTS = double(-3, -0.9, -0.4, 0.1, 0.3, 0.8, 1.4)


@pytest.mark.parametrize(
    ("bits", "values", "mask", "total", "scale"),
    [
        (2, [-1, -1, -0.5, 0, 0.5, 0.5, 0.5], [0, 1, 1, 1, 1, 0, 0], -0.2, 0.37796447),
        (3, [-2, -1, -0.5, 0, 0.5, 1, 1.5], [0, 1, 1, 1, 1, 1, 1], -3.6, 0.21821789),
        (4, [-3, -1, -0.5, 0, 0.5, 1, 1.5], [1] * 7, 0.4, 0.14285714),
    ],
)
def test_lsq_weights(bits, values, mask, total, scale):
    hi = 2 ** (bits - 1) - 1
    g = (LSQ_WEIGHTS.numel() * hi) ** -0.5
    assert g == pytest.approx(scale, abs=1e-8)
    value, (dv, ds) = gradients(uniform(-hi - 1, hi, g), LSQ_WEIGHTS, double(0.5))
    torch.testing.assert_close(value, double(*values), rtol=0, atol=1e-15)
    assert dv.tolist() == mask
    assert ds.item() == pytest.approx(total * scale, abs=4e-8)
    assert gradients(uniform(-hi - 1, hi), LSQ_WEIGHTS, double(0.5))[1][1].item() == pytest.approx(total, abs=1e-12)


def test_lsq_weight_step_gradients_by_element():
    found = elementwise(uniform(-2, 1), LSQ_WEIGHTS, double(0.5))
    torch.testing.assert_close(found, double(-2, -0.2, -0.2, -0.2, 0.4, 1, 1))


def test_lsq_activations():
    x, step = double(0, 0.2, 0.6, 1.3, 1.9, 4), double(0.5)
    value, (dx, ds) = gradients(uniform(0, 3), x, step)
    assert value.tolist() == [0, 0, 0.5, 1.5, 1.5, 1.5]
    assert dx.tolist() == [1, 1, 1, 1, 0, 0]
    torch.testing.assert_close(elementwise(uniform(0, 3), x, step), double(0, -0.4, -0.2, 0.4, 3, 3))
    assert ds.item() == pytest.approx(5.8)


@pytest.mark.parametrize(
    ("hi", "values", "mask", "by_element", "total"),
    [
        (1, [0, 0, 0.5, 0.5, 0.5, 0.5], [0, 1, 1, 0, 0, 0], [0, -0.4, 0.4, 1, 1, 1], 3.0),
        (3, [0, 0, 0.5, 0.5, 1.5, 1.5], [0, 1, 1, 1, 1, 0], [0, -0.4, 0.4, -0.2, 0.4, 3], 3.2),
    ],
)
def test_uniq_activations(hi, values, mask, by_element, total):
    x, step = double(0, 0.2, 0.3, 0.6, 1.3, 2), double(0.5)
    value, (dx, ds) = gradients(uniform(0, hi, open_range=True), x, step)
    assert value.tolist() == values
    assert dx.tolist() == mask
    torch.testing.assert_close(elementwise(uniform(0, hi, open_range=True), x, step), double(*by_element))
    assert ds.item() == pytest.approx(total)


def test_bounds_are_inside_for_lsq_and_outside_for_uniq():
    x, step = double(-1.0, -0.5, 0.0, 0.5, 1.0, 1.5), double(0.5)  # -2 .. 3 in steps
    assert gradients(uniform(-2, 1), x, step)[1][0].tolist() == [1, 1, 1, 1, 0, 0]
    assert gradients(uniform(0, 3, open_range=True), x, step)[1][0].tolist() == [0, 0, 0, 1, 1, 0]


def test_ties_round_to_even():
    x = double(-1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 3.5)
    assert uniform_codes(x, double(1.0), -8, 7).tolist() == [-2, 0, 0, 0, 2, 2, 4]


def scalar_uniform(x: float, s: float, lo: int, hi: int, open_range: bool) -> tuple[float, float, float]:
    """Value, dvalue/dx and dvalue/ds of one number, from the definitions of LSQ eqs. 1-3 and UniQ eq. 5."""
    u = x / s
    code = round(min(max(u, lo), hi))  # Python rounds ties to even as well
    inside = lo < u < hi if open_range else lo <= u <= hi
    return code * s, float(inside), code - u if inside else float(code)


@pytest.mark.parametrize("open_range", [False, True])
@pytest.mark.parametrize(("lo", "hi"), [(0, 1), (0, 3), (0, 255), (-2, 1), (-8, 7)])
def test_uniform_against_the_scalar_form(lo, hi, open_range):
    torch.manual_seed(0)
    x = torch.cat([double(*TIES), torch.randn(50, dtype=torch.float64)])
    g = torch.randn_like(x)
    value, (dx, ds) = gradients(uniform(lo, hi, 0.25, open_range), x, double(0.5), upstream=g)
    expected = double(*[v for row in x.tolist() for v in scalar_uniform(row, 0.5, lo, hi, open_range)]).view(-1, 3)
    torch.testing.assert_close(value, expected[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(dx, g * expected[:, 1], rtol=0, atol=0)
    torch.testing.assert_close(ds, 0.25 * (g * expected[:, 2]).sum().reshape(1))


@pytest.mark.parametrize(("lo", "hi"), [(0, 3), (-4, 3)])
def test_uniform_against_autograd(lo, hi):
    """Autograd through round's straight-through form, off the bounds, where clamp's own convention does not matter."""
    torch.manual_seed(1)
    x, step = torch.randn(200, dtype=torch.float64), double(0.37)
    g = torch.randn_like(x)

    def form(x: Tensor, step: Tensor) -> Tensor:
        u = (x / step).clamp(lo, hi)
        return straight_through(u, u.round()) * step

    value, expected = gradients(form, x, step, upstream=g)
    found, actual = gradients(uniform(lo, hi), x, step, upstream=g)
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(actual, expected)


# ---- the nested grid

GOLDEN = double(-3, -1.2, -0.7, -0.2, 0.1, 0.4, 0.9, 2.6)
ONE = double(1.0)


def nested(source: int, bits: int, grad_scale: float = 1.0):
    return lambda w, d, r: nested_fake_quantize(w, d, r, source, bits, grad_scale=grad_scale)


@pytest.mark.parametrize(
    ("bits", "codes", "values", "by_element", "total"),
    [
        (
            3,
            [-4, -3, -2, -1, 0, 0, 1, 3],
            [-1.75, -1.25, -0.75, -0.25, 0.25, 0.25, 0.75, 1.75],
            [-3.5, -0.1, -0.1, -0.1, 0.3, -0.3, -0.3, 3.5],
            -0.6,
        ),
        (
            2,
            [-2, -2, -1, -1, 0, 0, 0, 1],
            [-1.5, -1.5, -0.5, -0.5, 0.5, 0.5, 0.5, 1.5],
            [-3, -0.6, 0.4, -0.6, 0.8, 0.2, -0.8, 3],
            -0.6,
        ),
        (1, [-1] * 4 + [0] * 4, [-1] * 4 + [1] * 4, [-2, 0.4, -0.6, -1.6, 1.8, 1.2, 0.2, 2], 1.4),
    ],
)
def test_nested_golden_values(bits, codes, values, by_element, total):
    step = double(0.5)
    assert nested_codes(GOLDEN, step, 3, bits).tolist() == codes
    value, (dw, dd, dr) = gradients(nested(3, bits), GOLDEN, step, ONE)
    assert value.tolist() == values
    assert dw.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    found = elementwise(lambda w, d: nested(3, bits)(w, d, ONE), GOLDEN, step)
    torch.testing.assert_close(found, double(*by_element))
    assert dd.item() == pytest.approx(total)
    assert dr.item() == pytest.approx(sum(values))  # dvalue/dr = D 2^(n-b) (c + 1/2)


@pytest.mark.parametrize("source", range(1, 9))
def test_every_code_at_every_width_is_uniqs_grid(source):
    """The shifted code is what UniQ's own grid with step 2^(n-b) D makes of the value at n bits, and of w itself."""
    step = 0.3125
    codes = torch.arange(-(2 ** (source - 1)), 2 ** (source - 1), dtype=torch.float64)
    for inside in (0.0, 0.5, 0.96875):  # the lower border of the cell belongs to it
        w = (codes + inside) * step
        assert torch.equal(nested_codes(w, double(step), source, source), codes)
        for bits in range(1, source + 1):
            wide, half = step * 2 ** (source - bits), 2 ** (bits - 1)
            uniq = (w / wide).floor().clamp(-half, half - 1)
            assert torch.equal(nested_codes(w, double(step), source, bits), uniq)
            value = nested_fake_quantize(w, double(step), ONE, source, bits)
            assert torch.equal(value, wide * (uniq + 0.5))
            again = nested_codes((codes + 0.5) * step, double(step), source, bits)
            assert torch.equal(again, uniq)


@pytest.mark.parametrize(("bits", "codes", "mask"), [(1, 2, "00011000"), (2, 4, "00111100"), (3, 8, "01111110")])
def test_the_source_width_is_uniq(bits, codes, mask):
    """UniQ's golden vector: value, gradient mask and codes; the masks differ from ours by half a step on each side."""
    step = 0.5
    offset = (codes - 1) / 2
    u = GOLDEN / step + offset
    uniq = (u.clamp(0, codes - 1).round() - offset) * step
    torch.testing.assert_close(nested_fake_quantize(GOLDEN, double(step), ONE, bits, bits), uniq)
    inside = (u > 0) & (u < codes - 1)
    assert "".join(str(int(v)) for v in inside) == mask
    ours = gradients(nested(bits, bits), GOLDEN, double(step), ONE)[1][0].bool()
    assert torch.equal(ours, GOLDEN.abs() < step * codes / 2)
    assert bool((ours | ~inside).all())  # wherever UniQ lets gradients through, so do we


def scalar_nested(w: float, d: float, r: float, n: int, b: int) -> tuple[float, float, float, float]:
    """Value and derivatives by w, D and r of one number, written from the definition."""
    u = w / d
    half = 2 ** (n - 1)
    code = min(max(math.floor(u), -half), half - 1) >> (n - b)
    level = 2 ** (n - b) * (code + 0.5)
    inside = abs(u) < half
    return r * d * level, r * inside, r * (level - u if inside else level), d * level


@pytest.mark.parametrize(("source", "bits"), [(1, 1), (2, 1), (3, 3), (4, 1), (4, 2), (4, 4), (8, 1), (8, 5), (8, 8)])
def test_nested_against_the_scalar_form(source, bits):
    torch.manual_seed(2)
    w = torch.cat([double(*TIES), torch.randn(50, dtype=torch.float64)])
    g = torch.randn_like(w)
    for d, r in ((0.25, 1.0), (0.25, 0.75), (0.03125, 1.5)):
        value, found = gradients(nested(source, bits, 0.125), w, double(d), double(r), upstream=g)
        expected = double(*[v for row in w.tolist() for v in scalar_nested(row, d, r, source, bits)]).view(-1, 4)
        torch.testing.assert_close(value, expected[:, 0], rtol=1e-15, atol=0)
        torch.testing.assert_close(found[0], g * expected[:, 1])
        torch.testing.assert_close(found[1], 0.125 * (g * expected[:, 2]).sum().reshape(1))
        torch.testing.assert_close(found[2], 0.125 * (g * expected[:, 3]).sum().reshape(1))


@pytest.mark.parametrize(("source", "bits"), [(1, 1), (3, 1), (4, 2), (4, 4)])
def test_nested_against_autograd(source, bits):
    """value = r D (level + STE), where the code follows u = w/D with slope one inside the range and zero outside."""
    torch.manual_seed(3)
    w, step, ratio = torch.randn(300, dtype=torch.float64), double(0.21), double(0.9)
    w[0] = 0.0
    g = torch.randn_like(w)

    def form(w: Tensor, step: Tensor, ratio: Tensor) -> Tensor:
        half = 2 ** (source - 1)
        u = (w / step).clamp(-half, half)
        level = ((u.floor().clamp(-half, half - 1) / 2 ** (source - bits)).floor() + 0.5) * 2 ** (source - bits)
        return ratio * step * straight_through(u, level)

    value, expected = gradients(form, w, step, ratio, upstream=g)
    found, actual = gradients(nested(source, bits), w, step, ratio, upstream=g)
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(actual, expected)


def test_one_bit_is_the_sign_with_zero_positive():
    w = double(-2.0, -1e-300, 0.0, 1e-300, 2.0)
    assert nested_fake_quantize(w, double(0.25), ONE, 4, 1).tolist() == [-1, -1, 1, 1, 1]


# ---- both


@pytest.mark.parametrize("name", ["uniform", "nested"])
def test_channel_steps_equal_the_rows_by_themselves(name):
    torch.manual_seed(4)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    x[:, 0, 0] = 0.0
    g = torch.randn_like(x)
    steps, ratios = double(0.1, 0.3, 0.7).view(3, 1, 1), double(0.8, 1.0, 1.3).view(3, 1, 1)
    function = uniform(-4, 3, 0.5) if name == "uniform" else nested(4, 2, 0.5)
    extra = [steps] if name == "uniform" else [steps, ratios]
    value, found = gradients(function, x, *extra, upstream=g)
    assert [f.shape for f in found[1:]] == [e.shape for e in extra]
    for row in range(3):
        alone, expected = gradients(function, x[row], *[e[row].reshape(1) for e in extra], upstream=g[row])
        torch.testing.assert_close(value[row], alone)
        torch.testing.assert_close(found[0][row], expected[0])
        for f, e in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(f[row].reshape(1), e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("step_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (4, 1)])
def test_dtypes_and_shapes(dtype, step_dtype, shape):
    x = torch.linspace(-1, 1, 12).view(4, 3).to(dtype)
    step = torch.full(shape, 0.25, dtype=step_dtype)
    for function, extra in ((uniform(-2, 1), [step]), (nested(3, 2), [step, torch.ones_like(step)])):
        value, found = gradients(function, x, *extra)
        assert (value.dtype, value.shape) == (dtype, x.shape)
        assert (found[0].dtype, found[0].shape) == (dtype, x.shape)
        for gradient, argument in zip(found[1:], extra, strict=True):
            assert (gradient.dtype, gradient.shape) == (argument.dtype, argument.shape)


def test_bfloat16_values_are_the_float32_values_rounded_once():
    torch.manual_seed(5)
    x = torch.cat([torch.tensor(TIES), torch.randn(2000)]).bfloat16()
    step, ratio = torch.tensor([0.1237]), torch.tensor([0.871])
    codes = nested_codes(x, step, 4, 2).float()
    exact = (codes + 0.5) * (ratio * step * 4)
    assert torch.equal(nested_fake_quantize(x, step, ratio, 4, 2), exact.bfloat16())
    exact = uniform_codes(x, step, -8, 7).float() * step
    assert torch.equal(uniform_fake_quantize(x, step, -8, 7), exact.bfloat16())


def test_step_gradients_of_many_bfloat16_terms_are_summed_in_float32():
    x = torch.full((100_000,), 9.0, dtype=torch.bfloat16)
    _, (_, ds) = gradients(uniform(0, 1), x, torch.tensor([1.0]))
    assert ds.item() == 100_000  # bfloat16 stops counting at 256


def test_gradient_scale_leaves_the_value_and_the_input_gradient():
    x, step = double(*TIES), double(0.3)
    value, (dx, ds) = gradients(uniform(-2, 1), x, step)
    scaled, (dx2, ds2) = gradients(uniform(-2, 1, 0.5), x, step)
    assert torch.equal(value, scaled)
    assert torch.equal(dx, dx2)
    assert torch.equal(ds2, 0.5 * ds)


@pytest.mark.parametrize("step", [0.0, -1.0, 1e-30])
def test_a_step_driven_through_zero_stays_finite(step):
    x = torch.tensor([-1.0, 0.0, 1.0])
    value, found = gradients(uniform(-2, 1), x, torch.tensor([step]))
    assert value.tolist() == pytest.approx([-2e-8, 0, 1e-8])
    value, more = gradients(nested(2, 1), x, torch.tensor([step]), torch.ones(1))
    assert value.tolist() == pytest.approx([-1e-8, 1e-8, 1e-8])
    assert all(bool(torch.isfinite(g).all()) for g in found + more)


def test_gradients_only_where_asked():
    x = torch.ones(3, requires_grad=True)
    uniform_fake_quantize(x, torch.tensor([0.5]), 0, 3).sum().backward()
    assert x.grad is not None
    step = torch.tensor([0.5], requires_grad=True)
    nested_fake_quantize(torch.ones(3), step, torch.ones(1), 2, 1).sum().backward()
    assert step.grad is not None


def test_sum_to():
    x = torch.arange(6.0).view(2, 3)
    assert sum_to(x, torch.Size([1])).tolist() == [15]
    assert sum_to(x, torch.Size([2, 1])).tolist() == [[3], [12]]
    assert sum_to(x, torch.Size([1, 3])).tolist() == [[3, 5, 7]]
    for shape in ([1], [2, 1]):
        assert sum_to(x.bfloat16(), torch.Size(shape)).dtype == torch.float32
    assert sum_to(x.double(), torch.Size([1])).dtype == torch.float64
