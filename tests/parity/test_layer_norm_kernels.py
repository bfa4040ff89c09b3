"""The layer normalization's kernels against its definition in torch: equal to the bit, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitstrata.functional.l1norm import L1_SCALES, nearest, quantized_norm, quantized_norm_codes, symmetric_dynamic
from bitstrata.integer import CounterGenerator
from bitstrata.integer.rounding import CounterRounding
from bitstrata.nn import QuantizedL1LayerNorm
from bitstrata_runtime import _engine

ISAS = tuple(_engine.available_isas())
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LONG = settings(max_examples=700, deadline=None, suppress_health_check=list(HealthCheck))
KINDS = ("gauss", "spread", "shifted", "constant", "zero", "outlier", "whole", "tiny", "huge")
CASES = {
    "rows": st.sampled_from([1, 2, 3, 7, 8, 9, 31, 40]),
    "features": st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 192, 257, 300]),
    "kind": st.sampled_from(KINDS),
    "seed": st.integers(0, 999),
    "l2": st.booleans(),
    "affine": st.sampled_from(["both", "both", "weight", "bias", "none"]),
    "bits": st.sampled_from([8, 8, 8, 5, 2]),
}
PLAIN = {"kind": "gauss", "seed": 1, "affine": "both", "bits": 8}


def matrix(rows: int, features: int, kind: str, seed: int) -> Tensor:
    """(rows, features) float32 of a kind that rounding or a sum could get wrong."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator)
    per_row = torch.exp2(-10 * torch.rand(rows, 1, generator=generator))
    return {
        "gauss": x,
        "spread": x * per_row,
        "shifted": x * 0.1 + 3 * per_row,
        "constant": torch.where(per_row < 0.1, x[:, :1].expand_as(x), x),
        "zero": torch.zeros_like(x),
        "outlier": torch.zeros_like(x).index_put_((torch.tensor(rows // 2), torch.tensor(features - 1)), x[0, 0] * 37),
        "whole": (4 * x).round(),
        "tiny": x * 2.0**-118,
        "huge": x * 2.0**90,
    }[kind]


def check(*, rows: int, features: int, kind: str, seed: int, l2: bool, affine: str, bits: int) -> None:
    """Result, gradient of the input, and those of weight and bias, against autograd of the definition."""
    x = matrix(rows, features, kind, seed).requires_grad_()
    gradient = matrix(rows, features, KINDS[seed % len(KINDS)], seed + 1)
    generator = torch.Generator().manual_seed(seed + 2)
    weight, bias = torch.rand(1, features, generator=generator) - 0.3, torch.randn(1, features, generator=generator)
    given = [
        t.requires_grad_() if affine in {"both", name} else None for name, t in (("weight", weight), ("bias", bias))
    ]
    scale = "1" if l2 or seed % 2 else "sqrt(pi/2)"
    noise = (seed, 2**63 + 5) if seed % 3 else None
    rounding = nearest if noise is None else CounterRounding(CounterGenerator(*noise))
    y, _, _ = quantized_norm(x, *given, (1,), bits=bits, l2=l2, l1_scale=scale, rounding=rounding)
    y.backward(gradient)
    vectors = [None if t is None else t.detach()[0] for t in given]
    for isa in ISAS:
        for threads in (1, 2, 3):
            norm = _engine.LayerNorm(rows, features, bits, l2, 1e-5, L1_SCALES[scale], *vectors, isa, threads)
            codes, out = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape)
            assert norm.forward(x.detach(), codes, out)
            assert torch.equal(out, y)
            assert norm.backward(gradient, codes, noise, out)
            assert torch.equal(out, x.grad)
            if given[0] is not None:
                assert norm.weight_gradient.tolist() == given[0].grad[0].tolist()
            if given[1] is not None:
                assert norm.bias_gradient.tolist() == given[1].grad[0].tolist()


@QUICK
@given(**CASES)
@example(rows=1, features=1, l2=False, **PLAIN)
@example(rows=700, features=200, l2=False, **PLAIN)  # several pieces for several threads
@example(rows=701, features=129, l2=True, **PLAIN)
@example(rows=30000, features=3, l2=False, **PLAIN)  # more rows than small sums hold at a time
@example(rows=3, features=9001, l2=False, **PLAIN)  # a row longer than what is kept in the cache
@example(rows=9, features=1100, l2=True, **PLAIN)
def test_layer_norm(**case):
    check(**case)


@pytest.mark.soak
@LONG
@given(**CASES | {"rows": st.integers(1, 600), "features": st.integers(1, 2200), "seed": st.integers(0, 9999)})
def test_layer_norm_long(**case):
    check(**case)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("l2", [False, True])
def test_sums_of_the_largest_codes_do_not_wrap(isa, l2):
    """Long rows of codes that are all near the end of their range, of one sign."""
    features = 5000
    x = torch.full((3, features), 1.0).requires_grad_()
    with torch.no_grad():
        x[:, ::2] = torch.tensor([[1.0], [-1.0], [0.5]])
    weight = torch.full((1, features), 0.7)
    gradient = torch.where(x > 0, 1.0, -1.0).detach()
    y, _, _ = quantized_norm(x, weight, None, (1,), l2=l2, rounding=nearest)
    y.backward(gradient)
    norm = _engine.LayerNorm(3, features, 8, l2, 1e-5, 1.0, weight[0], None, isa, 1)
    codes, out = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape)
    assert norm.forward(x.detach(), codes, out)
    assert torch.equal(out, y)
    assert norm.backward(gradient, codes, None, out)
    assert torch.equal(out, x.grad)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 24), (2, 3, 4, 6)])
