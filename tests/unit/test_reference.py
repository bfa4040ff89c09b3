"""The reference executor, one operation at a time, on cases worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers_programs import plain_program, residual_program

from bitstrata_runtime import Plan, derive
from bitstrata_runtime.plan import Add, Clip, Conv, Flatten, MaxPool, Op, Pad, Requant, Slice, SumPool, Value
from bitstrata_runtime.reference import OracleExecutor, ReferenceExecutor

WIDE = (-(2**31), 2**31 - 1)
EXECUTORS = [ReferenceExecutor, OracleExecutor]
NO_PAD = (0, 0, 0, 0)


def run(op: Op, x: np.ndarray, shape: tuple[int, int, int], executor=ReferenceExecutor, dtype: str = "i32"):
    """One operation on x (N, H, W, C); a second input of it is x too."""
    kind = {np.dtype(np.uint8): "u8", np.dtype(np.int8): "s8", np.dtype(np.int32): "i32"}[x.dtype]
    low, high = {"u8": (0, 255), "s8": (-128, 127), "i32": WIDE}[kind]
    bounds = {"u8": (0, 255), "s8": (-128, 127), "i32": WIDE}[dtype]
    values = (Value("x", x.shape[1:], kind, low, high), Value(op.name, shape, dtype, *bounds))
    result = executor(Plan(values, (op,), 0, 1, 1.0, (0.0,))).run_all(x)[op.name]
    assert result.shape == (len(x), *shape)
    return result


def conv(codes, *, mul=1, add=0, stride=(1, 1), padding=NO_PAD, dilation=(1, 1), groups=1, pad_code=(0,)):
    codes = np.asarray(codes, np.int8)
    pads = np.broadcast_to(np.asarray(pad_code, np.int32), codes.shape[1] * groups).copy()
    return Conv("y", (0,), 1, "layer", codes, mul, add, stride, padding, dilation, groups, pads)


def column(*rows) -> np.ndarray:
    """A uint8 map of one image and one channel."""
    return np.array(rows, np.uint8)[None, :, :, None]


@pytest.mark.parametrize("executor", EXECUTORS)
class TestConv:
    def test_is_a_cross_correlation(self, executor):
        x = column([1, 2, 3], [4, 5, 6])
        found = run(conv([[[[1, 10], [100, -1]]]]), x, (1, 2, 1), executor)
        assert found.ravel().tolist() == [1 + 20 + 400 - 5, 2 + 30 + 500 - 6]

    def test_adds_the_integer_form(self, executor):
        found = run(conv([[[[3]]], [[[-4]]]], mul=2, add=1), column([5, 255]), (1, 2, 2), executor)
        assert found.ravel().tolist() == [35, -35, 255 * 7, 255 * -7]

    def test_pads_with_the_code_of_the_channel(self, executor):
        x = np.array([[[[1, 2]]]], np.uint8)
        kernel = np.array([[[[1, 0, 1]], [[10, 0, 10]]]], np.int8)  # neighbours left and right, of two channels
        found = run(conv(kernel, padding=(0, 0, 1, 1), pad_code=(7, 9)), x, (1, 1, 1), executor)
        assert found.item() == 2 * 7 + 20 * 9

    def test_pads_each_side_by_its_own_width(self, executor):
        found = run(conv([[[[1]]]], padding=(1, 0, 0, 2), pad_code=(9,)), column([4]), (2, 3, 1), executor)
        assert found[0, :, :, 0].tolist() == [[9, 9, 9], [4, 9, 9]]

    def test_strides_and_dilates_by_axis(self, executor):
        x = np.arange(35, dtype=np.uint8).reshape(1, 5, 7, 1)
        found = run(conv([[[[1, 1], [1, 1]]]], stride=(2, 3), dilation=(1, 2)), x, (2, 2, 1), executor)
        corners = [(y, x0) for y in (0, 2) for x0 in (0, 3)]
        assert found.ravel().tolist() == [
            sum(7 * (y + i) + x0 + j for i in (0, 1) for j in (0, 2)) for y, x0 in corners
        ]

    def test_groups_see_their_own_channels(self, executor):
        x = np.array([1, 2, 3, 4], np.int8).reshape(1, 1, 1, 4)
        codes = np.array([[1, 10], [2, 20], [-1, 0]] * 2, np.int8).reshape(6, 2, 1, 1)
        found = run(conv(codes, groups=2), x, (1, 1, 6), executor)
        assert found.ravel().tolist() == [21, 42, -1, 43, 86, -3]

    def test_depthwise(self, executor):
        x = np.array([1, -2, 3], np.int8).reshape(1, 1, 1, 3)
        found = run(conv(np.array([5, 6, 7]).reshape(3, 1, 1, 1), groups=3), x, (1, 1, 3), executor)
        assert found.ravel().tolist() == [5, -12, 21]

    def test_reaches_the_ends_of_int32(self, executor):
        """257 channels of 255 * (2^15 - 1), and 257 of -255 * (2^15 - 255)."""
        x = np.full((1, 1, 1, 257), 255, np.uint8)
        codes = np.stack([np.full(257, 127), np.full(257, -128)]).reshape(2, 257, 1, 1)
        found = run(conv(codes, mul=256, add=255), x, (1, 1, 2), executor)
        assert found.ravel().tolist() == [257 * 255 * (2**15 - 1), -257 * 255 * (2**15 - 255)]


def test_oracle_takes_images_in_parts(monkeypatch):
    monkeypatch.setattr("bitstrata_runtime.reference._GATHER_BYTES", 1)
    rng = np.random.default_rng(0)
    x, codes = rng.integers(0, 256, (5, 4, 4, 3)).astype(np.uint8), rng.integers(-128, 128, (2, 3, 3, 3))
    op = conv(codes, padding=(1, 1, 1, 1), pad_code=(3,))
    np.testing.assert_array_equal(run(op, x, (4, 4, 2), OracleExecutor), run(op, x, (4, 4, 2)))


def requant(multiplier, bias, shift, lo, hi):
    return Requant(
        "y",
        (0,),
        1,
        np.array(multiplier, np.int32),
        np.array(bias, np.int64),
        np.array(shift, np.uint8),
        lo,
        hi,
    )


def test_requant_floors_and_clamps():
    x = np.array([-5, -4, -1, 0, 1, 3, 100], np.int32).reshape(7, 1, 1, 1)
    found = run(requant([3], [1], [2], -3, 4), x, (1, 1, 1), dtype="s8")
    assert found.ravel().tolist() == [-3, -3, -1, 0, 1, 2, 4]  # (3x + 1) / 4, rounded down
    assert found.dtype == np.int8


def test_requant_has_constants_of_each_channel_and_64_bits():
    x = np.array([2**31 - 1, -(2**31) + 1, 7], np.int32).reshape(1, 1, 1, 3)
    found = run(requant([2**31 - 1, 2**31 - 1, -1], [0, 2**61, 2**62], [62, 31, 62], *WIDE), x, (1, 1, 3))
    exact = [(2**31 - 1) ** 2 >> 62, (-((2**31 - 1) ** 2) + 2**61) >> 31, (2**62 - 7) >> 62]
    assert found.ravel().tolist() == exact == [0, -1073741823, 0]


def test_requant_with_shift_zero():
    x = np.array([5], np.int32).reshape(1, 1, 1, 1)
    assert run(requant([-7], [3], [0], *WIDE), x, (1, 1, 1)).item() == -32


@pytest.mark.parametrize("executor", EXECUTORS)
def test_sums_of_codes_are_codes(executor):
    x = np.array([[1, 2, -3], [4, -5, 6]], np.int8).reshape(1, 2, 3, 1)
    op = SumPool("y", (0,), 1, (2, 2), (1, 1), (0, 1, 1, 0), 0)
    found = run(op, x, (2, 3, 1), executor, dtype="s8")
    assert found.dtype == np.int8
    assert found[0, :, :, 0].tolist() == [[5, 2, 0], [4, -1, 1]]


def test_sums_of_codes_beyond_their_bounds_are_noticed():
    x = np.full((1, 1, 2, 1), 127, np.int8)
    with pytest.raises(AssertionError, match=r"y: \[254, 254\] exceeds \[-128, 127\]"):
        run(SumPool("y", (0,), 1, (1, 2), (1, 1), NO_PAD, 0), x, (1, 1, 1), dtype="s8")


def test_add_rounds_half_up():
    x = np.array([-3, -2, -1, 0, 1, 2, 3], np.int32).reshape(7, 1, 1, 1)
    assert run(Add("y", (0, 0), 1, 1, -2), x, (1, 1, 1)).ravel().tolist() == [-13, -9, -4, 0, 5, 9, 14]


def test_clip():
    x = np.array([-9, -2, 0, 5], np.int32).reshape(4, 1, 1, 1)
    assert run(Clip("y", (0,), 1, -2, 3), x, (1, 1, 1)).ravel().tolist() == [-2, -2, 0, 3]


def test_maxpool_leaves_padding_out():
    x = np.array([[-5, -7], [-9, -3]], np.int8)[None, :, :, None]
    found = run(MaxPool("y", (0,), 1, (2, 2), (1, 1), (1, 1, 0, 1)), x, (3, 2, 1), dtype="s8")
    assert found[0, :, :, 0].tolist() == [[-5, -7], [-3, -3], [-3, -3]]


@pytest.mark.parametrize(("shift", "expected"), [(0, [-5, 0, -8, 4]), (1, [-2, 0, -4, 2]), (2, [-1, 0, -2, 1])])
def test_sumpool_counts_padding_as_zero_and_rounds_half_up(shift, expected):
    x = np.array([[-5, 5], [-3, 7]], np.int32)[None, :, :, None]
    found = run(SumPool("y", (0,), 1, (2, 2), (1, 2), (1, 0, 1, 1), shift), x, (2, 2, 1))
    sums = [[-5, 5], [-8, 12]]
    assert found[0, :, :, 0].tolist() == [[(s + (1 << shift >> 1)) >> shift for s in row] for row in sums]
    assert found[0, 0, 0, 0] == expected[0]
    assert found[0, 1, 0, 0] == expected[2]


def test_sumpool_sums_in_64_bits():
    x = np.full((1, 2, 2, 1), 2**31 - 1, np.int32)
    assert run(SumPool("y", (0,), 1, (2, 2), (1, 1), NO_PAD, 2), x, (1, 1, 1)).item() == 2**31 - 1


def test_slice_pad_and_flatten_move_values():
    x = np.arange(24, dtype=np.int32).reshape(1, 2, 3, 4)
    found = run(Slice("y", (0,), 1, (1, 2, 1), (0, 3, 2), (1, 4, 2)), x, (1, 2, 2))
    assert found.ravel().tolist() == [13, 15, 21, 23]
    found = run(Pad("y", (0,), 1, (1, 0), (0, 2), (2, 1)), x, (3, 5, 7))
    np.testing.assert_array_equal(found[:, 1:, :3, 2:6], x)
    assert found.sum() == x.sum()
    found = run(Flatten("y", (0,), 1), x, (1, 1, 24))
    np.testing.assert_array_equal(found.ravel(), x.transpose(0, 3, 1, 2).ravel())


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((1, 6, 6, 3), np.int8), r"codes must be a uint8 array \(N, 6, 6, 3\), are int8 \(1, 6, 6, 3\)"),
        (np.zeros((1, 6, 6, 3)), "are float64"),
        (np.zeros((1, 3, 6, 6), np.uint8), r"are uint8 \(1, 3, 6, 6\)"),
        (np.zeros((6, 6, 3), np.uint8), r"are uint8 \(6, 6, 3\)"),
        ([[1]], "are list"),
    ],
)
def test_wrong_codes_are_errors(codes, message):
    executor = ReferenceExecutor(derive(plain_program(), 1))
    for call in (executor.run, executor.run_all):
        with pytest.raises(ValueError, match=message):
            call(codes)


def test_codes_out_of_range_are_errors():
    program = residual_program()
    layers = {
        name: replace(layer, input_range=dict.fromkeys((2, 4, 8), (-8, 7))) for name, layer in program.layers.items()
    }
    executor = ReferenceExecutor(derive(replace(program, layers=layers), 2))
    codes = np.full((1, 5, 5, 2), 7, np.int8)
    executor.run(codes)
    codes[0, 1, 2, 1] = -9
    with pytest.raises(ValueError, match=r"codes reach \[-9, 7\], beyond \[-8, 7\]"):
        executor.run(codes)


def test_a_value_beyond_its_bounds_is_caught():
    plan = derive(plain_program(), 1)
    narrow = replace(plan, values=tuple(replace(v, hi=0) if v.name == "logits" else v for v in plan.values))
    codes = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)
    assert ReferenceExecutor(plan).run(codes).max() > 0
    with pytest.raises(AssertionError, match=r"logits: .* exceeds"):
        ReferenceExecutor(narrow).run(codes)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_no_images_give_no_results(executor):
    plan = derive(residual_program(), "mixed")
    found = executor(plan).run_all(np.zeros((0, 5, 5, 2), np.int8))
    assert {name: array.shape for name, array in found.items()} == {v.name: (0, *v.shape) for v in plan.values}


def test_run_is_the_output_of_run_all():
    for program in (plain_program(), residual_program()):
        plan = derive(program, 4)
        value = plan.values[plan.input]
        codes = np.random.default_rng(0).integers(value.lo, value.hi + 1, (3, *value.shape))
        codes = codes.astype(np.uint8 if value.dtype == "u8" else np.int8)
        before = codes.copy()
        for executor in (ReferenceExecutor(plan), OracleExecutor(plan)):
            np.testing.assert_array_equal(executor.run(codes), executor.run_all(codes)[program.output])
        np.testing.assert_array_equal(codes, before)
