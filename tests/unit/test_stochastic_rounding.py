"""Stochastic rounding: the counter-based generator against published vectors, and the moments of what is rounded."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitstrata.integer import CounterGenerator, philox4x32, random_bits, shift_quantize, stochastic_round, uniform
from bitstrata.integer.rounding import BLOCK, CHUNK, ROUNDS, CounterRounding, round_codes

ONES = 0xFFFFFFFF
VECTORS = [  # counter, key, result: the known answers that come with Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
DRAWS = 1 << 20


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_philox_known_answers(counter, key, result):
    assert philox4x32(torch.tensor(counter), key).tolist() == list(result)


def test_philox_takes_counters_side_by_side():
    counters = torch.tensor([VECTORS[0][0], (1, 2, 3, 4), (ONES, 0, ONES, 0)])
    together = philox4x32(counters.T, (5, 6))
    for i, counter in enumerate(counters):
        assert together[:, i].tolist() == philox4x32(counter, (5, 6)).tolist()


@pytest.mark.parametrize("element", [0, 1, 2, 31, 32, 64, 127, 128, 128 * 3 + 77, 8 * ((1 << 33) + 5) + 3])
def test_bits_are_those_of_the_documented_counter(element):
    seed, stream = (7 << 32) + 9, (11 << 32) + 13
    j, word, half = element // 128 * 16 + element % 32 // 2, element // 32 % 4, element % 2
    words = philox4x32(torch.tensor([j & ONES, j >> 32, 13, 11]), (9, 7), ROUNDS)
    assert random_bits(seed, stream, element, 1).tolist() == [int(words[word]) >> (16 * half) & 0xFFFF]


def test_uniforms_are_the_bits_as_a_fraction():
    bits = random_bits(8, 1, 5, 1000)
    assert (uniform(8, 1, 5, 1000).double() * 2**16).tolist() == bits.tolist()


def test_an_element_depends_on_seed_stream_and_place_only():
    count = BLOCK * CHUNK + 6
    whole = uniform(3, 2, 0, count)
    for start, size in ((0, 1), (1, 7), (3, 4), (4, 4), (BLOCK * CHUNK - 3, 9), (count - 1, 1)):
        assert torch.equal(whole[start : start + size], uniform(3, 2, start, size))
    pieces = [uniform(3, 2, start, min(999, count - start)) for start in range(0, count, 999)]
    assert torch.equal(whole, torch.cat(pieces))
    assert not torch.equal(whole[:64], uniform(4, 2, 0, 64))
    assert not torch.equal(whole[:64], uniform(3, 3, 0, 64))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(whole, uniform(3, 2, 0, count))
    finally:
        torch.set_num_threads(threads)


def test_uniformity():
    u = uniform(0, 0, 0, DRAWS)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    sigma = 1 / math.sqrt(12 * DRAWS)
    assert abs(float(u.double().mean()) - 0.5) < 3 * sigma
    assert abs(float(u.double().var()) - 1 / 12) < 3 * math.sqrt(1 / 180 / DRAWS)
    counts = torch.bincount((u * 256).long(), minlength=256).double()
    expected = DRAWS / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < 3 * math.sqrt(2 * 255)
    v = u.double() - 0.5  # neighbours, in one counter and across counters, and streams
    for lag in (1, 2, 3, 4):
        assert abs(float((v[lag:] * v[:-lag]).mean()) * 12) < 4 / math.sqrt(DRAWS)
    assert abs(float((v * (uniform(0, 1, 0, DRAWS).double() - 0.5)).mean()) * 12) < 4 / math.sqrt(DRAWS)


def test_each_bit_is_fair():
    bits = random_bits(1, 0, 0, 1 << 16)
    for bit in range(16):
        ones = int((bits >> bit & 1).sum())
        assert abs(ones - (1 << 15)) < 4 * 128


def test_generator_takes_a_stream_a_tensor_and_resumes():
    generator = CounterGenerator(5, stream=2)
    first = generator.uniform((3, 4))
    state = generator.state_dict()
    second = generator.uniform((7,))
    assert state == {"seed": 5, "stream": 3}
    assert torch.equal(first.reshape(-1), uniform(5, 2, 0, 12))
    assert torch.equal(second, uniform(5, 3, 0, 7))
    resumed = CounterGenerator(0)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.uniform((7,)), second)
    assert resumed.stream == 4


@pytest.mark.parametrize(
    ("x", "step", "mean", "variance"), [(0.3, 0.125, 0.3, 0.00375), (0.3, 1, 0.3, 0.21), (2.6, 1, 2.6, 0.24)]
)
def test_moments(x, step, mean, variance):
    rounded = stochastic_round(torch.full((DRAWS,), x / step), uniform(1, 0, 0, DRAWS)).double() * step
    f = x / step - math.floor(x / step)
    assert step * step * f * (1 - f) == pytest.approx(variance, abs=1e-12)
    assert abs(float(rounded.mean()) - mean) < 3 * math.sqrt(variance / DRAWS)
    fourth = step**4 * f * (1 - f) * (1 - 4 * f * (1 - f))  # variance of the squared deviation, of two values
    assert abs(float(((rounded - mean) ** 2).mean()) - variance) < 3 * math.sqrt(fourth / DRAWS) + 1e-7
    assert set(rounded.unique().tolist()) == {math.floor(x / step) * step, math.floor(x / step) * step + step}


def test_worked_example_with_given_uniforms():
    z = torch.tensor([[7.0, 4.0, 3.2, 1.6], [-3.5, -7.0, 7.0, -0.4]])
    u = torch.tensor([[0.0, 0.5, 0.25, 0.9], [0.25, 0.6, 0.5, 0.1]])
    assert stochastic_round(z, u).tolist() == [[7, 4, 3, 2], [-4, -7, 7, -1]]
    assert torch.equal(stochastic_round(z, u), (z + u).floor())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_numbers_and_the_ends_of_the_range_never_move(dtype):
    z = torch.arange(-127, 128, dtype=dtype)
    largest = torch.full_like(z, 1 - 2**-16)
    for u in (torch.zeros_like(z), largest):
        assert torch.equal(stochastic_round(z, u), z)
    below = z - 2**-15  # a value counts as its multiple of 2^-16
    assert torch.equal(stochastic_round(below, torch.zeros_like(z)), z - 1)


def test_probability_is_the_fraction_at_every_magnitude():
    u = (torch.arange(1 << 12, dtype=torch.float32)) / (1 << 12)  # every multiple of 2^-12 once: an exact count
    for whole in (-127, -64, -1, 0, 1, 63, 126):
        for sixteenths in range(16):
            z = torch.full_like(u, whole + sixteenths / 16)
            assert int((stochastic_round(z, u) - whole).sum()) == sixteenths << 8


def test_a_value_counts_as_its_multiple_of_a_part_in_65536():
    u = torch.arange(1 << 16) / (1 << 16)  # every uniform once: an exact mean
    for z in (0.3, -126.7, 99.123456, 1e-6, -1e-6):
        mean = float(stochastic_round(torch.full_like(u, z), u).double().mean())
        assert abs(mean - z) <= 2**-16


def test_nan_stays_nan():
    assert stochastic_round(torch.tensor([torch.nan, 1.5]), torch.tensor([0.5, 0.75])).isnan().tolist() == [True, False]


def test_bits_belong_to_elements_with_the_channels_last():
    x = torch.rand(2, 3, 4, 5) * 100
    drawn = CounterGenerator(1).uniform((2, 4, 5, 3))
    expected = stochastic_round(x, drawn.movedim(-1, 1))
    assert torch.equal(CounterRounding(CounterGenerator(1))(x), expected)
    codes = round_codes(x, 0, 127, rounding="stochastic", generator=CounterGenerator(1), where="here", axis=1)
    assert torch.equal(codes, expected.to(torch.int8))


def test_rounding_does_not_depend_on_the_memory_format():
    x = torch.randn(3, 8, 5, 6, generator=torch.Generator().manual_seed(0))
    plain = shift_quantize(x, 4, rounding="stochastic", generator=CounterGenerator(1))
    last = shift_quantize(
        x.to(memory_format=torch.channels_last), 4, rounding="stochastic", generator=CounterGenerator(1)
    )
    assert torch.equal(plain.codes, last.codes)
    assert not torch.equal(plain.codes, shift_quantize(x, 4).codes)


def test_codes_round_to_nearest_even_and_clip():
    z = torch.tensor([-9.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 9.0])
    codes = round_codes(z.clone(), -7, 7, rounding="nearest", generator=None, where="here")
    assert codes.tolist() == [-7, -2, -2, 0, 0, 2, 2, 7]
    assert codes.dtype == torch.int8
    assert round_codes(z + 100, 0, 255, rounding="nearest", generator=None, where="here").dtype == torch.uint8


def bad_bits(seed: int = 0, stream: int = 0, start: int = 0, count: int = 1) -> Tensor:
    return random_bits(seed, stream, start, count)


def test_errors():
    with pytest.raises(ValueError, match=r"seed must be in 0\.\.2\^64 - 1, got -1"):
        CounterGenerator(-1)
    with pytest.raises(ValueError, match=r"stream must be in 0\.\.2\^64 - 1, got 18446744073709551616"):
        bad_bits(stream=1 << 64)
    with pytest.raises(ValueError, match="start and count must not be negative, got -4 and 1"):
        bad_bits(start=-4)
    with pytest.raises(ValueError, match="got 0 and -1"):
        bad_bits(count=-1)
    assert bad_bits(count=0).shape == (0,)
    z = torch.zeros(2)
    with pytest.raises(ValueError, match="here: rounding must be 'nearest' or 'stochastic', got 'up'"):
        round_codes(z, -7, 7, rounding="up", generator=None, where="here")
    with pytest.raises(ValueError, match="here: rounding 'stochastic' needs a generator"):
        round_codes(z, -7, 7, rounding="stochastic", generator=None, where="here")
