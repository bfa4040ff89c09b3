"""What flows between the units of a fused quantization-aware step.

A tensor is rows of channels, (samples * height * width, channels), contiguous: integer sums of a convolution with what
they stand for, or floats. bfloat16 lies in arrays of uint16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitstrata_runtime import _engine

from ..integer.engine_codes import FASTEST
from ..integer.pool import Pool
from .qat_codes import TINY, Rule
from .units import Step
from .values import Flow, Plain, Shape

Lines = tuple[NDArray[np.float32], NDArray[np.float32]]
MEMORY = {torch.float32: np.float32, torch.bfloat16: np.uint16}


def to_rows(x: Tensor) -> NDArray[Any]:
    """(N, C, H, W) in float32 or bfloat16 as rows of channels; the same memory if channels are last in it."""
    n, c, h, w = x.shape
    rows = x.detach().permute(0, 2, 3, 1).contiguous().view(n * h * w, c)
    return rows.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else rows.numpy()


def as_real(array: NDArray[Any]) -> Tensor:
    """float32, or bfloat16 in uint16, as a tensor: the same memory."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_map(rows: NDArray[Any], shape: Shape) -> Tensor:
    """Rows of channels as (N, C, H, W), channels last in memory: the same memory."""
    return as_real(rows).view(shape).permute(0, 3, 1, 2)


@dataclass
class Arrived:
    """A gradient: of the value, or, with a rule, of its quantized values.

    pooled: the pool lent the memory. own: it may be written, unless the pool knows of other holders.
    """

    rows: NDArray[Any]
    rule: Rule | None
    pooled: bool
    own: bool


@dataclass(frozen=True)
class Single:
    """All that has arrived as one: g of quantized values by `rule` (or of the value), plus `add` of the value."""

    g: NDArray[Any]
    rule: Rule | None
    add: NDArray[Any] | None

    @property
    def numbers(self) -> Any:
        return None if self.rule is None else self.rule.numbers

    @property
    def step(self) -> float:
        return 1.0 if self.rule is None else self.rule.step