def test_module_by_engine_and_by_definition(isa, l2, shape, monkeypatch):
    monkeypatch.setenv("BITSTRATA_ISA", isa)
    normalized = shape[-2:] if len(shape) == 4 else shape[-1:]
    generator = torch.Generator().manual_seed(3)
    x, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    for rounding in ("nearest", CounterRounding(CounterGenerator(5))):
        norm = QuantizedL1LayerNorm(normalized, l2=l2, rounding=rounding)
        with torch.no_grad():
            norm.weight.normal_(generator=generator)
            norm.bias.normal_(generator=generator)
        for memory in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
            found = memory.detach().requires_grad_()
            y = norm(found)
            assert type(y.grad_fn).__name__ == "_NormalizedBackward"
            norm.zero_grad()
            y.backward(gradient)
            rows, affine = x.reshape(-1, norm.weight.numel()).clone().requires_grad_(), []
            for t in (norm.weight, norm.bias):
                affine.append(t.detach().reshape(1, -1).requires_grad_())
            stream = CounterGenerator(5, norm.rounding.generator.stream - 1) if rounding != "nearest" else None
            draws = nearest if stream is None else CounterRounding(stream)
            want, _, _ = quantized_norm(rows, *affine, (1,), l2=l2, rounding=draws)
            want.backward(gradient.reshape(rows.shape))
            assert torch.equal(y, want.view(shape))
            assert torch.equal(found.grad, rows.grad.view(shape))
            assert torch.equal(norm.weight.grad, affine[0].grad.view(normalized))
            assert torch.equal(norm.bias.grad, affine[1].grad.view(normalized))


def test_module_chooses_the_engine_where_it_can(monkeypatch):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    engine, definition = QuantizedL1LayerNorm(6, rounding="nearest"), QuantizedL1LayerNorm(6)
    y = engine(x)
    assert torch.equal(y, definition(x))
    assert torch.equal(engine(x.bfloat16()), definition(x.bfloat16()))
    monkeypatch.setenv("BITSTRATA_ISA", "sse9")
    assert torch.equal(definition(x), y)  # torch's own draws: no engine
    assert engine.double()(x.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="sse9"):
        engine.float()(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_is_seen(isa, bad, monkeypatch):
    monkeypatch.setenv("BITSTRATA_ISA", isa)
    x = matrix(9, 35, "gauss", 0)
    broken = x.clone()
    broken[8, 34] = bad
    for given_x, gradient in ((broken, x), (x, broken)):
        leaf = given_x.clone().requires_grad_()
        norm = QuantizedL1LayerNorm(35, rounding="nearest")
        y = norm(leaf)
        y.backward(gradient)
        assert y.isnan().all() == (given_x is broken)
        assert y.isfinite().all() == (given_x is x)
        for found in (leaf.grad, norm.weight.grad, norm.bias.grad):
            assert found.isnan().all()
        slow = given_x.clone().requires_grad_()
        want = QuantizedL1LayerNorm(35)(slow)  # torch's draws: the definition
        want.backward(gradient)
        assert torch.equal(want.isnan(), y.isnan())
        assert slow.grad.isnan().all()
    for name in ("weight", "bias"):
        norm = QuantizedL1LayerNorm(35, rounding="nearest")
        with torch.no_grad():
            getattr(norm, name)[3] = bad
        assert norm(x).isnan().all()


@pytest.mark.parametrize("l2", [False, True])
def test_gradient_of_the_definition_in_real_numbers(l2):
    """With a weight for each feature: the float rule, of the quantized gradient, weight and normalized input."""
    x, g, weight = (matrix(5, 12, "gauss", seed).double() for seed in range(3))
    weight = weight[:1] + 0.4
    x.requires_grad_()
    y, _, _ = quantized_norm(x, weight, None, (1,), l2=l2, rounding=nearest)
    y.backward(g)
    out = quantized_norm_codes(x, weight, None, (1,), l2=l2)
    h, sigma = out.normalized.value, out.deviation.value
    of_h = symmetric_dynamic(g).value * out.weight.value
    slope = h if l2 else h.sign()
    together = (of_h * h).mean(1, keepdim=True)
    want = (of_h - of_h.mean(1, keepdim=True) - (slope - slope.mean(1, keepdim=True)) * together) / sigma
    torch.testing.assert_close(x.grad, want, rtol=1e-12, atol=1e-13)


def test_errors_name_the_cause():
    x, codes = torch.ones(4, 3), torch.empty(4, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="a normalization needs at least one row and one feature"):
        _engine.LayerNorm(4, 0, 8, False, 1e-5, 1.0, None, None, "", 1)
    with pytest.raises(ValueError, match=r"bits must be in 2\.\.8, got 9"):
        _engine.LayerNorm(4, 3, 9, False, 1e-5, 1.0, None, None, "", 1)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        _engine.LayerNorm(4, 3, 8, False, 1e-5, 1.0, None, None, "", 0)
    with pytest.raises(ValueError, match="bias must have one element for each feature"):
        _engine.LayerNorm(4, 3, 8, False, 1e-5, 1.0, torch.ones(3), torch.ones(4), "", 1)
    norm = _engine.LayerNorm(4, 3, 8, False, 1e-5, 1.0, None, None, "", 1)
    with pytest.raises(ValueError, match="forward comes first"):
        norm.backward(x, codes, None, torch.empty(4, 3))
    with pytest.raises(ValueError, match=r"out must have the shape of the tensor, \(4, 3\)"):
        norm.forward(x, codes, torch.empty(3, 3))
    with pytest.raises(ValueError, match=r"QuantizedL1LayerNorm: input must end in \(3,\), got shape \(4, 2\)"):
        QuantizedL1LayerNorm(3, rounding="nearest")(x[:, :2])
    with pytest.raises(ValueError, match="the input has no elements"):
        QuantizedL1LayerNorm(3, rounding="nearest")(x[:0])
