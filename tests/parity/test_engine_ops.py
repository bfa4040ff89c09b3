"""Every operation of the engine, on every instruction set, equals plain numpy formulas and the reference executor."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitstrata_runtime import plan as p
from bitstrata_runtime.engine import EngineExecutor, available_isas, emulated_isas
from bitstrata_runtime.reference import ReferenceExecutor

Ints = NDArray[np.int64]
LIMITS = {"u8": (0, 255), "s8": (-128, 127), "i32": (-(2**31), 2**31 - 1)}
DTYPES = {"u8": np.uint8, "s8": np.int8, "i32": np.int32}
FILLS = ("random", "extreme", "lowest", "highest")


# The formulas, in int64.
def window_sums(x: Ints, kernel: tuple[int, int], weight: Any, stride: Any, dilation: Any) -> Any:
    """Sum over the taps (ky, kx) of weight(ky, kx, the shifted and strided input)."""
    (kh, kw), (sh, sw), (dh, dw) = kernel, stride, dilation
    out_h, out_w = (x.shape[1] - (kh - 1) * dh - 1) // sh + 1, (x.shape[2] - (kw - 1) * dw - 1) // sw + 1
    taps = product(range(kh), range(kw))
    return [
        weight(
            ky, kx, x[:, ky * dh : ky * dh + (out_h - 1) * sh + 1 : sh, kx * dw : kx * dw + (out_w - 1) * sw + 1 : sw]
        )
        for ky, kx in taps
    ]


def pad_map(x: Ints, padding: tuple[int, int, int, int], fill: Any) -> Ints:
    n, h, w, c = x.shape
    top, bottom, left, right = padding
    out = np.broadcast_to(np.asarray(fill, np.int64), (n, h + top + bottom, w + left + right, c)).copy()
    out[:, top : top + h, left : left + w] = x
    return out


def formula_conv(op: p.Conv, x: Ints) -> Ints:
    weights = op.mul * op.codes.astype(np.int64) + op.add
    groups_out, groups_in = len(weights) // op.groups, weights.shape[1]
    x, parts = pad_map(x, op.padding, op.pad_code), []
    for g in range(op.groups):
        w = weights[g * groups_out : (g + 1) * groups_out]
        xs = x[..., g * groups_in : (g + 1) * groups_in]
        parts.append(
            sum(
                window_sums(
                    xs,
                    (w.shape[2], w.shape[3]),
                    lambda ky, kx, v, w=w: np.einsum("nhwi,oi->nhwo", v, w[:, :, ky, kx]),
                    op.stride,
                    op.dilation,
                )
            )
        )
    return np.concatenate(parts, axis=-1)


def formula_requant(op: p.Requant, x: Ints) -> Ints:
    y = [
        (x[..., c] * int(m) + int(b)) >> int(s)
        for c, (m, b, s) in enumerate(zip(op.multiplier, op.bias, op.shift, strict=True))
    ]
    return np.clip(np.stack(y, axis=-1), op.lo, op.hi)


def align(v: Ints, shift: int) -> Ints:
    return v << -shift if shift <= 0 else (v + (1 << (shift - 1))) >> shift


def formula_pool(op: p.MaxPool | p.SumPool, x: Ints) -> Ints:
    maximum = isinstance(op, p.MaxPool)
    x = pad_map(x, op.padding, LIMITS["i32"][0] if maximum else 0)
    taps = np.stack(window_sums(x, op.kernel, lambda ky, kx, v: v, op.stride, (1, 1)))
    return taps.max(axis=0) if maximum else align(taps.sum(axis=0), op.shift)


def formula(op: p.Op, *x: Ints) -> Ints:
    match op:
        case p.Conv():
            return formula_conv(op, *x)
        case p.Requant():
            return formula_requant(op, *x)
        case p.Add():
            return align(x[0], op.shift_a) + align(x[1], op.shift_b)
        case p.Clip():
            return np.minimum(np.maximum(x[0], op.lo), op.hi)
        case p.MaxPool() | p.SumPool():
            return formula_pool(op, *x)
        case p.Slice():
            return x[0][:, slice(*op.h), slice(*op.w), slice(*op.c)]
        case p.Pad():
            return np.pad(x[0], ((0, 0), op.h, op.w, op.c))
        case p.Flatten():
            return x[0].transpose(0, 3, 1, 2).reshape(len(x[0]), 1, 1, -1)
    raise AssertionError(op)


# Building and checking plans of one operation.
def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, lo: int, hi: int, *, how: str) -> NDArray[Any]:
    values = {
        "random": rng.integers(lo, hi, shape, endpoint=True),
        "extreme": rng.choice(np.array([lo, hi]), shape),
        "lowest": np.full(shape, lo),
        "highest": np.full(shape, hi),
    }
    return values[how].astype(dtype)


def check(op: p.Op, x: NDArray[Any], lo: int, hi: int, dtype_out: str, *, threads: int = 1) -> None:
    """`op` reads the input alone (an Add: twice); every executor must give the formula's integers."""
    expected = formula(op, *[x.astype(np.int64)] * len(op.inputs))
    low, high = LIMITS[dtype_out]
    assert low <= expected.min() <= expected.max() <= high, "the case itself overflows"
    dtype_in = {v: k for k, v in DTYPES.items()}[x.dtype.type]
    values = (
        p.Value("x", x.shape[1:], dtype_in, lo, hi),
        p.Value("y", expected.shape[1:], dtype_out, int(expected.min()), int(expected.max())),
    )
    plan = p.Plan(values, (op,), 0, 1, 1.0, (0.0,))
    np.testing.assert_array_equal(ReferenceExecutor(plan).run(x), expected, "reference")
    for isa in (*available_isas(), *emulated_isas()):
        engine = EngineExecutor(plan, isa=isa, threads=threads)
        np.testing.assert_array_equal(engine.run(x), expected, isa)
        values_by_name = engine.run_all(x)
        assert values_by_name["y"].dtype == DTYPES[dtype_out]
        np.testing.assert_array_equal(values_by_name["x"], x)
        np.testing.assert_array_equal(values_by_name["y"], expected)


