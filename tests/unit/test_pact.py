"""PACT and CG-PACT: worked examples, closed-form gradients, both sides, initial levels, integer inference."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor

from bitstrata.functional import optimal_step
from bitstrata.quantizers import LayerFacts, build
from bitstrata.quantizers.pact import CGPactActivation, PactActivation

F64 = torch.float64
X = [-1.0, 0.1, 0.5, 0.9, 1.3, 1.9, 2.0, 3.0]
VALUES = {
    1: [0, 0, 0, 0, 2, 2, 2, 2],
    2: [0, 0, 2 / 3, 2 / 3, 4 / 3, 2, 2, 2],
    4: [0, 0.1333333, 0.5333333, 0.9333333, 1.3333333, 1.8666667, 2, 2],
}
SUMS = {1: 1.65, 2: 1.9833333, 4: 2.05}
CG_TERMS = [0, -0.05, 0.0833333, -0.1166667, 0.0166667, 0.05, 1, 1]


def pact(bits: int = 2, name: str = "pact", *, signed: bool = False, **options: object) -> PactActivation:
    quantizer = build(name, "activation", {"init": 2.0, **options}, bits={bits: bits}, signed=signed).double()
    assert isinstance(quantizer, PactActivation)
    return quantizer


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=F64)


def near(actual: Tensor, expected: object, tolerance: float = 5e-8) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def gradients(quantizer: PactActivation, x: Tensor, upstream: Tensor) -> tuple[Tensor, float]:
    x = x.clone().requires_grad_()
    quantizer.zero_grad()
    quantizer(x).backward(upstream)
    return x.grad, quantizer.step.grad.item()


def terms(quantizer: PactActivation, values: list[float]) -> list[float]:
    """What each input adds to the gradient of alpha."""
    return [gradients(quantizer, tensor([v]), torch.ones(1, dtype=F64))[1] for v in values]


def mixed(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=F64).mul_(2)


# ---- values and gradients


@pytest.mark.parametrize("name", ["pact", "cg_pact"])
@pytest.mark.parametrize("bits", VALUES)
def test_worked_examples(bits, name):
    quantizer = pact(bits, name)
    near(quantizer(tensor(X)).detach(), VALUES[bits], 4e-8)
    dx, dalpha = gradients(quantizer, tensor(X), torch.ones(8, dtype=F64))
    assert dx.tolist() == [0, 1, 1, 1, 1, 1, 0, 0]
    assert dalpha == pytest.approx(2 if name == "pact" else SUMS[bits], abs=5e-8)


def test_every_term_of_the_gradient():
    near(tensor(terms(pact(2, "cg_pact"), X)), CG_TERMS)
    near(tensor(terms(pact(2), X)), [0, 0, 0, 0, 0, 0, 1, 1], 0)


def test_the_option_and_the_name_agree():
    x, upstream = mixed(3, 7), mixed(3, 7).flip(0)
    assert gradients(pact(3, gradient="cg"), x, upstream)[1] == gradients(pact(3, "cg_pact"), x, upstream)[1]
    assert gradients(pact(3, gradient="pact"), x, upstream)[1] == gradients(pact(3), x, upstream)[1]
    assert gradients(pact(3), x, upstream)[1] != gradients(pact(3, "cg_pact"), x, upstream)[1]


def closed_form(x: float, alpha: float, bits: int, gradient: str, double_side: bool) -> tuple[float, float, float]:
    """value, dx, dalpha of one input, for alpha > 0."""
    a = 2**bits - 1
    if x >= alpha:
        return alpha, 0.0, 1.0
    if double_side:
        if x <= -alpha:
            return -alpha, 0.0, -1.0
        q = 2 * round(a * (x / alpha + 1) / 2) / a - 1  # python rounds half to even too
    else:
        if x <= 0:
            return 0.0, 0.0, 0.0
        q = round(a * (x / alpha)) / a
    return alpha * q, 1.0, q - x / alpha if gradient == "cg" else 0.0


@pytest.mark.parametrize("double_side", [False, True])
@pytest.mark.parametrize("gradient", ["pact", "cg"])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("alpha", [0.75, 2.0, -2.0])
def test_closed_form(alpha, bits, gradient, double_side):
    points = [-3.0, -2.0, -0.75, -0.6, -0.0, 0.0, 0.25, 0.375, 0.5, 0.75, 1.0, 1.7, 2.0, 5.0]
    expected = [closed_form(x, abs(alpha), bits, gradient, double_side) for x in points]
    quantizer = pact(bits, signed=True, gradient=gradient, double_side=double_side)
    with torch.no_grad():
        quantizer.step.fill_(alpha)
    upstream = torch.linspace(-1, 2, len(points), dtype=F64)
    dx, dalpha = gradients(quantizer, tensor(points), upstream)
    near(quantizer(tensor(points)).detach(), [e[0] for e in expected], 1e-14)
    near(dx, [float(g) * e[1] for g, e in zip(upstream, expected, strict=True)], 0)
    total = sum(float(g) * e[2] for g, e in zip(upstream, expected, strict=True))
    assert dalpha == pytest.approx(total if alpha > 0 else -total, abs=1e-12)


def test_a_level_of_zero_can_grow_again():
    quantizer = pact(2)
    with torch.no_grad():
        quantizer.step.zero_()
    x = tensor([0.5, -1.0])
    assert float(quantizer(x).detach().abs().max()) <= 1e-8
    assert gradients(quantizer, x, torch.ones(2, dtype=F64))[1] == 1


# ---- the contract


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("double_side", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_forward_is_the_grid_of_the_codes(signed, double_side, dtype):
    quantizer = build("cg_pact", "activation", {"double_side": double_side}, bits={b: b for b in (1, 2, 3, 4, 8)},
                      signed=signed).to(dtype)  # fmt: skip
    x = (mixed(2, 3, 4, 4) * 5).to(dtype)
    for p, width in quantizer.bits.items():
        assert p == width  # two-sided codes are symmetric, so one bit has two useful levels
        quantizer.precision = p
        with torch.no_grad():
            quantizer.step.mul_(0.7 + 0.1 * p)
        grid, codes, value = quantizer.grid(), quantizer.codes(x), quantizer(x).detach()
        assert torch.equal(value, grid.dequantize(codes))
        assert value.dtype == dtype
        symmetric = signed and double_side
        assert (int(codes.min()), int(codes.max())) == (grid.lo, grid.hi)
        assert (grid.lo, grid.hi) == ((-(2 ** (p - 1)), 2 ** (p - 1) - 1) if symmetric else (0, 2**p - 1))
        assert grid.offset == (0.5 if symmetric else 0)
        ends = [float(value.min()), float(value.max())]
        alpha = quantizer.step.item()
        assert ends == pytest.approx([-alpha if symmetric else 0, alpha], rel=1e-6)
        for layout in (x.to(memory_format=torch.channels_last), x.transpose(1, 2).contiguous().transpose(1, 2)):
            assert torch.equal(quantizer(layout).detach(), value)
    assert quantizer.shifted == (signed and double_side)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_side", [False, True])
def test_half_precision_rounds_once(dtype, double_side):
    x = (mixed(4, 50) * 3).to(dtype)
    quantizer = build("cg_pact", "activation", {"double_side": double_side}, bits={8: 8}, signed=True)
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))
    assert torch.equal(quantizer.codes(x), quantizer.codes(x.float()))
    dx, dalpha = gradients(quantizer, x, torch.ones_like(x))
    assert dx.dtype == dtype
    assert dalpha == pytest.approx(gradients(quantizer, x.float(), torch.ones(4, 50))[1], abs=1e-4)


def test_what_is_not_a_number_stays_visible():
    quantizer = pact(3)
    assert quantizer(tensor([1.0, float("nan")])).isnan().tolist() == [False, True]
    assert quantizer(tensor([float("inf"), float("-inf")])).tolist() == [2.0, 0.0]


def test_zero_batches_pass():
    quantizer = pact(3)
    dx, dalpha = gradients(quantizer, torch.zeros(2, 3, dtype=F64), torch.ones(2, 3, dtype=F64))
    assert torch.equal(dx, torch.zeros(2, 3, dtype=F64))
    assert dalpha == 0
    assert torch.equal(quantizer(torch.zeros(2, 3, dtype=F64)).detach(), torch.zeros(2, 3, dtype=F64))


def test_cut_negatives_are_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for init in (None, "mse", "minmax"):
            quantizer = build("pact", "activation", {"init": init}, bits={2: 2}, signed=True)
            assert not quantizer.signed
            assert float(quantizer(torch.tensor([[-4.0, 0.5, 1.0]])).detach().min()) == 0


# ---- initial levels


def facts(kind: str) -> LayerFacts:
    return LayerFacts(kind=kind, normalized=True, edge=False)


@pytest.mark.parametrize("name", ["pact", "cg_pact"])
@pytest.mark.parametrize("shared", [False, True])
def test_levels_need_no_data(name, shared):
    quantizer = build(name, "activation", {}, bits={2: 2, 4: 4}, shared=shared).eval()
    for kind, alpha in (("conv", 8.0), ("linear", 10.0)):
        quantizer.adapt_(facts(kind))
        for p in (2, 4):
            quantizer.precision = p
            assert quantizer.step.item() == alpha
            assert float(quantizer.grid().scale) == pytest.approx(alpha / (2**p - 1))
            assert float(quantizer(torch.tensor([99.0])).detach()) == pytest.approx(alpha)
    assert len(list(quantizer.parameters())) == (1 if shared else 2)
    assert quantizer.precision_parameters() == ({} if shared else {p: [quantizer.steps[str(p)]] for p in (2, 4)})


def test_a_given_level_is_kept():
    quantizer = pact(3)
    quantizer.adapt_(facts("linear"))
    quantizer.observing = True
    quantizer(tensor([[50.0, 1.0]]))
    assert quantizer.step.item() == 2.0


def test_a_fixed_level_stays_usable_when_flags_are_reset():
    quantizer = pact(3).eval()
    quantizer.initialized.fill_(False)
    twin = copy.deepcopy(quantizer)
    twin.load_state_dict(quantizer.state_dict())
    assert torch.equal(twin(tensor(X)), pact(3)(tensor(X)))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_levels_from_data(bits, signed):
    x = mixed(8, 20)
    kept = x if signed else x.clamp_min(0)
    levels = [c + 0.5 if signed else float(c) for c in range(-(2**bits) // 2 if signed else 0, 2**bits // (1 + signed))]
    top, power = levels[-1], kept.square().mean()
    constant = optimal_step(tuple(levels), rectified=not signed)
    expected = {
        "minmax": kept.max() if not signed else x.abs().max(),
        "mse": constant * (power if signed else 2 * power).sqrt() * top,
        "lsq": 2 * kept.abs().mean() * top**0.5,
        "paper_bits": kept.abs().max() * top / (2 * top + 1),
    }
    for rule, alpha in expected.items():
        quantizer = pact(bits, signed=signed, double_side=True, init=rule)
        quantizer(x)
        assert quantizer.step.item() == pytest.approx(float(alpha), rel=1e-6), rule
        quantizer.adapt_(facts("linear"))
        assert quantizer.step.item() == pytest.approx(float(alpha), rel=1e-6)


def test_rules_that_need_data_ask_for_it():
    quantizer = pact(2, init="mse").eval()
    for use in (quantizer, quantizer.codes, lambda _: quantizer.grid()):
        with pytest.raises(
            RuntimeError, match=r"^PactActivation: no step size at precision 2: run bitstrata.calibrate_"
        ):
            use(torch.ones(1, 3, dtype=F64))
    quantizer.train()
    assert quantizer(torch.zeros(1, 3, dtype=F64)).tolist() == [[0, 0, 0]]
    assert quantizer.initialized.tolist() == [False]
    for bad in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ValueError, match=r"cannot set the step from a batch of shape \(1, 2\): not finite"):
            quantizer(tensor([[1.0, bad]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_calibration_of_a_fixed_level_refuses_what_is_not_finite(bad):
    quantizer = pact(2)
    quantizer.observing = True
    with pytest.raises(ValueError, match=r"PactActivation: calibration met a batch of shape \(1, 2\): not finite"):
        quantizer(tensor([[1.0, bad]]))


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"PactActivation: gradient must be 'pact' or 'cg', got 'sat'"):
        pact(2, gradient="sat")
    with pytest.raises(ValueError, match=r"CGPactActivation: init must be one of mse, .* or a positive step, got -1.0"):
        pact(2, "cg_pact", init=-1.0)
    with pytest.raises(ValueError, match=r"has no option 'gradient'; it has: init, double_side"):
        pact(2, "cg_pact", gradient="cg")
    assert isinstance(pact(2, "cg_pact"), CGPactActivation)


# ---- integer inference without the normalization (SAT S7)


def folded(total: Tensor, gamma: Tensor, beta: Tensor, *, c: float, alpha: float, top: int) -> Tensor:
    """Code of the next activation from the integer sum, for either sign of gamma; gamma = 0 gives a constant."""
    safe = torch.where(gamma == 0, 1.0, gamma)
    shift, end = beta / (safe * c), alpha / (safe * c)
    code = top / alpha * safe * c * torch.clamp(total + shift, end.clamp_max(0), end.clamp_min(0))
    return torch.where(gamma == 0, top * beta.clamp(0, alpha) / alpha, code).round().to(torch.int32)


def counted(total: Tensor, gamma: Tensor, beta: Tensor, *, c: float, alpha: float, top: int) -> Tensor:
    """The same by comparisons of the integer sum with one threshold a code."""
    code = torch.zeros_like(total, dtype=torch.int32)
    for j in range(1, top + 1):
        level = (j - 0.5) * alpha / top - beta
        threshold = level / torch.where(gamma == 0, 1.0, gamma * c)
        reached = torch.where(gamma > 0, total >= threshold, torch.where(gamma < 0, total <= threshold, level < 0))
        code += reached.to(torch.int32)
    return code


def test_a_tiny_layer_in_integers():
    act, following = pact(2, init=1.0), pact(2, init=2.0)
    weight = build("dorefa", "weight", {}, bits={2: 2}).double()
    w, x = tensor([[0.9, -0.3, 0.9]]), tensor([0.0, 0.35, 1.2])
    integers = 2 * weight.codes(w) + 1
    assert act.codes(x).tolist() == [0, 1, 3]
    assert integers.tolist() == [[3, -1, 3]]
    total = (integers @ act.codes(x)).double()
    assert total.tolist() == [8]
    gamma, beta = tensor([0.5]), tensor([0.25])
    y = gamma * (weight(w) @ act(x)).detach() + beta
    near(y, [0.69444444])
    for form in (folded, counted):
        assert form(total, gamma, beta, c=1 / 9, alpha=2.0, top=3).tolist() == following.codes(y).tolist() == [1]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_integer_forms_equal_the_float_path(bits):
    generator = torch.Generator().manual_seed(bits)
    act, following = pact(bits, init=1.5), pact(bits, init=2.25)
    weight = build("dorefa", "weight", {}, bits={bits: bits}).double()
    w, x = torch.randn(24, 12, generator=generator, dtype=F64), torch.randn(200, 12, generator=generator, dtype=F64)
    gamma, beta = torch.randn(2, 24, generator=generator, dtype=F64).unbind()
    gamma[:4] = 0
    assert bool((gamma < 0).any())
    top = 2**bits - 1
    total = (act.codes(x).double() @ (2 * weight.codes(w) + 1).double().T).round()
    expected = following.codes(gamma * (act(x) @ weight(w).T).detach() + beta)
    assert expected.unique().numel() == top + 1
    for form in (folded, counted):
        assert torch.equal(form(total, gamma, beta, c=1.5 / top**2, alpha=2.25, top=top), expected)
