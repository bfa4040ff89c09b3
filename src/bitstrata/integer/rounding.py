"""Rounding to codes: to nearest, or stochastic with random bits that a counter determines.

Philox4x32 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a counter of 128
bits and a key of 64 bits to 128 random bits; with 7 rounds it passes all tests of that paper. The bits of element i are
a function of (seed, stream, i), so results depend neither on the number of threads nor on how a tensor is cut into
pieces. What is here is the definition; on CPUs the engine's kernels compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic")
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
ROUNDS = 7
BLOCK = 128  # elements that sixteen neighbouring counters serve
CHUNK = 1 << 10  # blocks evaluated at a time: temporaries stay in the cache
RESOLUTION = 1 << 16  # stochastic rounding sees a value in these parts of a step
OFFSET = 128  # makes every value that is rounded positive


def philox4x32(counter: Tensor, key: tuple[int, int], rounds: int = 10) -> Tensor:
    """Philox4x32 of each counter.

    Args:
        counter: int64 (4, ...), words c0..c3 as values in 0..2^32 - 1.
        key: two words of 32 bits.
        rounds: 10 is the customary number, 7 the least that passed the authors' tests.

    Returns:
        int64 (4, ...), four words in 0..2^32 - 1 for each counter.
    """
    c0, c1, c2, c3 = counter.unbind()
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, which keeps all bits of a 32 x 32 product; the mask undoes the sign extension
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return torch.stack((c0, c1, c2, c3))


def check_key(seed: int, stream: int, where: str) -> None:
    """ValueError, naming `where`, unless seed and stream are in 0..2^64 - 1."""
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{where}: {name} must be in 0..2^64 - 1, got {value}")


def random_bits(seed: int, stream: int, start: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """Random bits of elements start..start + count - 1 of a stream: int64 (count,), each in 0..2^16 - 1.

    Those of element i are half h of word w of Philox4x32-7 at counter (j low, j high, stream low, stream high), each of
    32 bits, under the key (seed low, seed high), with j = i div 128 * 16 + i mod 32 div 2, w = i div 32 mod 4, and
    h = i mod 2, half 0 being the low one: an order that suits vectors.

    Raises:
        ValueError: seed or stream outside 0..2^64 - 1, or a negative start or count.
    """
    check_key(seed, stream, "random_bits")
    if start < 0 or count < 0:
        raise ValueError(f"random_bits: start and count must not be negative, got {start} and {count}")
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    first, last = start // BLOCK, (start + count - 1) // BLOCK + 1
    out = torch.empty(last - first, 4, 16, 2, dtype=torch.int64, device=device)
    key = (seed & MASK, seed >> 32)
    for begin in range(first, last, CHUNK):
        end = min(begin + CHUNK, last)
        j = torch.arange(begin * 16, end * 16, dtype=torch.int64, device=device)
        high = torch.full_like(j, stream >> 32)
        words = philox4x32(torch.stack((j & MASK, j >> 32, torch.full_like(j, stream & MASK), high)), key, ROUNDS)
        by_block = words.reshape(4, end - begin, 16).transpose(0, 1)
        out[begin - first : end - first, ..., 0] = by_block & (RESOLUTION - 1)
        out[begin - first : end - first, ..., 1] = by_block >> 16
    return out.reshape(-1)[start - BLOCK * first :][:count]


def uniform(seed: int, stream: int, start: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """Uniforms in [0, 1) of elements start..start + count - 1: float32 (count,), their random bits / 2^16."""
    return random_bits(seed, stream, start, count, device).to(torch.float32) / RESOLUTION


class CounterGenerator:
    """A seed and the number of the next stream; each tensor that is rounded takes one stream.

    Args:
        seed, stream: in 0..2^64 - 1.

    Raises:
        ValueError: seed or stream out of range.
    """

    def __init__(self, seed: int, stream: int = 0) -> None:
        check_key(seed, stream, "CounterGenerator")
        self.seed, self.stream = int(seed), int(stream)

    def uniform(self, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
        """Uniforms of the current stream, float32 of `shape` in row-major order; then moves on to the next stream."""
        values = uniform(self.seed, self.stream, 0, math.prod(shape), device).reshape(tuple(shape))
        self.stream += 1
        return values

    def take(self) -> tuple[int, int]:
        """Seed and current stream, for a kernel that draws the bits itself; then moves on to the next stream."""
        self.stream += 1
        return self.seed, self.stream - 1

    def state_dict(self) -> dict[str, int]:
        """Seed and next stream, all that an exact resume needs."""
        return {"seed": self.seed, "stream": self.stream}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues where `state_dict` was taken."""
        check_key(state["seed"], state["stream"], "CounterGenerator")
        self.seed, self.stream = int(state["seed"]), int(state["stream"])


def stochastic_round(z: Tensor, u: Tensor) -> Tensor:
    """R(z) = floor(z + u) for z taken to a multiple of 2^-16: (int((z + 128) 2^16) + int(u 2^16) >> 16) - 128.

    Integers, so that no sum is rounded and with it the probability; z + 128 is, in z's dtype, to nearest.

    Args:
        z: floating, any shape, at least -128, below 384.
        u: uniforms in [0, 1), same shape.

    Returns:
        Whole numbers in z's dtype, NaN where z is. For u uniform on the multiples of 2^-16 the mean is z to within
        2^-16 and the variance f (1 - f), f = z - floor(z).
    """
    whole = torch.nan_to_num((z + OFFSET) * RESOLUTION).to(torch.int64)
    rounded = (whole + (u * RESOLUTION).to(torch.int64) >> 16) - OFFSET
    return rounded.to(z.dtype).masked_fill_(z.isnan(), torch.nan)


class CounterRounding:
    """Stochastic rounding of a batch's (N, C, ...) values by a counter: the next stream of `generator` at each call."""

    def __init__(self, generator: CounterGenerator) -> None:
        self.generator = generator

    def __call__(self, z: Tensor) -> Tensor:
        """z, floating, rounded to whole numbers; its mean over draws is z."""
        rows = z.movedim(1, -1)  # random bits belong to elements in the order with channels last
        return stochastic_round(rows, self.generator.uniform(rows.shape, z.device)).movedim(-1, 1)


def check_rounding(rounding: str, generator: CounterGenerator | None, where: str) -> None:
    """ValueError, naming `where`, for an unknown rounding, or a stochastic one without a generator."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"{where}: rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    if rounding == "stochastic" and generator is None:
        raise ValueError(f"{where}: rounding 'stochastic' needs a generator (CounterGenerator), got None")


def round_codes(
    z: Tensor, lo: int, hi: int, *, rounding: str, generator: CounterGenerator | None, where: str, axis: int = -1
) -> Tensor:
    """Codes clip(R(z), lo, hi): int8, or uint8 if hi is above 127.

    Args:
        z: x / step, floating, any shape.
        rounding: "nearest" (ties to even) or "stochastic", which takes one stream of `generator`.
        where: the operation that errors name.
        axis: random bits belong to elements in row-major order with this axis last.

    Raises:
        ValueError: unknown rounding; stochastic rounding without a generator.
    """
    check_rounding(rounding, generator, where)
    if rounding == "nearest" or generator is None:
        rounded = z.round()
    else:
        rows = z.movedim(axis, -1)
        rounded = stochastic_round(rows, generator.uniform(rows.shape, z.device)).movedim(-1, axis)
    return rounded.clamp_(lo, hi).to(torch.uint8 if hi > 127 else torch.int8)
