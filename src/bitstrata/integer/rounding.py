"""Rounding to codes: to nearest, or stochastic with uniforms that a counter determines.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a counter of 128
bits and a key of 64 bits to 128 random bits. The uniform of element i is a function of (seed, stream, i), so results
depend neither on the number of threads nor on how a tensor is cut into pieces.
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
CHUNK = 1 << 14  # counters evaluated at a time: temporaries stay in the cache


def philox4x32(counter: Tensor, key: tuple[int, int], rounds: int = 10) -> Tensor:
    """Philox4x32 of each counter.

    Args:
        counter: int64 (4, ...), words c0..c3 as values in 0..2^32 - 1.
        key: two words of 32 bits.
        rounds: 10 is the standard number.

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


def random_words(seed: int, stream: int, start: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """Random words of elements start..start + count - 1 of a stream: int64 (count,), each in 0..2^32 - 1.

    Element i is word i mod 4 of Philox4x32-10 at counter (j low, j high, stream low, stream high), j = i div 4, under
    the key (seed low, seed high).

    Raises:
        ValueError: seed or stream outside 0..2^64 - 1, or a negative start or count.
    """
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value < 1 << 64:
            raise ValueError(f"random_words: {name} must be in 0..2^64 - 1, got {value}")
    if start < 0 or count < 0:
        raise ValueError(f"random_words: start and count must not be negative, got {start} and {count}")
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    first, last = start // 4, (start + count - 1) // 4 + 1
    out = torch.empty(last - first, 4, dtype=torch.int64, device=device)
    key = (seed & MASK, seed >> 32)
    for begin in range(first, last, CHUNK):
        end = min(begin + CHUNK, last)
        j = torch.arange(begin, end, dtype=torch.int64, device=device)
        high = torch.full_like(j, stream >> 32)
        counter = torch.stack((j & MASK, j >> 32, torch.full_like(j, stream & MASK), high))
        out[begin - first : end - first] = philox4x32(counter, key).T
    return out.reshape(-1)[start - 4 * first :][:count]


def uniform(seed: int, stream: int, start: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """Uniforms in [0, 1) of elements start..start + count - 1: float32 (count,), the upper 24 bits of the words /
    2^24.
    """
    return (random_words(seed, stream, start, count, device) >> 8).to(torch.float32) * 2.0**-24


class CounterGenerator:
    """A seed and the number of the next stream; each tensor that is rounded takes one stream.

    Args:
        seed, stream: in 0..2^64 - 1.

    Raises:
        ValueError: seed or stream out of range.
    """

    def __init__(self, seed: int, stream: int = 0) -> None:
        random_words(seed, stream, 0, 0)  # checks both
        self.seed, self.stream = int(seed), int(stream)

    def uniform(self, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
        """Uniforms of the current stream, float32 of `shape` in row-major order; then moves on to the next stream."""
        values = uniform(self.seed, self.stream, 0, math.prod(shape), device).reshape(tuple(shape))
        self.stream += 1
        return values

    def state_dict(self) -> dict[str, int]:
        """Seed and next stream, all that an exact resume needs."""
        return {"seed": self.seed, "stream": self.stream}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues where `state_dict` was taken."""
        random_words(state["seed"], state["stream"], 0, 0)
        self.seed, self.stream = int(state["seed"]), int(state["stream"])


def stochastic_round(z: Tensor, u: Tensor) -> Tensor:
    """R(z) = floor(z + u), evaluated as floor(z) + [u >= 1 - (z - floor(z))].

    Adding u to a large z would round the sum and with it the probability; the fraction alone is exact.

    Args:
        z: floating, any shape.
        u: uniforms in [0, 1), same shape.

    Returns:
        Whole numbers in z's dtype. For u uniform the mean is z and the variance f (1 - f), f = z - floor(z).
    """
    floor = z.floor()
    return floor + (u >= 1 - (z - floor))


def round_codes(
    z: Tensor, lo: int, hi: int, *, rounding: str, generator: CounterGenerator | None, where: str
) -> Tensor:
    """Codes clip(R(z), lo, hi): int8, or uint8 if hi is above 127.

    Args:
        z: x / step, floating, any shape.
        rounding: "nearest" (ties to even) or "stochastic", which takes one stream of `generator`.
        where: the operation that errors name.

    Raises:
        ValueError: unknown rounding; stochastic rounding without a generator.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"{where}: rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    if rounding == "nearest":
        rounded = z.round()
    elif generator is None:
        raise ValueError(f"{where}: rounding 'stochastic' needs a generator (CounterGenerator), got None")
    else:
        rounded = stochastic_round(z, generator.uniform(z.shape, z.device))
    return rounded.clamp_(lo, hi).to(torch.uint8 if hi > 127 else torch.int8)