def conv_case(
    seed: int,
    *,
    hw: tuple[int, int] = (5, 6),
    channels: tuple[int, int] = (3, 5),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    dtype: str = "u8",
    x_range: tuple[int, int] = (0, 255),
    bits: int = 8,
    form: tuple[int, int] = (1, 0),
    fills: tuple[str, str] = ("random", "random"),
    batch: int = 2,
    threads: int = 1,
) -> None:
    """channels: of each group, in and out."""
    rng = np.random.default_rng(seed)
    c_in, c_out = channels[0] * groups, channels[1] * groups
    x = fill(rng, (batch, *hw, c_in), DTYPES[dtype], *x_range, how=fills[0])
    half = 1 << (bits - 1)
    codes = fill(rng, (c_out, channels[0], *kernel), np.int8, -half, half - 1, how=fills[1])
    pad_code = fill(rng, (c_in,), np.int32, *x_range, how="random")
    op = p.Conv("conv", (0,), 1, "layer", codes, *form, stride, padding, dilation, groups, pad_code)
    check(op, x, *x_range, "i32", threads=threads)


RANGES = st.sampled_from(
    [("u8", (0, 255)), ("u8", (0, 15)), ("u8", (0, 1)), ("s8", (-128, 127)), ("s8", (-8, 7)), ("s8", (-1, 1))]
)


@st.composite
def conv_cases(draw: st.DrawFn) -> dict[str, Any]:
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    least = [
        max(1, (k - 1) * d + 1 - a - b)
        for k, d, (a, b) in zip(kernel, dilation, (padding[:2], padding[2:]), strict=True)
    ]
    dtype, x_range = draw(RANGES)
    return {
        "seed": draw(st.integers(0, 2**32)),
        "hw": (draw(st.integers(least[0], least[0] + 9)), draw(st.integers(least[1], least[1] + 9))),
        "channels": draw(st.sampled_from([(1, 1), (1, 1), (1, 2)]) | st.tuples(st.integers(1, 17), st.integers(1, 17))),
        "kernel": kernel,
        "stride": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": padding,
        "dilation": dilation,
        "groups": draw(st.sampled_from([1, 1, 2, 3, 17])),
        "dtype": dtype,
        "x_range": x_range,
        "bits": draw(st.integers(1, 8)),
        "form": draw(st.sampled_from([(1, 0), (2, 1), (1, 1), (-3, 7)])),
        "fills": draw(st.tuples(st.sampled_from(FILLS), st.sampled_from(FILLS))),
        "batch": draw(st.integers(1, 3)),
        "threads": draw(st.sampled_from([1, 1, 2])),
    }


