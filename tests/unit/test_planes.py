"""Bit-planes: exhaustive over codes and widths, and the rules of packing."""

import numpy as np
import pytest

from bitstrata_runtime.errors import ArtifactError
from bitstrata_runtime.planes import pack_plane, packed_size, unpack_plane, widen


def held(codes, bits, planes):
    """Codes rebuilt from the first `planes` planes."""
    found = None
    for plane in range(1, planes + 1):
        found = widen(found, unpack_plane(pack_plane(codes, bits, plane), codes.shape, "test"))
    return found


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_at_every_width_is_the_shifted_code(bits):
    codes = np.arange(-(1 << (bits - 1)), 1 << (bits - 1)).astype(np.int8)
    for planes in range(1, bits + 1):
        found = held(codes, bits, planes)
        assert found.dtype == np.int8
        np.testing.assert_array_equal(found, codes >> (bits - planes))


def test_planes_are_the_digits_of_the_offset_code():
    codes = np.array([-4, -3, -2, -1, 0, 0, 1, 3], np.int8)  # offset codes 0 1 2 3 4 4 5 7
    planes = [pack_plane(codes, 3, plane).tolist() for plane in (1, 2, 3)]
    assert planes == [[0b00001111], [0b00110001], [0b01010011]]


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65])
def test_round_trip_of_every_size_around_a_byte(count):
    codes = np.random.default_rng(count).integers(-8, 8, (1, count, 1, 1)).astype(np.int8)
    assert pack_plane(codes, 4, 1).size == packed_size(count) == -(-count // 8)
    np.testing.assert_array_equal(held(codes, 4, 4), codes)


def test_packing_goes_in_c_order_with_the_first_weight_in_the_top_bit():
    codes = np.full((2, 3, 1, 2), -1, np.int8)
    codes[0, 0, 0, 0] = codes[1, 0, 0, 1] = 0  # elements 0 and 7 of 12
    assert pack_plane(codes, 1, 1).tolist() == [0b10000001, 0]


def test_widening_leaves_the_held_codes_alone():
    before = np.array([-1, 0], np.int8)
    after = widen(before, np.array([1, 0], np.int8))
    assert before.tolist() == [-1, 0]
    assert after.tolist() == [-1, 0]
    assert widen(before, np.array([0, 1], np.int8)).tolist() == [-2, 1]


@pytest.mark.parametrize("padding", range(1, 8))
def test_a_set_padding_bit_is_an_error(padding):
    count = 16 - padding
    packed = np.array([0, 1 << (padding - 1)], np.uint8)
    with pytest.raises(ArtifactError, match=rf"here: the {padding} padding bits of the last byte must be 0, got 0x"):
        unpack_plane(packed, (count,), "here")
    packed[1] = 0xFF ^ ((1 << padding) - 1)
    assert unpack_plane(packed, (count,), "here").sum() == 8 - padding


def test_a_wrong_length_is_an_error():
    with pytest.raises(ArtifactError, match="here: a plane of 9 weights has 2 bytes, got 1"):
        unpack_plane(np.zeros(1, np.uint8), (9,), "here")
