"""What flows between the units of a fused step: activations that turn into codes or floats where somebody asks.

A tensor is rows of channels: (samples * height * width, channels), contiguous.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitstrata_runtime import _engine

from ..integer.engine_codes import FASTEST
from ..integer.pool import Pool
from ..integer.rule import IntegerRule
from .gradients import Gradient

Shape = tuple[int, int, int, int]


class NotFiniteError(ValueError):
    """An activation or a gradient is NaN or infinite."""


@dataclass(frozen=True)
class Format:
    """What codes a product takes: ShiftQuant of `bits` in `groups`; 0..2^bits - 1 if not signed; ranges times
    clip_ratio. powers: 0 and powers of two instead, of one group.
    """

    bits: int
    groups: int
    signed: bool = True
    clip_ratio: float = 1.0
    powers: bool = False

    @staticmethod
    def of_gradient(rule: IntegerRule) -> Format:
        """Of a layer's gradients."""
        return Format(rule.g, rule.grad_groups, powers=rule.grad_grid == "powers")

    @property
    def absorbed(self) -> bool:
        """Whether codes are stored as code << (groups - 1 - exponent), which fits into their bytes."""
        return self.bits + self.groups - 1 <= 8


def as_map(rows: NDArray[np.float32], shape: Shape) -> Tensor:
    """Rows of channels as (N, C, H, W), channels last in memory: the same memory."""
    return torch.from_numpy(rows).view(shape).permute(0, 3, 1, 2)


class Flow(ABC):
    """A tensor between units, with the gradient that arrives at it.

    Attributes:
        wanted: whether anybody asks for the gradient.
    """

    wanted: bool

    @abstractmethod
    def as_leaf(self) -> Tensor:
        """The values for torch, which may keep them: a leaf that collects a gradient if one is wanted."""

    @abstractmethod
    def deliver(self, gradient: Tensor) -> None:
        """A gradient, of the leaf's shape, arrives."""

    @abstractmethod
    def take_gradient(self, step: Any, like: Tensor) -> Tensor | None:
        """All that has arrived, in torch's memory and in the dtype of `like`; None if nothing has."""

    @abstractmethod
    def forget(self) -> None:
        """All that reads it in the forward pass has run."""

    @abstractmethod
    def release(self) -> None:
        """All that reads it has run, backward pass included."""


class Value(Flow):
    """An activation, (samples, height, width, channels).

    Attributes:
        gradient: what has arrived in the backward pass. wanted: whether anybody asks for it.
        escaped: memory of `real` is also in torch's hands and does not return to the pool.
    """

    def __init__(self, shape: Shape, pool: Pool) -> None:
        self.shape, self.pool = shape, pool
        self.gradient = Gradient()
        self.wanted, self.escaped = True, False
        self._real: NDArray[np.float32] | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """Shape as rows of channels."""
        n, h, w, c = self.shape
        return n * h * w, c

    def real(self) -> NDArray[np.float32]:
        """float32 (rows, channels)."""
        if self._real is None:
            self._real = self._make_real()
        return self._real

    def forget(self) -> None:
        """All that reads it in the forward pass has run."""
        if self._real is not None and not self.escaped:
            self.pool.give(self._real)
        self._real = None

    def release(self) -> None:
        """All that reads it has run, backward pass included."""
        self.gradient.release(self.pool)

    def as_leaf(self) -> Tensor:
        self.real()
        self.escaped = True
        return as_map(self.real(), self.shape).requires_grad_(self.wanted)

    def deliver(self, gradient: Tensor) -> None:
        rows = self.pool.take(self.rows, np.float32)
        as_map(rows, self.shape).copy_(gradient)
        self.gradient.append(rows)

    def take_gradient(self, step: Any, like: Tensor) -> Tensor | None:
        if not self.gradient:
            return None
        total, _ = self.gradient.total(self.pool)
        own = as_map(total.copy(), self.shape)  # torch may keep it longer than the pool lends it
        self.pool.give(total)
        return own

    @abstractmethod
    def never_negative(self) -> bool:
        """Whether no element is below 0."""

    @abstractmethod
    def input(self, form: Format) -> Any:
        """What a convolution reads, forward and backward, as codes to nearest: _engine.ConvInput."""

    @abstractmethod
    def _make_real(self) -> NDArray[np.float32]: ...