@settings(max_examples=150, deadline=None)
@given(conv_cases())
def test_conv_random(case: dict[str, Any]) -> None:
    conv_case(**case)


# What a saturating or too-narrow product would get wrong: extreme activations times extreme weights, many of them.
@pytest.mark.parametrize("fills", list(product(FILLS[1:], FILLS[1:])), ids="-".join)
@pytest.mark.parametrize(
    ("dtype", "x_range"), [("u8", (0, 255)), ("s8", (-128, 127)), ("u8", (0, 15)), ("s8", (-8, 7))]
)
@pytest.mark.parametrize("form", [(1, 0), (2, 1)])
@pytest.mark.parametrize("bits", [8, 4, 1])
def test_conv_extremes(fills: tuple[str, str], dtype: str, x_range: Any, form: Any, bits: int) -> None:
    conv_case(0, channels=(37, 18), dtype=dtype, x_range=x_range, form=form, bits=bits, fills=fills)


@pytest.mark.parametrize("size", [*range(1, 11), 15, 16, 17, 31, 33])
@pytest.mark.parametrize("bits", [8, 2])
def test_conv_sizes(size: int, bits: int) -> None:
    narrow = {"bits": bits, "x_range": (0, (1 << bits) - 1)}
    conv_case(size, hw=(size, 3), channels=(4, 8), **narrow)
    conv_case(size, hw=(2, size), channels=(3, 16), **narrow)
    conv_case(size, channels=(size, 9), **narrow)
    conv_case(size, channels=(5, size), **narrow)
    conv_case(size, channels=(1, 1), groups=size, **narrow)
    conv_case(size, hw=(1, 1), kernel=(1, 1), padding=(0,) * 4, channels=(20, 10), batch=size, **narrow)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("a_bits", [1, 2, 4, 7, 8])
def test_conv_every_width(bits: int, a_bits: int) -> None:
    """Wide windows, so that sums of products in 16 bits are pushed to the bound that was proved for them."""
    x_range = (0, (1 << a_bits) - 1)
    for form, how in product([(1, 0), (2, 1)], FILLS):
        conv_case(
            1, hw=(4, 4), channels=(130, 17), bits=bits, x_range=x_range, form=form, fills=("highest", how), batch=1
        )
        conv_case(2, channels=(1, 1), groups=19, bits=bits, x_range=x_range, form=form, fills=("highest", how), batch=1)


@pytest.mark.parametrize("x_range", [(0, 1), (-1, 0), (0, 3), (-2, 1), (-1, 1), (0, 15), (4, 5)])
@pytest.mark.parametrize("bits", [1, 2])
def test_conv_low_bits(bits: int, x_range: tuple[int, int]) -> None:
    """Convolutions large enough for kernels by bit-planes and by tables, with odd channels, groups and borders."""
    case = {"bits": bits, "x_range": x_range, "dtype": "s8" if x_range[0] < 0 else "u8", "batch": 1}
    for form, channels in product([(2, 1), (1, 0), (-3, 7)], [(64, 64), (70, 97), (130, 33), (33, 130)]):
        conv_case(1, form=form, channels=channels, **case)
    conv_case(2, channels=(16, 40), hw=(9, 11), padding=(2, 1, 0, 3), stride=(2, 2), **case)
    conv_case(3, channels=(48, 64), hw=(8, 9), dilation=(2, 2), padding=(2, 2, 2, 2), threads=2, **case)
    conv_case(4, channels=(64, 32), groups=3, hw=(6, 6), fills=("extreme", "random"), **case)
    conv_case(5, channels=(256, 70), hw=(5, 7), kernel=(1, 1), padding=(0,) * 4, **case)
    conv_case(6, channels=(300, 40), hw=(1, 1), kernel=(1, 1), padding=(0,) * 4, **(case | {"batch": 9}))
    conv_case(7, channels=(600, 32), hw=(3, 3), fills=("highest", "highest"), **case)


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("x_range", [(0, 15), (0, 255)])
def test_conv_small_groups(groups: int, x_range: tuple[int, int]) -> None:
    """Groups of so few channels that a kernel fills them up to as many as the whole input has."""
    for channels in product([1, 2, 3, 4], [1, 2, 9]):
        conv_case(3, channels=channels, groups=groups, x_range=x_range, form=(2, 1))


