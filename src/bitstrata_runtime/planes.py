"""Bit-planes of weight codes: splitting, packing, and widening held codes by one plane (spec/artifact.md, section 4).

A code c of n bits is signed, in [-2^(n-1), 2^(n-1) - 1]. Its planes are the binary digits of the offset code
c + 2^(n-1); plane 1 is the most significant. Because c_(b+1) = 2*c_b + (digit of plane b+1), codes can be widened one
plane at a time without going back to the planes already held.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .errors import ArtifactError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def packed_size(count: int) -> int:
    """Bytes of one packed plane of `count` weights."""
    return (count + 7) // 8


def pack_plane(codes: NDArray[np.int8], bits: int, plane: int) -> NDArray[np.uint8]:
    """Plane `plane` (1..bits) of int8 codes `bits` wide, any shape: uint8 (packed_size(codes.size),), zero padded."""
    offset_codes = codes.reshape(-1).view(np.uint8) + np.uint8(1 << (bits - 1))  # wraps modulo 256, as it should
    return np.packbits((offset_codes >> np.uint8(bits - plane)) & np.uint8(1))


def unpack_plane(packed: NDArray[np.uint8], shape: tuple[int, ...], where: str) -> NDArray[np.int8]:
    """The digits (0 or 1) of a packed plane, int8 of `shape`.

    Raises ArtifactError, naming `where`, if the length is wrong or a padding bit of the last byte is set.
    """
    count = math.prod(shape)
    if packed.shape != (packed_size(count),):
        raise ArtifactError(f"{where}: a plane of {count} weights has {packed_size(count)} bytes, got {packed.size}")
    padding = -count % 8
    if padding and int(packed[-1]) & ((1 << padding) - 1):
        raise ArtifactError(f"{where}: the {padding} padding bits of the last byte must be 0, got 0x{packed[-1]:02x}")
    return np.unpackbits(packed, count=count).view(np.int8).reshape(shape)


def widen(codes: NDArray[np.int8] | None, digits: NDArray[np.int8]) -> NDArray[np.int8]:
    """Codes one bit wider: int8 codes of b bits (None: nothing held yet) and the digits of plane b + 1, same shape.

    Returns a new array; `digits` may be overwritten and returned.
    """
    if codes is None:
        np.subtract(digits, 1, out=digits)  # offset codes 0, 1 -> codes -1, 0
        return digits
    digits += codes  # twice, so that no temporary array is needed; c + d fits int8, as c has at most 7 bits here
    digits += codes
    return digits