class Real(Value):
    """An activation that is given as floats: float32 (rows, channels).

    ranges: the channels' largest magnitudes, float32 (channels,), where they are known.
    """

    def __init__(
        self,
        real: NDArray[np.float32],
        shape: Shape,
        pool: Pool,
        *,
        escaped: bool,
        rectified: bool = False,
        ranges: NDArray[np.float32] | None = None,
    ) -> None:
        super().__init__(shape, pool)
        self._real, self.escaped = real, escaped
        self._rectified, self._ranges = rectified, ranges
        self._inputs: dict[Format, tuple[NDArray[np.uint8], Any]] = {}  # codes, as bytes until they are at rest

    def never_negative(self) -> bool:
        if not self._rectified and self._real is not None:
            self._rectified = bool(self._real.min() >= 0)
        return self._rectified

    def input(self, form: Format) -> Any:
        if form not in self._inputs:
            self._inputs[form] = self._make_input(form)
        return self._inputs[form][1]

    def forget(self) -> None:
        super().forget()
        for form, (codes, made) in self._inputs.items():
            if made.rests:
                packed = self.pool.take(((codes.size * form.bits + 7) // 8,), np.uint8)
                made.rest(packed, FASTEST, torch.get_num_threads())
                self.pool.give(codes)
                self._inputs[form] = packed, made

    def release(self) -> None:
        super().release()
        for data, _ in self._inputs.values():
            self.pool.give(data)
        self._inputs.clear()

    def _make_input(self, form: Format) -> tuple[NDArray[np.uint8], Any]:
        out = self.pool.take(self.shape, np.uint8)
        scale, exponents = _engine.shift_codes(
            self.real(),
            form.bits,
            form.groups,
            form.signed,
            form.absorbed,
            form.clip_ratio,
            None,
            out.reshape(self.rows),
            self._ranges,
            FASTEST,
            torch.get_num_threads(),
        )
        if math.isnan(scale):
            raise NotFiniteError("its activation contains NaN or infinity")
        return out, _engine.ConvInput(out, scale, exponents, form.bits, form.groups, form.signed, form.absorbed)

    def _make_real(self) -> NDArray[np.float32]:
        raise AssertionError("its floats were dropped")


class Normed(Value):
    """The result of a normalization, made of its input's codes whenever somebody asks for it.

    norm: the engine's. normed: int8 of this shape, the normalized codes, taken from the pool. rectified: max(0, .) of
    the result. signs_suffice: a maximum pooling alone reads the result, and the normalization is L1: the backward pass
    needs the codes of maxima; elsewhere the gradient that arrives is 0, and what the normalization makes of it depends
    on the code's sign.
    """

    def __init__(
        self,
        norm: Any,
        normed: NDArray[np.int8],
        rectified: bool,
        shape: Shape,
        pool: Pool,
        *,
        signs_suffice: bool = False,
    ) -> None:
        super().__init__(shape, pool)
        self.norm, self.normed, self.rectified = norm, normed, rectified
        self.signs_suffice = signs_suffice
        self._rested: tuple[NDArray[np.int8], NDArray[np.uint8]] | None = None  # maxima, signs

    def rest(self, places: NDArray[np.uint8], window: Any) -> None:
        """Keep the codes where a maximum pooling found maxima, and of all codes the signs, four a byte."""
        samples, height, width, channels = self.shape

        def room() -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
            signs = (samples, (height * width * channels + 3) // 4)
            return self.pool.take(places.shape, np.int8), self.pool.take(signs, np.uint8)

        found = room()
        _engine.keep_maxima(self.normed, places, window, *found, FASTEST, torch.get_num_threads())
        self.pool.give(self.normed)
        self._rested = room()  # in the place of the codes: behind them they would cut the memory in two
        for kept, part in zip(self._rested, found, strict=True):
            np.copyto(kept, part)
            self.pool.give(part)

    def wake(self, places: NDArray[np.uint8], window: Any) -> None:
        """Codes again, if they are at rest: at the places what they were, elsewhere their signs."""
        if self._rested is not None:
            self.normed = self.pool.take(self.shape, np.int8)
            _engine.put_maxima(*self._rested, places, window, self.normed, FASTEST, torch.get_num_threads())
            self._give_rested()

    def _give_rested(self) -> bool:
        rested, self._rested = self._rested, None
        for part in rested or ():
            self.pool.give(part)
        return rested is not None

    def never_negative(self) -> bool:
        return self.rectified or bool(self.real().min() >= 0)

    def input(self, form: Format) -> Any:
        return _engine.ConvInput(
            self.norm,
            self.normed,
            self.rectified,
            form.bits,
            form.groups,
            form.signed,
            form.absorbed,
            form.clip_ratio,
        )

    def normed_rows(self) -> NDArray[np.int8]:
        """The normalized codes as (rows, channels)."""
        return self.normed.reshape(self.rows)

    def _make_real(self) -> NDArray[np.float32]:
        out = self.pool.take(self.rows, np.float32)
        self.norm.to_f32(self.normed_rows(), self.rectified, None, out, None)
        return out

    def release(self) -> None:
        super().release()
        if not self._give_rested():
            self.pool.give(self.normed)


class Plain(Flow):
    """A tensor of any shape that only torch's own operations read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.arrived: Tensor | None = None  # the gradient
        self.wanted = tensor.requires_grad

    def as_leaf(self) -> Tensor:
        return self.tensor.detach().requires_grad_(self.wanted)

    def deliver(self, gradient: Tensor) -> None:
        self.arrived = gradient if self.arrived is None else self.arrived + gradient

    def take_gradient(self, step: Any, like: Tensor) -> Tensor | None:
        return self.arrived

    def forget(self) -> None:
        """Nothing: torch keeps what it needs."""

    def release(self) -> None:
        """Nothing."""


def from_torch(result: Tensor, pool: Pool) -> Real | Plain:
    """A result of torch's: floats where codes can be made of them."""
    if result.dim() != 4 or result.dtype != torch.float32 or result.numel() == 0:
        return Plain(result)
    n, c, h, w = result.shape
    rows = result.detach().permute(0, 2, 3, 1).contiguous().view(n * h * w, c)
    value = Real(rows.numpy(), (n, h, w, c), pool, escaped=True)
    value.wanted = result.requires_grad
    return value