@pytest.mark.parametrize("width", range(1, 41))
def test_conv_of_few_outputs(width: int) -> None:
    """At most one vector of output channels, and kernels of three columns: blocks of one row's pixels, and its rest."""
    wide = {"hw": (4, width), "kernel": (3, 3)}
    conv_case(width, channels=(16, 1 + width % 16), **wide)
    conv_case(width, channels=(1 + width % 9, 16), dtype="s8", x_range=(-128, 127), padding=(1, 0, 2, 2), **wide)
    conv_case(width, channels=(3, 1 + 7 * width % 16), groups=2, bits=4, threads=2, **wide)
    conv_case(width, channels=(6, 5), form=(2, 1), dilation=(2, 1), padding=(2, 1, 2, 1), **wide)
    conv_case(width, hw=(7, width), channels=(5, 12), stride=(2, 1), kernel=(4, 3), padding=(2, 1, 1, 1))


@pytest.mark.parametrize("out", [47, 48, 49, 63, 64, 65, 80, 129, 144])
def test_conv_many_outputs(out: int) -> None:
    """More vectors of output channels than a block holds, and more pixels than a tile."""
    conv_case(out, channels=(5, out), hw=(2, 3), bits=4, x_range=(0, 15), form=(2, 1))
    conv_case(out, channels=(3, out), hw=(17, 13), batch=1)
    conv_case(out, channels=(8, out), hw=(15, 14), kernel=(1, 1), padding=(0,) * 4, batch=1)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize(("dtype", "x_range"), [("u8", (0, 255)), ("s8", (0, 127)), ("s8", (-8, 7))])
