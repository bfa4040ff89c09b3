"""The integer products of a training step against int64: every instruction set, one thread and two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers_products import Codes, Conv, guarded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitstrata.integer import (
    Geometry,
    conv_forward,
    conv_input_grad,
    conv_weight_grad,
    engine_products,
    linear_forward,
    linear_input_grad,
    linear_weight_grad,
    shift_quantize,
    weight_codes,
)
from bitstrata_runtime import _engine

ISAS = (*_engine.available_isas(), *_engine.emulated_isas())
THREADS = (1, 2)
KINDS = {
    "generic": ("generic", "generic"),
    "avx2": ("avx2-winograd-wide", "avx2"),
    "avx2vnni": ("avx2vnni", "avx2vnni"),
    "avx512vnni": ("avx512vnni", "avx512vnni"),
    "amx": ("amx", "amx"),
    "amx-emulated": ("amx-emulated", "amx-emulated"),
}
# Depthwise kernels of rows that have none of their own.
DEPTHWISE = {
    "generic": "generic",
    "avx2vnni": "avx2-depthwise",
    "amx": "avx512vnni-depthwise",
    "amx-emulated": "generic",
}


@dataclass(frozen=True)
class Case:
    """A convolution, and codes: bits of x (or g) and of w (or a weight gradient's g), groups of channels, whether codes
    have no sign.
    """

    conv: Conv
    bits: int
    w_bits: int
    groups: int
    unsigned: bool
    fill: str  # "random", "largest", "least"
    seed: int

    def codes(self, shape: tuple[int, ...], *, unsigned: bool, bits: int, which: int) -> Codes:
        """Codes of `bits`; every third an outermost one, or all."""
        hi = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
        lo, rng = 0 if unsigned else -hi, np.random.default_rng((self.seed, which))
        values = rng.integers(lo, hi + 1, shape)
        ends = np.where(rng.integers(0, 2, shape) == 0, lo, hi)
        values = np.where(rng.integers(0, 3, shape) == 0, ends, values)
        values = {"random": values, "largest": np.full(shape, hi), "least": np.full(shape, lo)}[self.fill]
        return guarded(values.astype(np.uint8 if unsigned else np.int8))

    def shifts(self, channels: int, which: int) -> Codes:
        rng = np.random.default_rng((self.seed, which))
        return guarded(rng.integers(0, self.groups, channels).astype(np.uint8))

    def bounds(self, unsigned: bool) -> tuple[int, int]:
        hi = 2**self.bits - 1 if unsigned else 2 ** (self.bits - 1) - 1
        return (0 if unsigned else -hi, hi)


def kernels() -> st.SearchStrategy[tuple[int, int]]:
    return st.sampled_from(((1, 1), (1, 1), (3, 3), (3, 3), (1, 3), (2, 2), (5, 4), (1, 7), (3, 1), (7, 7)))


@st.composite
def convolutions(draw: Any) -> Conv:
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    ins = draw(st.sampled_from((1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 49, 70)))
    outs = draw(st.sampled_from((1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 65)))
    if draw(st.integers(0, 7)) == 0:  # depthwise
        groups, ins, outs = draw(st.sampled_from((2, 7, 16, 33))), 1, 1
    kernel = draw(kernels())
    plain = draw(st.booleans())
    strides, dilations = st.sampled_from((1, 1, 2, 3)), st.sampled_from((1, 1, 2, 3))
    stride = (1, 1) if plain else (draw(strides), draw(strides))
    dilation = (1, 1) if plain else (draw(dilations), draw(dilations))
    padding = (0, 0, 0, 0) if plain and draw(st.booleans()) else tuple(draw(st.integers(0, 3)) for _ in range(4))
    least = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    height = max(draw(st.integers(1, 11)), least[0] - padding[0] - padding[2])
    width = max(draw(st.sampled_from((1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 21))), least[1] - padding[1] - padding[3])
    batch = draw(st.sampled_from((1, 1, 2, 3, 9)))
    return Conv(batch, (height, width), ins * groups, outs * groups, kernel, stride, dilation, padding, groups)


@st.composite
def matrices(draw: Any) -> Conv:
    sizes = st.sampled_from((1, 2, 3, 5, 8, 16, 17, 31, 63, 64, 65, 100, 130))
    return Conv(draw(sizes) * draw(st.sampled_from((1, 1, 5))), (1, 1), draw(sizes), draw(sizes), (1, 1))


def cases() -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        conv=st.one_of(convolutions(), convolutions(), matrices()),
        bits=st.integers(2, 8),
        w_bits=st.integers(2, 8),
        groups=st.sampled_from((1, 1, 2, 4, 8)),
        unsigned=st.booleans(),
        fill=st.sampled_from(("random", "random", "random", "largest", "least")),
        seed=st.integers(0, 2**32),
    )


def wrapped(sums: Codes) -> Codes:
    """What int32 accumulators hold: the sums modulo 2^32."""
    return sums.astype(np.uint64).astype(np.uint32).view(np.int32)


def check_forward(case: Case, isa: str, threads: int) -> None:
    c = case.conv
    x = case.codes(c.x_shape, unsigned=case.unsigned, bits=case.bits, which=0)
    w = case.codes(c.w_shape, unsigned=False, bits=case.w_bits, which=1)
    shift = case.shifts(c.ins, 2) if case.groups > 1 else None
    expected = wrapped(c.forward(x.astype(np.int64) << (0 if shift is None else shift.astype(np.int64)), w))
    acc, values = guarded(np.zeros(c.y_shape, np.int32)), guarded(np.zeros(c.y_shape, np.float32))
    lo, hi = guarded(np.zeros(c.outs, np.int32)), guarded(np.zeros(c.outs, np.int32))
    factor = guarded(np.random.default_rng(0).normal(size=c.outs).astype(np.float32))
    fixed: dict[str, Any] = {**c.arguments(isa, threads), "shift": shift}
    _engine.conv_forward(x, case.bounds(case.unsigned), w, **fixed, acc=acc, lo=lo, hi=hi)
    np.testing.assert_array_equal(acc, expected)
    np.testing.assert_array_equal(lo, expected.min((0, 1, 2)))
    np.testing.assert_array_equal(hi, expected.max((0, 1, 2)))
    _engine.conv_forward(x, case.bounds(case.unsigned), w, **fixed, values=values, factor=factor)
    np.testing.assert_array_equal(values, expected.astype(np.float32) * factor)


def check_input_grad(case: Case, isa: str, threads: int) -> None:
    c = case.conv
    g = case.codes(c.y_shape, unsigned=False, bits=case.bits, which=3)
    w = case.codes(c.w_shape, unsigned=False, bits=case.w_bits, which=1)
    shift = case.shifts(c.outs, 4) if case.groups > 1 else None
    expected = wrapped(c.input_grad(g.astype(np.int64) << (0 if shift is None else shift.astype(np.int64)), w))
    acc, values = guarded(np.zeros(c.x_shape, np.int32)), guarded(np.zeros(c.x_shape, np.float32))
    lo, hi = guarded(np.zeros(c.ins, np.int32)), guarded(np.zeros(c.ins, np.int32))
    factor = guarded(np.random.default_rng(0).normal(size=c.ins).astype(np.float32))
    fixed: dict[str, Any] = {**c.arguments(isa, threads), "shift": shift}
    _engine.conv_input_grad(g, case.bounds(False), w, **fixed, acc=acc, lo=lo, hi=hi, values=values, factor=factor)
    np.testing.assert_array_equal(acc, expected)
    np.testing.assert_array_equal(lo, expected.min((0, 1, 2)))
    np.testing.assert_array_equal(hi, expected.max((0, 1, 2)))
    np.testing.assert_array_equal(values, expected.astype(np.float32) * factor)


def check_weight_grad(case: Case, isa: str, threads: int) -> None:
    c = case.conv
    x = case.codes(c.x_shape, unsigned=case.unsigned, bits=case.bits, which=0)
    g = case.codes(c.y_shape, unsigned=False, bits=case.w_bits, which=5)
    largest = 2 ** (case.w_bits - 1) - 1
    operands = (g, (-largest, largest), x, case.bounds(case.unsigned))
    expected = c.weight_grad(g, x)
    gw, values = guarded(np.zeros(c.w_shape, np.int64)), guarded(np.zeros(c.w_shape, np.float32))
    rng = np.random.default_rng(1)
    outs, ins = guarded(rng.normal(size=c.outs)), guarded(np.exp2(-rng.integers(0, 8, c.ins).astype(np.float64)))
    fixed = c.arguments(isa, threads)
    _engine.conv_weight_grad(*operands, **fixed, gw=gw)
    np.testing.assert_array_equal(gw, expected)
    _engine.conv_weight_grad(*operands, **fixed, values=values, out_factor=outs, in_factor=ins)
    own = ins.reshape(c.groups, 1, -1).repeat(c.outs // c.groups, axis=1).reshape(c.outs, -1)
    np.testing.assert_array_equal(values, (expected * (outs[:, None] * own)[:, :, None, None]).astype(np.float32))


def check(case: Case, isa: str) -> None:
    for threads in THREADS:
        check_forward(case, isa, threads)
        check_input_grad(case, isa, threads)
        check_weight_grad(case, isa, threads)


LIMITS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=250, **LIMITS)
@given(case=cases())
def test_products_equal_int64(isa: str, case: Case) -> None:
    check(case, isa)


@pytest.mark.soak
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=2000, **LIMITS)
@given(case=cases())
def test_products_equal_int64_long(isa: str, case: Case) -> None:
    check(case, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "conv",
    [
        Conv(3, (40, 33), 16, 20, (3, 3), padding=(1, 1, 1, 1)),
        Conv(2, (41, 30), 20, 16, (3, 3), stride=(2, 2), padding=(1, 1, 1, 1)),
        Conv(1, (130, 9), 70, 24, (3, 3), padding=(1, 1, 1, 1)),  # several blocks of rows in one image
        Conv(700, (1, 1), 100, 130, (1, 1)),
        Conv(1, (1, 2000), 6, 10, (1, 5), padding=(0, 2, 0, 2)),
        Conv(40, (3, 3), 65, 33, (3, 3), padding=(1, 1, 1, 1)),  # several images in one block
        Conv(3, (2, 2), 160, 200, (3, 3), padding=(1, 1, 1, 1)),  # weights that threads pack together
        Conv(2, (5, 4), 150, 140, (3, 3), stride=(2, 2), padding=(1, 1, 1, 1)),
        Conv(3, (1, 1), 1050, 1100, (1, 1)),  # and in which they look for the largest together
        Conv(5, (1, 1), 600, 1, (1, 1)),
        Conv(5, (1, 1), 1, 600, (1, 1)),
    ],
)
def test_larger_maps(isa: str, conv: Conv) -> None:
    for bits, groups in ((4, 4), (8, 4)):
        check(Case(conv, bits, 4, groups, False, "random", bits), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_few_outputs_of_every_width(isa: str) -> None:
    for width in range(1, 41):
        conv = Conv(2, (3, width), 1 + 5 * width % 16, 1 + width % 16, (3, 3), padding=(1, 1, 1, 1))
        check(Case(conv, 4 + width % 5, 4, 1 + width % 2, width % 3 == 0, "random", width), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(
    "conv",
    [
        Conv(3, (7, 7), 104, 170, (3, 3), padding=(1, 1, 1, 1)),  # more than 2^17 weights
        Conv(2, (5, 6), 129, 133, (3, 3), (2, 2), padding=(0, 1, 1, 0)),
        Conv(2, (6, 9), 70, 201, (3, 3), padding=(1, 0, 1, 2)),
        Conv(2, (4, 5), 400, 350, (1, 1), (1, 1), padding=(1, 0, 0, 1)),
    ],
)
@pytest.mark.parametrize("widths", [(4, 4, True), (7, 7, False), (6, 7, True), (8, 8, True)])
def test_gradients_of_many_weights(isa: str, threads: int, conv: Conv, widths: tuple[int, int, bool]) -> None:
    bits, of_gradient, unsigned = widths
    for fill in ("random", "largest"):
        check_weight_grad(Case(conv, bits, of_gradient, 1, unsigned, fill, 1), isa, threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("dtype", "code"), [(np.int8, -128), (np.int8, 127), (np.uint8, 255)])
@pytest.mark.parametrize(
    "conv",
    [
        Conv(300_000, (1, 1), 2, 3, (1, 1)),
        Conv(1, (420, 420), 1, 2, (2, 1)),
        Conv(4, (210, 210), 2, 2, (1, 1), groups=2),
    ],
)
def test_weight_gradient_beyond_int32(isa: str, threads: int, dtype: type, code: int, conv: Conv) -> None:
    x, g = np.full(conv.x_shape, code, dtype), np.full(conv.y_shape, -128, np.int8)
    gw = np.zeros(conv.w_shape, np.int64)
    ranges = (-128, 127), (np.iinfo(dtype).min, np.iinfo(dtype).max)
    _engine.conv_weight_grad(g, ranges[0], x, ranges[1], **conv.arguments(isa, threads), gw=gw)
    count = conv.batch * conv.out_size[0] * conv.out_size[1]
    assert abs(count * code * -128) > 2**31
    assert (gw == count * code * -128).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight", [31, -31])
@pytest.mark.parametrize("shift", [(7, 0), (0, 7), (7, 6)])
def test_weights_of_one_sign_some_of_which_are_shifted(isa: str, weight: int, shift: tuple[int, int]) -> None:
    conv = Conv(1, (7, 7), 31, 2, (7, 7))
    g, w, acc = np.ones(conv.y_shape, np.int8), np.full(conv.w_shape, weight, np.int8), np.zeros(conv.x_shape, np.int32)
    shifts = np.array(shift, np.uint8)
    _engine.conv_input_grad(g, (-1, 1), w, **conv.arguments(isa, 1), shift=shifts, acc=acc)
    assert (acc == weight * (1 << np.array(shift)).sum()).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("largest", "code"), [(63, -63), (63, 63), (127, -127), (127, 127)])
def test_three_columns_of_weights_beyond_int32(isa: str, largest: int, code: int) -> None:
    side = 380 if largest == 127 else 760
    conv = Conv(1, (side, side), 9, 2, (1, 3))
    x, g = np.full(conv.x_shape, code, np.int8), np.full(conv.y_shape, -largest, np.int8)
    g[:, :, ::2] = largest
    x[:, :, ::2, 1] = -code  # alternating signs: sums and differences of two are largest in one form
    gw = np.zeros(conv.w_shape, np.int64)
    _engine.conv_weight_grad(g, (-largest, largest), x, (-largest, largest), **conv.arguments(isa, 2), gw=gw)
    assert abs(gw).max() > 2**31
    np.testing.assert_array_equal(gw, conv.weight_grad(g, x))


@pytest.mark.parametrize("isa", ISAS)
def test_the_kernels_are_those_of_the_instruction_set(isa: str) -> None:
    sizes = {"size": (8, 8), "channels": (16, 24), "kernel": (3, 3), "groups": 1}
    eight, four = {"range": (-128, 127), "weights": (-128, 127)}, {"range": (-7, 7), "weights": (-7, 7)}
    assert _engine.product_kernels(isa, **sizes, **eight) == KINDS[isa]
    narrow = "avx2-narrow" if isa == "avx2" else KINDS[isa][0]
    winograd = f"{isa}-winograd" if isa in ("avx2", "avx2vnni", "avx512vnni") else KINDS[isa][1]
    assert _engine.product_kernels(isa, **sizes, **four) == (narrow, winograd)
    depthwise = {**sizes, "channels": (16, 16), "groups": 16}
    assert _engine.product_kernels(isa, **depthwise, **four)[0] == DEPTHWISE.get(isa, f"{isa}-depthwise")


def test_the_environment_names_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"size": (8, 8), "channels": (16, 24), "kernel": (3, 3), "groups": 1}
    for isa in ISAS:
        monkeypatch.setenv("BITSTRATA_ISA", isa)
        assert _engine.product_kernels("", **sizes, range=(-128, 127), weights=(-128, 127)) == KINDS[isa]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, signs of zeros apart."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def gauss(*shape: int, seed: int, axis: int = 1) -> torch.Tensor:
    """Channels whose ranges differ by factors of up to 2^6."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    ranges = torch.exp2(-6 * torch.rand(shape[axis], generator=torch.Generator().manual_seed(seed + 1)))
    return x * ranges.reshape([-1 if d == axis % len(shape) else 1 for d in range(len(shape))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("bits", "groups"), [(2, 8), (3, 4), (4, 4), (5, 4), (6, 4), (7, 2), (8, 1), (8, 4), (8, 8)])
def test_form_engine_equals_form_float64(bits: int, groups: int, dtype: torch.dtype) -> None:
    for unsigned in (False, True):
        x = gauss(3, 6, 9, 7, seed=bits)
        xq = shift_quantize(x.abs() if unsigned else x, bits, groups, unsigned_nonneg=unsigned)
        weight = gauss(8, 3, 3, 2, seed=5)
        out, inner = weight_codes(weight, bits, "out", 2), weight_codes(weight, bits, "in", 2)
        geometry = Geometry((2, 1), (1, 2), (1, 2), 2)
        gq = shift_quantize(gauss(3, 8, *geometry.output((9, 7), (3, 2)), seed=7), bits, groups)
        a, b = ({"form": form, "dtype": dtype} for form in ("engine", "float64"))
        assert same(conv_forward(xq, out, geometry, **a), conv_forward(xq, out, geometry, **b))
        assert same(
            conv_input_grad(gq, inner, (9, 7), geometry, **a), conv_input_grad(gq, inner, (9, 7), geometry, **b)
        )
        assert same(conv_weight_grad(gq, xq, (3, 2), geometry, **a), conv_weight_grad(gq, xq, (3, 2), geometry, **b))
        line = replace(xq, codes=xq.codes[:, :, 0])
        kernel, along = weight_codes(weight[:, :, 0], bits, "out", 2), Geometry(1, 1, 2, 2)
        result = conv_forward(line, kernel, along, **a)
        assert same(result, conv_forward(line, kernel, along, **b))
        rows = shift_quantize(gauss(2, 5, 12, seed=9, axis=2), bits, groups, 2)
        grads = shift_quantize(gauss(2, 5, 10, seed=10, axis=2), bits, groups, 2)
        matrix = gauss(10, 12, seed=11)
        out, inner = weight_codes(matrix, bits, "out"), weight_codes(matrix, bits, "in")
        assert same(linear_forward(rows, out, **a), linear_forward(rows, out, **b))
        assert same(linear_input_grad(grads, inner, **a), linear_input_grad(grads, inner, **b))
        assert same(linear_weight_grad(grads, rows, **a), linear_weight_grad(grads, rows, **b))


def test_form_engine_runs_the_engine_where_the_bound_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    forward = engine_products.forward
    monkeypatch.setattr(engine_products, "forward", lambda *a, **k: called.append(1) or forward(*a, **k))
    w = weight_codes(gauss(3, 20_000, seed=1), 8)
    four, eight = (shift_quantize(gauss(2, 20_000, seed=2), bits, 4) for bits in (4, 8))
    linear_forward(four, replace(w, bits=8), form="engine")
    assert len(called) == 1
    wide = linear_forward(eight, w, form="engine")  # 20,000 * 127 * 127 << 3 is beyond int32
    assert len(called) == 1
    assert same(wide, linear_forward(eight, w, form="float64"))
    assert engine_products.fits(eight, 16_643, 127)
    assert not engine_products.fits(eight, 16_644, 127)


def test_channels_last_goes_in_without_a_copy_and_comes_out() -> None:
    x = torch.zeros(2, 5, 4, 3, dtype=torch.int8).to(memory_format=torch.channels_last)
    assert engine_products.maps(x).data_ptr() == x.data_ptr()
    q = shift_quantize(gauss(2, 5, 4, 3, seed=0), 4)
    y = conv_forward(q, weight_codes(gauss(6, 5, 3, 3, seed=1), 4), Geometry(padding=1), form="engine")
    assert y.is_contiguous(memory_format=torch.channels_last)


GOOD = Conv(2, (5, 6), 4, 6, (3, 3), padding=(1, 1, 1, 1), groups=2)
X, W = np.zeros(GOOD.x_shape, np.int8), np.zeros(GOOD.w_shape, np.int8)
BYTES = (-128, 127)
ACC, GRAD = np.zeros(GOOD.y_shape, np.int32), np.zeros(GOOD.y_shape, np.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"acc": None}, "conv_forward': neither acc nor values is given"),
        ({"isa": "abacus"}, "isa=abacus: not an instruction set of this build"),
        ({"threads": 0}, "conv_forward': threads is 0, must be at least 1"),
        ({"groups": 0}, "conv_forward': groups is 0, must be at least 1"),
        ({"groups": 1}, "the weight takes 2 channels in each of 1 groups, the input has 4"),
        ({"stride": (2, 1)}, "conv_forward': output height is 5, but an input of 5 has 3 windows"),
        ({"padding": (0, 0, 0, 0)}, "output height is 5, but an input of 5 has 3 windows"),
        ({"range": (-129, 7)}, r"least code is -129, not in -128\.\.127"),
        ({"range": (3, 2)}, r"largest code is 2, not in 3\.\.127"),
        ({"w": W[:, :, :, :0]}, r"kernel is 0, not in 1"),
        ({"x": X.astype(np.int16)}, "x must be int8 or uint8"),
        ({"shift": np.zeros(3, np.uint8)}, r"shift has shape \(3\), must be \(4\)"),
        ({"shift": np.full(4, 24, np.uint8)}, r"shift is 24, not in 0\.\.23"),
        ({"lo": np.zeros(5, np.int32)}, r"lo has shape \(5\), must be \(6\)"),
        ({"values": np.zeros(GOOD.y_shape, np.float32)}, "values and factor must be given together"),
        ({"acc": np.zeros((3, 5, 6, 6), np.int32)}, "input and output have batches of 2 and 3"),
        ({"acc": np.zeros((2, 5, 6, 8), np.int32)}, "the weight has 6 output channels, the output 8"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    call = {"x": X, "range": (-7, 7), "w": W, "acc": ACC, **GOOD.arguments(ISAS[0], 1), **change}
    with pytest.raises(ValueError, match=message):
        _engine.conv_forward(**call)


def test_errors_of_the_weight_gradient() -> None:
    fixed = GOOD.arguments(ISAS[0], 1)
    with pytest.raises(ValueError, match="conv_weight_grad': neither gw nor values is given"):
        _engine.conv_weight_grad(GRAD, BYTES, X, BYTES, **fixed)
    with pytest.raises(ValueError, match="values needs out_factor and in_factor"):
        _engine.conv_weight_grad(GRAD, BYTES, X, BYTES, **fixed, values=np.zeros(GOOD.w_shape, np.float32))
    wider = X.astype(np.int32)
    with pytest.raises(ValueError, match="x must be int8 or uint8"):
        _engine.conv_weight_grad(GRAD, BYTES, wider, BYTES, **fixed, gw=np.zeros(GOOD.w_shape, np.int64))
    wide = Conv(1, (1, 70_000), 1, 1, (1, 3), padding=(0, 1, 0, 1))
    with pytest.raises(ValueError, match="output width is 70000, sums of rows longer than 65793 may leave int32"):
        _engine.conv_weight_grad(
            np.zeros(wide.y_shape, np.int8),
            BYTES,
            np.zeros(wide.x_shape, np.uint8),
            (0, 255),
            **wide.arguments(ISAS[0], 1),
            gw=np.zeros(wide.w_shape, np.int64),
        )
