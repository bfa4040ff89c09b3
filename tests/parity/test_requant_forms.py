"""Convolutions and what requantizes their sums: the reference's integers in every form of requantization."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from bitstrata_runtime import plan as p
from bitstrata_runtime.engine import EngineExecutor, available_isas, emulated_isas
from bitstrata_runtime.reference import ReferenceExecutor

ISAS = (*available_isas(), *emulated_isas())
WIDE = (-(2**31), 2**31 - 1)
FEW, MANY = 24, 33  # smallest shifts of the constants: from 32 on, a result lies in the upper half of 64 bits
LEVELS = ((0, 15), (0, 255), (-128, 127))


@dataclass(frozen=True)
class Layer:
    """A convolution; channels: of each group, in and out; bits: of inputs and weights."""

    size: tuple[int, int]
    channels: tuple[int, int]
    groups: int
    kernel: int
    pad: int
    bits: int = 8

    def conv(self, rng: np.random.Generator) -> p.Conv:
        shape = (self.channels[1] * self.groups, self.channels[0], self.kernel, self.kernel)
        half = 1 << (self.bits - 1)
        codes = rng.integers(-half, half, shape).astype(np.int8)
        pad_code = np.zeros(self.channels[0] * self.groups, np.int32)
        return p.Conv("conv", (0,), 1, "conv", codes, 1, 0, (1, 1), (self.pad,) * 4, (1, 1), self.groups, pad_code)

    def input_shape(self) -> tuple[int, int, int]:
        return (*self.size, self.channels[0] * self.groups)

    def input(self) -> p.Value:
        return p.Value("x", self.input_shape(), "u8", 0, 2**self.bits - 1)


LAYERS = {
    "blocks": Layer((5, 7), (6, 70), 1, 3, 1),
    "one vector": Layer((5, 9), (5, 16), 1, 3, 1),
    "read from the image": Layer((5, 5), (16, 33), 1, 1, 0),
    "groups across vectors": Layer((4, 5), (3, 11), 3, 3, 1),
    "depthwise": Layer((6, 9), (1, 1), 70, 3, 1),
    "linear": Layer((1, 1), (24, 40), 1, 1, 0),
    "few bits": Layer((5, 9), (64, 70), 1, 3, 1, bits=4),
    "pairs of pixels": Layer((5, 7), (64, 70), 1, 3, 1, bits=1),
    "pairs, whole vectors": Layer((6, 8), (70, 128), 1, 3, 1, bits=1),
}


def requant(
    low: NDArray[np.int64], high: NDArray[np.int64], levels: tuple[int, int], shift: int, rng: np.random.Generator
) -> p.Requant:
    """Each channel's sums between low and high (channels,) spread over the levels, and some way beyond them."""
    count, (lo, hi) = len(low), levels
    slope = (hi - lo) / np.maximum(high - low, 1) * rng.uniform(0.9, 1.6, count) * rng.choice([-1, 1], count)
    shifts = shift + rng.integers(0, 3, count)
    m = np.clip(np.rint(slope * 2.0**shifts), -(2**31) + 1, 2**31 - 1).astype(np.int64)
    middle = (lo + hi + 1) * 2 ** (shifts - 1) - m * ((low + high) // 2) + rng.integers(-1000, 1000, count)
    return p.Requant("codes", (1,), 2, m.astype(np.int32), middle, shifts.astype(np.uint8), lo, hi)


def plan_of(layer: Layer, conv: p.Conv, op: p.Requant, sums_shape: tuple[int, ...]) -> p.Plan:
    """The codes go through a maximum over one pixel: an output is not left in registers."""
    dtype = "s8" if op.lo < 0 else "u8"
    values = (
        layer.input(),
        p.Value("sums", sums_shape, "i32", *WIDE),
        p.Value("codes", sums_shape, dtype, op.lo, op.hi),
        p.Value("y", sums_shape, dtype, op.lo, op.hi),
    )
    last = p.MaxPool("y", (2,), 3, (1, 1), (1, 1), (0, 0, 0, 0))
    return p.Plan(values, (conv, op, last), 0, 3, 1.0, (0.0,))


def sums_of(layer: Layer, conv: p.Conv, x: NDArray[np.uint8]) -> NDArray[np.int32]:
    channels, edge = conv.codes.shape[0], 2 * layer.pad - layer.kernel + 1
    shape = (layer.size[0] + edge, layer.size[1] + edge, channels)
    values = (layer.input(), p.Value("sums", shape, "i32", *WIDE))
    return ReferenceExecutor(p.Plan(values, (conv,), 0, 1, 1.0, (0.0,))).run(x)


@pytest.mark.parametrize("name", LAYERS)
def test_codes_from_registers(name: str) -> None:
    layer, rng = LAYERS[name], np.random.default_rng(len(name))
    x = rng.integers(0, 2**layer.bits, (3, *layer.input_shape())).astype(np.uint8)
    conv = layer.conv(rng)
    sums = sums_of(layer, conv, x).astype(np.int64)
    low, high = sums.min((0, 1, 2)), sums.max((0, 1, 2))
    for levels in LEVELS:
        for shift in (FEW, MANY):
            plan = plan_of(layer, conv, requant(low, high, levels, shift, rng), sums.shape[1:])
            expected = ReferenceExecutor(plan).run(x)
            for isa in ISAS:
                engine = EngineExecutor(plan, isa=isa)
                np.testing.assert_array_equal(engine.run(x), expected, f"{isa}, {levels}, shift {shift}")
                kernel = engine.kernels["sums"]
                in_registers = kernel == "avx2-table-pairs" or (isa == "avx512vnni" and kernel != "avx512vpopcnt")
                if shift == MANY and in_registers:
                    ((_, times),) = engine.time_ops(x, 1)
                    assert times[1] == 0, f"{levels}: the convolution does not requantize its sums"


@pytest.mark.parametrize("levels", LEVELS)
def test_every_sum(levels: tuple[int, int]) -> None:
    """All sums from 0 to 25,599 and from 0 to -25,599, so both sides of every step between two codes."""
    rng, channels = np.random.default_rng(0), 19
    layer = Layer((160, 160), (2, channels), 1, 1, 0)
    s = np.arange(160 * 160).reshape(1, 160, 160)
    x = np.stack([s % 100, s // 100], -1).astype(np.uint8)
    sign = rng.choice([-1, 1], channels)
    codes = (sign[:, None] * [1, 100]).astype(np.int8).reshape(channels, 2, 1, 1)
    conv = p.Conv("conv", (0,), 1, "conv", codes, 1, 0, (1, 1), (0,) * 4, (1, 1), 1, np.zeros(2, np.int32))
    low, high = np.minimum(0, sign * 25599), np.maximum(0, sign * 25599)
    plan = plan_of(layer, conv, requant(low, high, levels, MANY, rng), (160, 160, channels))
    expected = ReferenceExecutor(plan).run(x)
    assert len(np.unique(expected)) == levels[1] - levels[0] + 1
    for isa in ISAS:
        np.testing.assert_array_equal(EngineExecutor(plan, isa=isa).run(x), expected, isa)


@pytest.mark.parametrize("shift", [0, 7, 18, 31, 32])
def test_fixed_point_to_the_bound_that_was_proved(shift: int) -> None:
    """Sums at their bounds, whose rescaled values are at those of int32, or a little beyond in every third channel."""
    rng, channels = np.random.default_rng(shift), 37
    layer = Layer((4, 9), (5, channels), 1, 3, 0)
    conv = layer.conv(rng)
    for beyond in (0, 1):
        weights = conv.codes.astype(np.int64)
        low, high = (255 * np.clip(weights, *end).sum((1, 2, 3)) for end in ((-128, 0), (0, 127)))
        reach = np.maximum(high, -low)
        m = (((2**31 - 3) << shift) // reach + np.where(np.arange(channels) % 3 == 0, beyond << shift, 0)).clip(
            1, 2**31 - 1
        )
        constants = (
            m.astype(np.int32),
            np.full(channels, (1 << shift) >> 1, np.int64),
            np.full(channels, shift, np.uint8),
        )
        values = (
            p.Value("x", layer.input_shape(), "u8", 0, 255),
            p.Value("sums", (2, 7, channels), "i32", *WIDE),
            p.Value("y", (2, 7, channels), "i32", -(2**31) + 1, 2**31 - 1),
        )
        rescale = p.Requant("y", (1,), 2, *constants, -(2**31) + 1, 2**31 - 1)
        plan = p.Plan(values, (conv, rescale), 0, 2, 1.0, (0.0,))
        x = rng.integers(0, 256, (2 * channels, *layer.input_shape())).astype(np.uint8)
        for channel, sign in product(range(channels), (0, 1)):  # the window at the top left gives one channel its bound
            x[2 * channel + sign, :3, :3] = 255 * ((weights[channel] > 0) ^ sign).transpose(1, 2, 0)
        expected = ReferenceExecutor(plan).run(x)
        assert shift > 18 or expected.max() > 2**31 - 2**20  # multipliers of larger shifts do not reach as far
        for isa in ISAS:
            np.testing.assert_array_equal(EngineExecutor(plan, isa=isa).run(x), expected, isa)
