"""The quantizer contract, for every registered quantizer: a newly registered one is tested without a line here."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitstrata.quantizers import Grid, Quantizer, build, build_rescale, describe, names, register
from bitstrata.quantizers.base import ActivationQuantizer, WeightQuantizer

ROLES = ("weight", "activation", "input")
ALL = [(role, name) for role in ROLES for name in names(role)]
WIDTHS = ({1: 1, 2: 2, 3: 3, 4: 4}, {2: 2, 8: 8}, {1: 4, 3: 4}, {1: 8, 2: 8}, *({b: b} for b in range(1, 9)))
DTYPES = (torch.float32, torch.float64)
FIXED = ("dorefa", "maqd")  # grids on [-1, 1] whatever the size of the weights
RESCALINGS = ("constant", "stddev")


def sample(role: str, signed: bool, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal values, a zero, values far outside, and multiples of 1/8 (ties for many steps)."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    flat = x.view(-1)
    flat[:9] = torch.tensor([0.0, 0.125, 0.25, 0.375, 0.5, 1.0, -0.25, 40.0, -40.0], dtype=torch.float64)
    return (x if signed else x.clamp_min(0)).to(dtype)


def make(role: str, name: str, bits: dict[int, int], *, channels: int | None = None, signed: bool = True) -> Quantizer:
    return build(name, role, {}, bits=bits, **({"channels": channels} if role == "weight" else {"signed": signed}))


def widths_of(role: str, name: str) -> list[dict[int, int]]:
    """Those of `WIDTHS` that the quantizer's own limits allow."""

    def allowed(bits: dict[int, int]) -> bool:
        try:
            make(role, name, bits)
        except ValueError:
            return False
        return True

    return [bits for bits in WIDTHS if allowed(bits)]


CASES = [(role, name, bits) for role, name in ALL for bits in widths_of(role, name)]


def ready(quantizer: Quantizer, x: Tensor, dtype: torch.dtype) -> Quantizer:
    """Initialised at every precision, with steps that are no round numbers."""
    quantizer.to(dtype)
    for p in quantizer.bits:
        quantizer.precision = p
        if isinstance(quantizer, WeightQuantizer | ActivationQuantizer):
            quantizer.init_(x)
    with torch.no_grad():
        for i, parameter in enumerate(quantizer.parameters()):
            parameter.mul_(1.0 + 0.0137 * (i + 1))
    return quantizer


def check_contract(quantizer: Quantizer, x: Tensor) -> None:
    for p, width in quantizer.bits.items():
        quantizer.precision = p
        codes, grid = quantizer.codes(x), quantizer.grid(x)
        value = quantizer(x)
        assert codes.dtype == torch.int32
        assert codes.shape == value.shape == x.shape
        assert value.dtype == x.dtype
        assert int(codes.min()) >= grid.lo
        assert int(codes.max()) <= grid.hi
        assert grid.hi - grid.lo < 2**width
        assert grid.valid is None or set(codes.unique().tolist()) <= set(grid.valid)
        expected = grid.dequantize(codes)
        assert expected.dtype == x.dtype
        assert torch.equal(value, expected)


def test_every_quantizer_is_among_the_cases():
    assert {(role, name) for role, name, _ in CASES} == set(ALL)
    assert {("weight", "nested"), ("weight", "lsq"), ("activation", "uniq"), ("input", "pixels")} <= set(ALL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("role", "name", "bits"), CASES)
def test_forward_is_the_grid_of_the_codes(role, name, signed, bits, dtype):
    x = sample(role, signed, (2, 3, 4, 5), dtype)
    check_contract(ready(make(role, name, bits, signed=signed), x, dtype), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 10), (6, 2, 5), (6, 2, 3, 3), (1, 12)], ids=str)
@pytest.mark.parametrize(("name", "bits"), [(name, bits) for role, name, bits in CASES if role == "weight"])
def test_channel_contract(name, bits, shape, dtype):
    x = sample("weight", True, shape, dtype)
    quantizer = ready(make("weight", name, bits, channels=shape[0]), x, dtype)
    check_contract(quantizer, x)
    assert quantizer.grid(x).scale.numel() in (1, shape[0])


@pytest.mark.parametrize("name", names("weight"))
def test_channels_are_quantized_by_themselves(name):
    x = sample("weight", True, (4, 9), torch.float64)
    both = make("weight", name, {4: 4}, channels=4).double()
    both.init_(x)
    for row in range(4):
        alone = make("weight", name, {4: 4}).double()
        alone.init_(x[row : row + 1])
        assert torch.equal(alone(x[row : row + 1])[0], both(x)[row])


