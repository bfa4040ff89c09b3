"""Weight codes as the runtime's convolutions read them: unsigned, as few bits as they need, packed without gaps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitstrata_runtime.plan import Conv, Value

BLOCK = 32  # channels of a depthwise convolution that are unpacked together
_MOST_TAPS = 256  # elements of a depthwise window whose codes' sum fits 16 bits
_MOST_PRODUCT = 63  # sums of four products within a byte
_MOST_TURNS = 252
_LANES = {"bytes": (8, 4), "pairs": (16, 2), "depthwise": (8, 4)}  # bits of a lane, lanes of a word


@dataclass(frozen=True)
class PackedConv:
    """A convolution's tables; fields as of `bs_conv` in bitstrata_mcu.h. kernel: bytes, pairs or depthwise."""

    kernel: str
    weights: NDArray[np.uint32]  # (rows, row_words)
    base: NDArray[np.int32] | None
    pad: NDArray[np.uint8] | None
    pad_code: int
    depth: int
    words: int
    block: int
    multiplier: int
    addend: int
    low: int
    bits: int
    turns: int


def pack(op: Conv, source: Value) -> PackedConv:
    """The tables of a convolution that reads `source`."""
    out, per_group, kernel_h, kernel_w = op.codes.shape
    least, most = int(op.codes.min()), int(op.codes.max())
    codes = (op.codes.astype(np.int64) - least).astype(np.uint32)
    bits = max((most - least).bit_length(), 1)
    padded = any(op.padding)
    low = min(source.lo, int(op.pad_code.min()) if padded else 0, 0)
    largest = (max(source.hi, int(op.pad_code.max()) if padded else 0) - low) * (most - least)
    taps = kernel_h * kernel_w
    if per_group == 1 and out == op.groups > 1 and taps <= _MOST_TAPS:
        kernel, block = "depthwise", min(BLOCK, -(-out // 4) * 4)
        rows = _depthwise_rows(codes.reshape(out, taps), block)
    else:
        kernel, block = "bytes" if largest <= _MOST_PRODUCT else "pairs", 0
        rows = codes.transpose(0, 2, 3, 1).reshape(out, taps * per_group)
    words = _words(kernel, rows)
    totals = (op.mul * op.codes.astype(np.int64) + op.add).sum(axis=(1, 2, 3))
    pads = (op.pad_code - low).astype(np.uint8)
    same = not padded or bool((pads == pads[0]).all())
    return PackedConv(
        kernel=kernel,
        weights=np.concatenate(_sections(words, bits, kernel), axis=1),
        base=(low * totals).astype(np.int32) if low else None,
        pad=None if same else pads,
        pad_code=int(pads[0]) if padded and same else 0,
        depth=taps if kernel == "depthwise" else rows.shape[1],
        words=words.shape[1],
        block=block,
        multiplier=op.mul,
        addend=op.mul * least + op.add,
        low=low,
        bits=bits,
        turns=_turns(largest) if kernel == "bytes" else 0,
    )


def scratch_bytes(conv: PackedConv, tile: int) -> int:
    """What the convolution's kernel needs beside its maps; see bitstrata_mcu.h."""
    if conv.kernel == "depthwise":
        return 8 * conv.depth * conv.words
    return 4 * (2 * conv.words + (tile + tile % 2) * (conv.words + 1))


def _turns(largest: int) -> int:
    turns = min(_MOST_PRODUCT // largest if largest else _MOST_TURNS, _MOST_TURNS)
    return turns // 4 * 4 if turns >= 8 else turns


def _depthwise_rows(codes: NDArray[np.uint32], block: int) -> NDArray[np.uint32]:
    """(channels, taps) -> (blocks * taps, block)."""
    channels, taps = codes.shape
    blocks = -(-channels // block)
    filled = np.zeros((blocks * block, taps), np.uint32)
    filled[:channels] = codes
    return filled.reshape(blocks, block, taps).transpose(0, 2, 1).reshape(blocks * taps, block)


def _words(kernel: str, rows: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Codes in the lanes of unpacked words, (rows, words)."""
    lane_bits, lanes = _LANES[kernel]
    count, depth = rows.shape
    filled = np.zeros((count, -(-depth // 4) * 4), np.uint32)
    filled[:, :depth] = rows
    fours = filled.reshape(count, -1, 4)
    if kernel == "pairs":
        fours = fours[:, :, [0, 2, 1, 3]]
    elif kernel == "bytes":
        fours = fours[:, :, ::-1]
    each = fours.reshape(count, -1, lanes)
    return np.bitwise_or.reduce(each << (np.arange(lanes, dtype=np.uint32) * np.uint32(lane_bits)), axis=2)


def _sections(words: NDArray[np.uint32], bits: int, kernel: str) -> list[NDArray[np.uint32]]:
    """For each power of two in `bits`, from the largest: words that hold so many bits of each code."""
    lane_bits, lanes = _LANES[kernel]
    sections, shift = [], bits
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        shift -= width
        mask = np.uint32(sum(((1 << width) - 1) << (lane * lane_bits) for lane in range(lanes)))
        fields = (words >> np.uint32(shift)) & mask
        each = lane_bits // width
        filled = np.zeros((len(words), -(-words.shape[1] // each) * each), np.uint32)
        filled[:, : words.shape[1]] = fields
        shifts = np.arange(each, dtype=np.uint32) * np.uint32(width)
        sections.append(np.bitwise_or.reduce(filled.reshape(len(words), -1, each) << shifts, axis=2))
    return sections