def test_conv_of_whole_pixels(stride: tuple[int, int], dtype: str, x_range: tuple[int, int]) -> None:
    """1x1 windows, which a kernel may read from the input itself, and those at the edges of a map that it may not."""
    for channels, padding in product([(4, 5), (8, 40), (7, 5)], [(0, 0, 0, 0), (0, 1, 0, 1), (1, 0, 0, 0)]):
        case = {"channels": channels, "padding": padding, "dtype": dtype, "x_range": x_range, "form": (2, 1)}
        conv_case(6, hw=(7, 6), kernel=(1, 1), stride=stride, bits=4, **case)


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (2, 3), (3, 3), (4, 3), (5, 5), (7, 7), (8, 2), (9, 3), (3, 45)])
@pytest.mark.parametrize(("channels", "width"), [(5, 45), (64, 46), (97, 47)])
def test_conv_depthwise(kernel: tuple[int, int], channels: int, width: int) -> None:
    """Kernels of every height, some larger than the fastest kernel takes; maps wider than it interleaves at once."""
    padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    for stride, dilation, bits in product([(1, 1), (2, 2)], [(1, 1), (1, 2)], [4, 8]):
        shape = {"hw": (9, width), "kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding}
        for dtype, x_range in (("u8", (0, 255)), ("s8", (-8, 7))):
            case = {"channels": (1, 1), "groups": channels, "bits": bits, "dtype": dtype, "x_range": x_range}
            conv_case(7, form=(2, 1), batch=1, **shape, **case)


@pytest.mark.parametrize("form", [(-1, 0), (3, 0), (0, 9), (1, -100), (255, 127)])
def test_conv_unusual_forms(form: tuple[int, int]) -> None:
    """Weights that fit int8 only as codes, by the multiplier or the addend alone."""
    for bits, (dtype, x_range), how in product([4, 8], [("u8", (0, 1)), ("u8", (0, 15)), ("s8", (-3, 9))], FILLS):
        conv_case(5, form=form, bits=bits, dtype=dtype, x_range=x_range, fills=("random", how))


@pytest.mark.parametrize("stride", [(2, 1), (3, 2)])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (0, 1, 0, 1)])
def test_conv_of_single_pixels(stride: tuple[int, int], padding: tuple[int, int, int, int]) -> None:
    """Maps of one pixel, whose batch the engine convolves like rows: stride and padding behind them do not matter."""
    for batch, groups, x_max in product([1, 5, 66], [1, 3], [15, 255]):
        shape = {"hw": (1, 1), "kernel": (1, 1), "channels": (7, 5), "groups": groups, "batch": batch}
        conv_case(4, stride=stride, padding=padding, x_range=(0, x_max), form=(2, 1), **shape)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_conv_of_nothing_but_zeros(bits: int) -> None:
    """An input whose bounds leave it no choice: whatever is divided by its largest value must be guarded."""
    for channels, kernel in product([(3, 5), (64, 40)], [(1, 1), (3, 3)]):
        conv_case(8, channels=channels, kernel=kernel, padding=(1, 1, 1, 1), x_range=(0, 0), bits=bits, hw=(4, 4))


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_conv_of_few_dense_channels(bits: int) -> None:
    """Rows of a kernel that are staged without filling their channels up, of every remainder."""
    for channels, width, stride in product([1, 2, 3, 5], [1, 2, 3, 5, 7], [1, 2]):
        case = {"bits": bits, "x_range": (0, (1 << bits) - 1), "batch": 1, "form": (2, 1)}
        shape = {"hw": (8, 11), "kernel": (3, width), "padding": (1, 1, width // 2, width // 2)}
        conv_case(9, channels=(channels, 21), stride=(stride, stride), **shape, **case)


POOLS = [  # kernel, stride, padding
    ((3, 3), (2, 2), (1, 1, 1, 1)),
    ((2, 2), (2, 2), (0, 0, 0, 0)),
    ((3, 2), (1, 1), (1, 0, 0, 1)),
    ((1, 1), (2, 2), (0, 0, 0, 0)),
    ((2, 3), (3, 2), (0, 1, 1, 1)),
    ((5, 5), (1, 2), (2, 2, 2, 2)),
]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "stride", "padding"), POOLS)
def test_a_pooling_that_has_its_sums_computed(kernel: Any, stride: Any, padding: Any, threads: int) -> None:
    """Convolution, rescaling that never falls, maximum, codes: rows of sums exist as the pooling needs them."""
    rng = np.random.default_rng(3)
    for (h, w), batch, channels in product([(9, 8), (23, 5)], [1, 4], [7, 40]):
        x = fill(rng, (batch, h, w, 3), np.uint8, 0, 255, how="random")
        codes = fill(rng, (channels, 3, 3, 3), np.int8, -128, 127, how="random")
        conv = p.Conv("conv", (0,), 1, "layer", codes, 1, 0, (1, 1), (1, 1, 1, 1), (1, 1), 1, np.zeros(3, np.int32))
        rise = rng.integers(1 << 10, 1 << 14, channels).astype(np.int32)
        bias = rng.integers(-(1 << 20), 1 << 20, channels)
        fixed = p.Requant("fixed", (1,), 2, rise, bias, np.full(channels, 8, np.uint8), *LIMITS["i32"])
        pool = p.MaxPool("pool", (2,), 3, kernel, stride, padding)
        last = p.Requant("codes", (3,), 4, rise, bias * 64, np.full(channels, 27, np.uint8), 0, 255)
        values, names = [x.astype(np.int64)], ("x", "sums", "fixed", "most", "y")
        for op in (conv, fixed, pool, last):
            values.append(formula(op, values[-1]))
        dtypes = ("u8", "i32", "i32", "i32", "u8")
        limits = ((0, 255), *[LIMITS["i32"]] * 3, (0, 255))
        described = [p.Value(n, v.shape[1:], d, *b) for n, v, d, b in zip(names, values, dtypes, limits, strict=True)]
        plan = p.Plan(tuple(described), (conv, fixed, pool, last), 0, 4, 1.0, (0.0,))
        assert len(np.unique(values[-1])) > 20, "the case tells nothing"
        np.testing.assert_array_equal(ReferenceExecutor(plan).run(x), values[-1])
        for isa in (*available_isas(), *emulated_isas()):
            engine = EngineExecutor(plan, isa=isa, threads=threads)
            np.testing.assert_array_equal(engine.run(x), values[-1], isa)
            for name, value in zip(names, values, strict=True):
                np.testing.assert_array_equal(engine.run_all(x)[name], value, f"{isa}: {name}")