@pytest.mark.parametrize("channels", [None, 5])
@pytest.mark.parametrize("name", names("weight"))
def test_all_zero_weights(name, channels):
    x = torch.zeros(5, 4)
    quantizer = make("weight", name, {2: 2, 4: 4} if describe(name, "weight").cls.nested else {4: 4}, channels=channels)
    quantizer.init_(x)
    check_contract(quantizer, x)
    if name in FIXED:
        assert float(quantizer(x).detach().abs().max()) <= float(quantizer.grid(x).scale.max())  # next to zero
    else:
        assert float(quantizer(x).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("name", [name for name in names("weight") if name not in FIXED])
def test_weights_that_are_all_alike(name):
    """An averaging filter has no deviation, but a magnitude."""
    x = torch.full((2, 9), 1 / 9)
    quantizer = make("weight", name, {4: 4})
    quantizer.init_(x)
    torch.testing.assert_close(quantizer(x), x, rtol=0.3, atol=0)


@pytest.mark.parametrize("name", names("weight"))
def test_weight_gradients_are_finite_and_reach_every_parameter(name):
    nested = describe(name, "weight").cls.nested
    quantizer = make("weight", name, {2: 2, 4: 4} if nested else {4: 4}, channels=6)
    x = sample("weight", True, (6, 8), torch.float32).requires_grad_()
    quantizer.init_(x)
    for p in quantizer.bits:
        quantizer.precision = p
        quantizer(x).square().sum().backward()
    for tensor in (x, *quantizer.parameters()):
        assert tensor.grad.shape == tensor.shape
        assert bool(torch.isfinite(tensor.grad).all())
        assert float(tensor.grad.abs().sum()) > 0


@given(
    values=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=30),
    source=st.integers(2, 8),
    step=st.floats(0.015625, 1.0, width=32),
    name=st.sampled_from([n for n in names("weight") if describe(n, "weight").cls.nested]),
)
@settings(max_examples=150, deadline=None)
def test_nested_codes_are_the_upper_bits(values, source, step, name):
    lowest = 1 if name == "nested" else 2
    x = torch.tensor([*values, 0.0, step, -step, 2 * step])
    quantizer = build(name, "weight", {}, bits={b: b for b in range(lowest, source + 1)})
    quantizer.init_(x)
    with torch.no_grad():
        quantizer.step.fill_(step)
    wider = None
    for bits in range(source, lowest - 1, -1):
        quantizer.precision = bits
        codes = quantizer.codes(x)
        if wider is not None:
            assert torch.equal(codes, torch.div(wider, 2, rounding_mode="floor"))
        wider = codes


@pytest.mark.parametrize("rescaling", RESCALINGS)
@pytest.mark.parametrize(("name", "bits"), [(name, bits) for role, name, bits in CASES if role == "weight"])
def test_a_rescaled_quantizer_keeps_the_contract(name, bits, rescaling):
    x = sample("weight", True, (6, 10), torch.float32)
    inner = ready(make("weight", name, bits), x, torch.float32)
    quantizer = build_rescale(rescaling, {}, inner)
    check_contract(quantizer, x)
    for p in bits:
        quantizer.precision = p
        assert torch.equal(quantizer.codes(x), inner.codes(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("role", "name", "bits"), CASES)
def test_half_precision_inputs_round_the_value_once(role, name, bits, dtype):
    """A float32 grid applied to half-precision inputs: values of the grid, to the half type's own rounding."""
    x = sample(role, False, (4, 12), torch.float32).clamp(-8, 8)
    quantizer = ready(make(role, name, bits, signed=False), x, torch.float32)
    half = x.to(dtype)
    for p in bits:
        quantizer.precision = p
        value, codes, grid = quantizer(half), quantizer.codes(half), quantizer.grid(half)
        assert value.dtype == dtype
        exact = grid.dequantize(codes).double()
        assert bool((value.double() - exact).abs().le(exact.abs() * torch.finfo(dtype).eps + 1e-6).all())


@pytest.mark.parametrize(("role", "name", "bits"), CASES)
def test_memory_layout_does_not_matter(role, name, bits):
    x = sample(role, False, (4, 6, 5, 3), torch.float32)
    quantizer = ready(make(role, name, bits, signed=False), x, torch.float32)
    layouts = [x.to(memory_format=torch.channels_last), x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)]
    for p in bits:
        quantizer.precision = p
        expected, codes = quantizer(x), quantizer.codes(x)
        for other in layouts:
            assert not other.is_contiguous()
            assert torch.equal(quantizer(other), expected)
            assert torch.equal(quantizer.codes(other), codes)
            other.requires_grad_()
            quantizer(other).sum().backward()
            plain = x.clone().requires_grad_()
            quantizer(plain).sum().backward()
            torch.testing.assert_close(other.grad, plain.grad, rtol=1e-5, atol=1e-6)
            other.requires_grad_(False)
            other.grad = None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("role", "name", "bits"), CASES)
