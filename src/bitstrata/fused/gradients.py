"""Gradients of activations in a fused step of training in integers: what arrives from several readers, and its sum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitstrata_runtime import _engine

from ..integer.engine_codes import FASTEST
from ..integer.pool import Pool


@dataclass(frozen=True)
class Pooled:
    """The gradient of a maximum pooling of an activation, which gives the activation's: float32 (rows, channels) of the
    pooled map, where maxima were, and the window as the engine takes it.
    """

    rows: NDArray[np.float32]
    places: NDArray[np.uint8]  # (samples, height, width, channels)
    window: Any

    def spread(self, pool: Pool) -> NDArray[np.float32]:
        """The activation's gradient, (rows, channels), taken from the pool, to which this returns."""
        samples, _, _, channels = self.places.shape
        out = pool.take((samples, *self.window[0], channels), np.float32)
        gradient = self.rows.reshape(self.places.shape)
        _engine.max_pool_gradient(gradient, self.places, self.window, out, FASTEST, torch.get_num_threads())
        self.release(pool)
        return out.reshape(-1, channels)

    def release(self, pool: Pool) -> None:
        """Give the memory back."""
        pool.give(self.rows)
        pool.give(self.places)


@dataclass(frozen=True)
class Strided:
    """A product's accumulators, of every stride-th pixel of an activation's maps; the others have 0.

    sums: int32 (samples, height, width, channels) of these pixels. scale: float32 (channels,). map: height and width.
    """

    sums: NDArray[np.int32]
    scale: NDArray[np.float32]
    map: tuple[int, int]
    stride: tuple[int, int]

    def spread(self, pool: Pool) -> NDArray[np.float32]:
        """The activation's gradient, (rows, channels), taken from the pool, to which this returns."""
        samples, _, _, channels = self.sums.shape
        out = pool.take((samples * self.map[0] * self.map[1], channels), np.float32)
        out.fill(0)
        self.join(out, None, None, out)
        self.release(pool)
        return out

    def join(
        self,
        other: NDArray[Any],
        scale: NDArray[np.float32] | None,
        bits: NDArray[np.uint8] | None,
        out: NDArray[np.float32],
    ) -> float:
        """Its sum with another summand, (rows, channels), 0 where bits are 0; the largest magnitude."""
        threads = torch.get_num_threads()
        strided = self.map, self.stride, self.sums, self.scale
        return _engine.join_strided(other, scale, *strided, bits, out, FASTEST, threads)

    def release(self, pool: Pool) -> None:
        """Give the memory back."""
        pool.give(self.sums)


Product = tuple[NDArray[Any], NDArray[np.float32] | None]


@dataclass
class Gradient:
    """A sum of floats and of products' accumulators times scales, whose memory is the pool's.

    sums: float32 (rows, channels), not to be written, or of poolings. products: int32 (rows, channels) with float32
    (channels,), or of some pixels.
    """

    sums: list[NDArray[np.float32] | Pooled] = field(default_factory=list)
    range: float | None = None  # largest magnitude in the last of the sums, where known
    products: list[Product | Strided] = field(default_factory=list)
    passed: float | None = None  # likewise in the last of the products, where the activation's normalization passes it

    def __bool__(self) -> bool:
        return bool(self.sums or self.products)

    def append(self, summand: NDArray[np.float32] | Pooled, largest: float | None = None) -> None:
        """Add floats, and their largest magnitude where it is known."""
        self.sums.append(summand)
        self.range = largest

    def single(self) -> Product | Pooled | None:
        """The only summand and its scale, if there is but one and it has all pixels."""
        if len(self.sums) + len(self.products) != 1:
            return None
        if self.products:
            return None if isinstance(self.products[0], Strided) else self.products[0]
        return self.sums[0] if isinstance(self.sums[0], Pooled) else (self.sums[0], None)

    def total(self, pool: Pool, bits: NDArray[np.uint8] | None = None) -> tuple[NDArray[np.float32], float]:
        """Its value, 0 where bits are 0, and the largest magnitude: float32 (rows, channels) taken from the pool."""
        strided = self._take_strided()
        sums = [part.spread(pool) if isinstance(part, Pooled) else part for part in self.sums]
        self.sums = [*sums]
        products = [(part.spread(pool), None) if isinstance(part, Strided) else part for part in self.products]
        self.products = [*products]
        summands: list[Product] = [*products, *((s, None) for s in sums)]
        (first, scale), rest = summands[0], summands[1:]
        add = sums[-1] if rest and sums else None
        if add is not None:
            rest = rest[:-1]
        if add is not None and pool.sole(add):
            out = add
            self.sums.pop()
        elif self.products and pool.sole(first):  # every sum is read before its place is written
            out = first.view(np.float32)
            self.products.pop(0)
        else:
            out = pool.take(tuple(first.shape), np.float32)
        if strided is not None:
            largest = strided.join(first, scale, bits, out)
            strided.release(pool)
            return out, largest
        isa, threads = FASTEST, torch.get_num_threads()
        to, keep = out, bits
        largest = _engine.join(first, scale, add, None if rest else keep, to, isa, threads)
        for i, (other, factor) in enumerate(rest):
            last = i + 1 == len(rest)
            largest = _engine.join(other, factor, to, keep if last else None, to, isa, threads)
        return out, largest

    def release(self, pool: Pool) -> None:
        """Give all summands back."""
        for part in self.sums:
            part.release(pool) if isinstance(part, Pooled) else pool.give(part)
        for product in self.products:
            product.release(pool) if isinstance(product, Strided) else pool.give(product[0])
        self.sums.clear()
        self.products.clear()

    def _take_strided(self) -> Strided | None:
        """The only one of two summands that has some pixels alone: out of the list, to be added in one pass."""
        found = [part for part in self.products if isinstance(part, Strided)]
        if len(self.sums) + len(self.products) != 2 or len(found) != 1:
            return None
        self.products.remove(found[0])
        return found[0]