class Activation(Flow):
    """A tensor (samples, height, width, channels) that stands for max(data * scale + offset, 0 if rectified).

    Args:
        data: int16 or int32 sums, float32, or bfloat16; rows of channels.
        scale, offset: float64 (channels,); None for 1 and 0.
        real: dtype of floats and gradients that are made of it.
        pooled: the pool lent `data`, and gets it back.
        remake: makes `data` anew, in memory of the pool; then it is dropped between forward and backward pass.
        depth: convolutions that `remake` repeats, one after the other.

    Attributes:
        arrived: gradients of the backward pass. wanted: whether anybody asks for them.
        foreign: torch made the data, which may be not finite.
    """

    def __init__(
        self,
        data: NDArray[Any],
        shape: Shape,
        pool: Pool,
        real: torch.dtype,
        *,
        scale: NDArray[np.float64] | None = None,
        offset: NDArray[np.float64] | None = None,
        rectified: bool = False,
        pooled: bool = True,
        remake: Callable[[], NDArray[Any]] | None = None,
        depth: int = 0,
    ) -> None:
        self.shape, self.pool, self.dtype, self.depth = shape, pool, real, depth
        self.scale = np.ones(shape[3]) if scale is None else scale
        self.offset = np.zeros(shape[3]) if offset is None else offset
        self.rectified, self.wanted, self.foreign = rectified, True, not pooled
        self.arrived: list[Arrived] = []
        self._identity = scale is None
        self._data: NDArray[Any] | None = data
        self._pooled, self._remake = pooled, remake
        self._real: NDArray[Any] | None = None
        self._real_pooled = True
        self._codes: dict[tuple[float, int, int], NDArray[Any]] = {}

    @property
    def rows(self) -> tuple[int, int]:
        """Shape as rows of channels."""
        n, h, w, c = self.shape
        return n * h * w, c

    @property
    def data(self) -> NDArray[Any]:
        """Its elements."""
        if self._data is None:
            assert self._remake is not None
            self._data = self._remake()
        return self._data

    def line(self, step: float = 1.0) -> Lines:
        """What elements stand for in units of `step`: scale and offset, float32 (channels,) each."""
        return (self.scale / step).astype(np.float32), (self.offset / step).astype(np.float32)

    def codes(self, rule: Rule) -> NDArray[Any]:
        """uint8 or int8 (samples, height, width, channels), made once a rule until `forget`."""
        key = (rule.step, rule.lo, rule.hi)
        if key not in self._codes:
            out = self.pool.take(self.shape, np.uint8)
            _engine.qat_codes(
                self.data,
                *self.line(rule.step),
                self.rectified,
                (rule.lo, rule.hi),
                out.reshape(self.rows),
                FASTEST,
                torch.get_num_threads(),
            )
            self._codes[key] = out.view(rule.dtype)
        return self._codes[key]

    def code_values(self, rule: Rule) -> NDArray[Any]:
        """The codes as floats, which hold them exactly; memory of the pool."""
        out = self.pool.take(self.rows, MEMORY[self.dtype])
        _engine.qat_code_values(
            self.data,
            *self.line(rule.step),
            self.rectified,
            (rule.lo, rule.hi),
            out,
            FASTEST,
            torch.get_num_threads(),
        )
        return out

    def values(self, add: NDArray[Any] | None = None, *, rectified: bool | None = None) -> NDArray[Any]:
        """Its values (+ add, which are floats of its dtype): floats in memory of the pool."""
        out = self.pool.take(self.rows, MEMORY[self.dtype])
        _engine.qat_values(
            self.data,
            *self.line(),
            self.rectified if rectified is None else rectified,
            add,
            out,
            FASTEST,
            torch.get_num_threads(),
        )
        return out

    def real(self) -> NDArray[Any]:
        """Its values in its dtype."""
        if self._real is None:
            if self._identity and self.data.dtype == MEMORY[self.dtype]:
                return self.data
            self._real = self.values()
        return self._real

    def as_leaf(self) -> Tensor:
        """Its values for torch, which may keep them: (N, C, H, W)."""
        rows = self.real()
        if rows is self._data:
            self._pooled = False
        else:
            self._real_pooled = False
        return to_map(rows, self.shape).requires_grad_(self.wanted)

    def forget(self) -> None:
        """All that reads it in the forward pass has run."""
        if self._real is not None and self._real_pooled:
            self.pool.give(self._real)
        self._real = None
        self.drop_codes()
        if self._remake is not None:
            self._drop_data()

    def release(self) -> None:
        """All that reads it has run, backward pass included."""
        self.drop_codes()
        self._drop_data()
        for one in self.arrived:
            self._give(one)
        self.arrived.clear()

    def drop_codes(self) -> None:
        """The codes go; they are made again where somebody asks."""
        for codes in self._codes.values():
            self.pool.give(codes)
        self._codes.clear()

    def _drop_data(self) -> None:
        if self._data is not None and self._pooled:
            self.pool.give(self._data)
        self._data = None

    def _give(self, one: Arrived) -> None:
        if one.pooled:
            self.pool.give(one.rows)

    def deliver(self, gradient: Tensor) -> None:
        """A gradient of its values arrives from torch."""
        self.arrived.append(Arrived(to_rows(gradient.to(self.dtype)), None, pooled=False, own=False))

    def keep(self) -> float:
        """Gradients count where the value, before the rectifier, is at least this."""
        return TINY if self.rectified else -math.inf

    def single(self, step: Step) -> Single:
        """What has arrived, as one; gradients of further quantizers' steps go to `step`."""
        plain = [a for a in self.arrived if a.rule is None]
        quantized = [a for a in self.arrived if a.rule is not None]
        add: Arrived | None = None
        for one in plain:
            add = one if add is None else self._added(add, one)
        while len(quantized) > 1:
            one = quantized.pop()
            out, _ = self._passed(step, Single(one.rows, one.rule, None if add is None else add.rows), keep=-math.inf)
            self._give(one)
            if add is not None:
                self._give(add)
            add = Arrived(out, None, pooled=True, own=True)
        self.arrived = [a for a in (*quantized, add) if a is not None]
        if not quantized:
            assert add is not None
            return Single(add.rows, None, None)
        return Single(quantized[0].rows, quantized[0].rule, None if add is None else add.rows)

    def own_gradient(self) -> Arrived | None:
        """Takes one of what has arrived whose memory may be written in its place, if there is one."""
        for i, one in enumerate(self.arrived):
            if one.own and (not one.pooled or self.pool.sole(one.rows)):
                return self.arrived.pop(i)
        return None

    def _added(self, a: Arrived, b: Arrived) -> Arrived:
        out = self.pool.take(self.rows, MEMORY[self.dtype])
        torch.add(to_map(a.rows, self.shape), to_map(b.rows, self.shape), out=to_map(out, self.shape))
        self._give(a)
        self._give(b)
        return Arrived(out, None, pooled=True, own=True)

    def _passed(
        self, step: Step, one: Single, keep: float, place: NDArray[Any] | None = None
    ) -> tuple[NDArray[Any], float]:
        out = self.pool.take(self.rows, MEMORY[self.dtype]) if place is None else place
        total = _engine.qat_pass(
            self.data,
            *self.line(one.step),
            self.rectified,
            one.numbers,
            keep,
            one.g,
            one.add,
            out,
            FASTEST,
            torch.get_num_threads(),
        )
        add_step_gradient(step, one.rule, total)
        return out, total

    def step_gradient(self, step: Step, g: NDArray[Any], rule: Rule) -> None:
        """What a quantizer's step gets of a gradient of the quantized values, for which nobody else asks."""
        out, _ = self._passed(step, Single(g, rule, None), keep=-math.inf)
        self.pool.give(out)

    def total(self, step: Step) -> Arrived:
        """The gradient of what the value was before its rectifier: in memory of the pool, or the only one arrived."""
        one = self.single(step)
        if one.rule is None and not self.rectified:
            (only,) = self.arrived
            self.arrived.clear()
            return only
        place = self.own_gradient()
        out, _ = self._passed(step, one, self.keep(), None if place is None else place.rows)
        if place is not None:
            return Arrived(out, None, pooled=place.pooled, own=True)
        return Arrived(out, None, pooled=True, own=True)

    def take_gradient(self, step: Step, like: Tensor) -> Tensor | None:
        """What has arrived, for torch, in the dtype of `like`."""
        if not self.arrived:
            return None
        total = self.total(step)
        own = to_map(total.rows.copy() if total.pooled else total.rows, self.shape)  # torch may keep it
        self._give(total)
        return own.to(like.dtype)


def add_step_gradient(step: Step, rule: Rule | None, total: float) -> None:
    """What a quantizer's step gets."""
    if rule is not None and rule.parameter is not None:
        step.add(rule.parameter, rule.gradient(total))


def from_torch(result: Tensor, pool: Pool, real: torch.dtype) -> Activation | Plain:
    """A result of torch's."""
    if result.dim() != 4 or result.dtype not in MEMORY or result.numel() == 0 or result.device.type != "cpu":
        return Plain(result)
    n, c, h, w = result.shape
    value = Activation(to_rows(result), (n, h, w, c), pool, real, pooled=False)
    value.wanted = result.requires_grad
    return value