def test_not_a_number_is_not_hidden(role, name, bits, dtype):
    """A NaN among trained inputs gives NaN, as it would in a float network."""
    x = sample(role, False, (4, 10), dtype)
    quantizer = ready(make(role, name, bits, signed=False), x, dtype)
    bad = x.clone()
    bad[2, 3] = float("nan")
    assert bool(quantizer(bad)[2, 3].isnan())


@pytest.mark.parametrize(("role", "name", "bits"), CASES)
def test_state_dict_round_trip(role, name, bits):
    x = sample(role, False, (4, 10), torch.float32)
    quantizer = ready(make(role, name, bits, signed=False), x, torch.float32)
    twin = make(role, name, bits, signed=False)
    twin.load_state_dict(copy.deepcopy(quantizer.state_dict()), strict=True)
    twin.eval()
    for p in bits:
        quantizer.precision = twin.precision = p
        assert torch.equal(twin(x), quantizer(x))
    assert twin.state_dict().keys() == quantizer.state_dict().keys()


@pytest.mark.parametrize(("role", "name"), ALL)
def test_records_and_documentation(role, name):
    record = describe(name, role)
    assert (record.name, record.role) == (name, role)
    assert record.description
    assert "Source" in record.cls.__doc__ or role == "input"
    assert re.search(r"value\w* =", record.cls.__doc__)


@pytest.mark.parametrize(("role", "name"), ALL)
def test_unknown_options_are_named(role, name):
    options = ", ".join(describe(name, role).options) or "none"
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole text is compared below)
        build(name, role, {"sharpness": 2, "blur": 1}, bits={2: 2})
    assert str(caught.value) == f"{role} quantizer {name!r} has no option 'blur', 'sharpness'; it has: {options}"


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"no weight quantizer named 'nestd'; there are: .*; did you mean 'nested'\?$"):
        describe("nestd", "weight")
    with pytest.raises(ValueError, match=r"no activation quantizer named 'zzzz'; there are: [a-z0-9_, ]*$"):
        describe("zzzz", "activation")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match=r"register: a weight quantizer named 'lsq' exists: LSQWeight"):
        register("lsq", "weight", "again")(Quantizer)


@pytest.mark.parametrize(("role", "name"), ALL)
def test_bits_are_checked(role, name):
    cls = describe(name, role).cls.__name__
    with pytest.raises(ValueError, match=rf"{cls}: bits must name at least one precision"):
        build(name, role, {}, bits={})
    if role != "input":  # pixels are 8 bits at every precision
        with pytest.raises(ValueError, match=rf"{cls}: bits must be 1..8, got 9 at precision 3"):
            build(name, role, {}, bits={3: 9})


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"NestedSymmetric: scales must be 'free' or 'tied', got 'loose'"):
        build("nested", "weight", {"scales": "loose"}, bits={2: 2})
    with pytest.raises(ValueError, match=r"LSQWeight: one width for all precisions, got \[2, 3\]"):
        build("lsq", "weight", {}, bits={2: 2, 3: 3})
    with pytest.raises(ValueError, match=r"LSQWeight: undefined at 1 bit \(the largest code is 0\)"):
        build("lsq", "weight", {}, bits={1: 1})
    for name, cls in (("lsq", "LSQActivation"), ("uniq", "UniqActivation")):
        with pytest.raises(ValueError, match=rf"{cls}: numel must be 'sample' or 'batch', got 'pixel'"):
            build(name, "activation", {"numel": "pixel"}, bits={2: 2})


# ---- the base


def test_a_grid_dequantizes_rows():
    grid = Grid(torch.tensor([1.0, 10.0]), 0.5, -2, 1)
    codes = torch.tensor([[[-2, 0]], [[1, 0]]], dtype=torch.int32)
    assert grid.dequantize(codes).tolist() == [[[-1.5, 0.5]], [[15.0, 5.0]]]
    assert Grid(torch.tensor([0.5]), 0.0, 0, 3).dequantize(codes[0]).tolist() == [[-1.0, 0.0]]


def test_the_contract_is_abstract_where_it_must_be():
    with pytest.raises(TypeError, match=r"abstract methods? .*codes.*grid.*init_"):
        Quantizer({2: 2})
    quantizer = build("lsq", "weight", {}, bits={2: 2})
    assert isinstance(quantizer, nn.Module)
    assert "bits=[2], per=tensor, signed=True" in repr(quantizer)