def requant_case(x: NDArray[Any], m: Any, b: Any, s: Any, dtype: str, *, bounds: tuple[int, int] | None = None) -> None:
    low, high = LIMITS[{v: k for k, v in DTYPES.items()}[x.dtype.type]]
    c = x.shape[-1]
    arrays = (np.resize(m, c).astype(np.int32), np.resize(b, c).astype(np.int64), np.resize(s, c).astype(np.uint8))
    lo, hi = bounds or LIMITS[dtype]
    check(p.Requant("requant", (0,), 1, *arrays, lo, hi), x, low, high, dtype)


def proved(x_max: int, m: int, b: int) -> bool:
    return x_max * abs(m) + abs(b) < 2**63


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shift", [0, 1, 31, 32, 33, 61, 62])
def test_requant_extremes(dtype: str, shift: int) -> None:
    edges = np.array([-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1])
    x = np.resize(edges, (1, 1, 6, 1)).repeat(19, axis=3).astype(np.int32)
    for m, b in product([-(2**31) + 1, -1, 0, 1, 2**31 - 1], [-(2**61), -1, 0, 1, 2**61, 2**62 - 1, -(2**62)]):
        if proved(2**31, m, b):
            requant_case(x, m, b, shift, dtype)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_requant_random(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    dtype_in, dtype_out = data.draw(st.sampled_from(list(LIMITS))), data.draw(st.sampled_from(list(LIMITS)))
    c = data.draw(st.integers(1, 33))
    x = fill(rng, (2, 3, 5, c), DTYPES[dtype_in], *LIMITS[dtype_in], how=data.draw(st.sampled_from(FILLS)))
    shift = rng.integers(0, 63, c)
    m = rng.integers(-(2**31) + 1, 2**31, c) >> rng.integers(0, 31, c)
    b = rng.integers(-(2**62), 2**62, c) >> rng.integers(0, 62, c)
    b = np.where(np.abs(b) + 2**31 * np.abs(m) < 2**62, b, b >> 2)
    lo, hi = sorted(int(v) for v in rng.integers(*LIMITS[dtype_out], 2, endpoint=True))
    requant_case(x, m, b, shift, dtype_out, bounds=data.draw(st.sampled_from([None, (lo, hi)])))


@pytest.mark.parametrize("levels", [(0, 1), (0, 15), (-8, 7), (0, 63), (0, 64), (5, 5), (0, 255), (-128, 127)])
@pytest.mark.parametrize("reach", [8, 12, 17, 24, 31])
def test_requant_at_every_step(levels: tuple[int, int], reach: int) -> None:
    """Inputs on both sides of each step between two results, which arithmetic in fewer bits would move.

    reach: the inputs from the first step to the last span about 2^reach.
    """
    rng = np.random.default_rng(reach)
    c, (lo, hi) = 35, levels
    slope = max(hi - lo, 1) / 2.0**reach * rng.uniform(0.3, 1.0, c) * rng.choice([-1, 1], c)
    shift = np.clip(np.floor(30 - np.log2(np.abs(slope))), 0, 62).astype(np.int64)
    m = np.rint(slope * 2.0**shift).astype(np.int64)
    m[3] = 0
    b = np.clip(rng.uniform(-0.5, 1.5, c) * (hi - lo) * 2.0**shift, -(2.0**61), 2.0**61).astype(np.int64)
    x = np.zeros((1, 2 * (hi - lo) + 4, 1, c), np.int64)
    x[0, -4:, 0] = np.array([-(2**31), 2**31 - 1, -1, 0])[:, None]
    for channel, level in product(range(c), range(lo + 1, hi + 1)):
        if m[channel] != 0:
            step = ((level << int(shift[channel])) - int(b[channel])) // int(m[channel])
            x[0, 2 * (level - lo - 1) : 2 * (level - lo), 0, channel] = step, step + 1
    x = np.clip(x, *LIMITS["i32"]).astype(np.int32)
    dtype = "s8" if lo < 0 else "u8"
    assert all(proved(2**31, int(p), int(q)) for p, q in zip(m, b, strict=True))
    requant_case(x, m, b, shift, dtype, bounds=levels)


@pytest.mark.parametrize("shifts", [(0, 0), (-3, 2), (5, 5), (31, 30), (1, 33), (62, 8), (-8, 1)])
@pytest.mark.parametrize("count", [*range(1, 11), 31, 33])
def test_add(shifts: tuple[int, int], count: int) -> None:
    rng = np.random.default_rng(count)
    bound = 2**31 - 1 if min(shifts) > 0 else 2**30 - 1 if min(shifts) == 0 else 2**30 >> (1 - min(shifts))
    for how in FILLS:
        x = fill(rng, (1, 1, count, 1), np.int32, -bound, bound, how=how)
        check(p.Add("add", (0, 0), 1, *shifts), x, -bound, bound, "i32")


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("count", [*range(1, 11), 31, 33])
def test_clip(dtype: str, count: int) -> None:
    rng = np.random.default_rng(count)
    low, high = LIMITS[dtype]
    for how, (lo, hi) in product(FILLS, [(low, high), (0, 0), (low // 2, high // 3), (high, high)]):
        x = fill(rng, (1, 1, count, 1), DTYPES[dtype], low, high, how=how)
        check(p.Clip("clip", (0,), 1, lo, hi), x, low, high, dtype)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_pools(data: st.DataObject) -> None:
    draw = data.draw
    dtype, maximum = draw(st.sampled_from(list(LIMITS))), draw(st.booleans())
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding = tuple(draw(st.integers(0, k - 1)) for k in (kernel[0], kernel[0], kernel[1], kernel[1]))
    shape = (2, *(draw(st.integers(k, k + 8)) for k in kernel), draw(st.integers(1, 70)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = fill(rng, shape, DTYPES[dtype], *LIMITS[dtype], how=draw(st.sampled_from(FILLS)))
    if maximum:
        check(p.MaxPool("pool", (0,), 1, kernel, stride, padding), x, *LIMITS[dtype], dtype)
    else:
        check(p.SumPool("pool", (0,), 1, kernel, stride, padding, draw(st.integers(5, 40))), x, *LIMITS[dtype], "i32")


@pytest.mark.parametrize("dtype", ["u8", "s8"])
@pytest.mark.parametrize("channels", [1, 3, 16, 63, 64, 65])
def test_sums_of_codes(dtype: str, channels: int) -> None:
    """Sums without a shift, in the codes' own type, whose ends they reach."""
    rng = np.random.default_rng(channels)
    cases = product([(1, 1), (2, 2), (3, 2), (1, 4)], [(0, 0, 0, 0), (1, 0, 0, 1)], [(1, 1), (2, 3)], FILLS)
    for kernel, padding, stride, how in cases:
        bounds = tuple(int(end / math.prod(kernel)) for end in LIMITS[dtype])
        x = fill(rng, (2, 5, 6, channels), DTYPES[dtype], *bounds, how=how)
        check(p.SumPool("pool", (0,), 1, kernel, stride, padding, 0), x, *bounds, dtype)


@pytest.mark.parametrize("dtype", LIMITS)
def test_moves(dtype: str) -> None:
    rng = np.random.default_rng(0)
    low, high = LIMITS[dtype]
    for h, w, c in product([1, 2, 7], [1, 3, 8], [1, 5, 16]):
        x = fill(rng, (3, h, w, c), DTYPES[dtype], low, high, how="random")
        check(p.Flatten("flatten", (0,), 1), x, low, high, dtype)
        check(p.Pad("pad", (0,), 1, (0, 2), (1, 0), (c // 2, 3)), x, low, high, dtype)
        check(p.Slice("slice", (0,), 1, (0, h, 2), (w // 2, w, 1), (c // 3, c, 3)), x, low, high, dtype)
