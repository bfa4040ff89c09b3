"""The units of a fused step: each runs forward, and returns what it does in the backward pass."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitstrata_runtime import _engine

from ..integer.convolution import Geometry
from ..integer.engine_codes import FASTEST, array, noise_of
from ..integer.engine_norm import NormRule
from ..integer.pool import Pool
from ..nn.integer_layers import IntegerConv2d
from ..nn.l1_norm import QuantizedL1BatchNorm
from .gradients import Pooled, Strided
from .values import Flow, Format, Normed, NotFiniteError, Real, Shape, Value, from_torch

Env = dict[str, Any]  # node name -> Value, or whatever else the node is
Backward = Callable[["Step"], None]
LARGE = 1 << 20  # bytes of a weight: its gradient takes memory of a pool when it is computed, not before
Sources = list[tuple[nn.Parameter, Tensor]]  # what gets a gradient, and what it is taken of


@dataclass
class Step:
    """One pass.

    pool: memory of what ends with the step. lasting: of what outlives it, apart from the former, which would have to
    fit in between. env: values by node. tape: what the units do in the backward pass, in forward order. ready: what
    units have prepared, by identity. gradients: of parameters, by identity. statistics: normalizations with what the
    engine found of their batches. wrap: makes values of torch's results. real: dtype of floats; bfloat16 where torch's
    own operations run under autocast. threads: of the engine.
    """

    pool: Pool
    lasting: Pool
    env: Env = field(default_factory=dict)
    tape: list[Backward] = field(default_factory=list)
    ready: dict[int, Any] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    statistics: list[tuple[Any, Any]] = field(default_factory=list)
    wrap: Callable[[Tensor, Pool], Flow] = from_torch
    real: torch.dtype = torch.float32
    threads: int = field(default_factory=torch.get_num_threads)

    def autocast(self) -> torch.autocast:
        """For torch's own operations between units. No casts are kept: these would outlive the step's graph."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.real != torch.float32, cache_enabled=False)

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add to a parameter's gradient."""
        seen = self.gradients.get(id(parameter))
        self.gradients[id(parameter)] = gradient if seen is None else seen + gradient

    def add_all(self, sources: Sources, gradients: Sequence[Tensor | None]) -> None:
        """Add to the parameters' gradients what was found for their sources."""
        for (parameter, _), gradient in zip(sources, gradients, strict=True):
            if gradient is not None:
                self.add(parameter, gradient)


class Unit(ABC):
    """One or several nodes of the graph. reads: names of nodes. result: the name of the last node."""

    reads: tuple[str, ...]
    result: str

    def prepare(self, step: Step, *, backward: bool) -> None:  # noqa: B027  # most have nothing to prepare
        """What does not depend on values, for all units before any of them runs: between two operations of the engine,
        which leave nothing of Python in the caches, the same takes several times as long.
        """

    @abstractmethod
    def run(self, step: Step) -> None:
        """Compute the result into step.env, and put the backward pass on the tape."""


class _Operation:
    """The engine's operation for the rule that a layer and a normalization have now."""

    def __init__(self, layer: IntegerConv2d, norm: QuantizedL1BatchNorm, name: str) -> None:
        found = norm.engine_rule()
        if found is None:
            raise ValueError(f"{type(norm).__name__} {name!r}: its rounding was exchanged; fuse the model again")
        self.norm: NormRule = found
        self._geometry = Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
        planar = self._geometry.planar(2)
        self.stride, self._padding = planar["stride"], planar["padding"]
        gradient = Format.of_gradient(layer.rule)
        self.engine = _engine.ConvNorm(
            planar["stride"],
            planar["dilation"],
            planar["padding"],
            layer.groups,
            layer.rule.w,
            layer.rule.method == "tensor",
            found.bits,
            found.l2,
            found.eps,
            found.factor,
            gradient.bits,
            gradient.groups,
            gradient.absorbed,
            gradient.powers,
        )
        self._sizes: dict[tuple[Any, ...], tuple[Shape, int, int]] = {}

    def sizes(self, x: Value, source: Any, weight: NDArray[np.float32]) -> tuple[Shape, int, int]:
        """Shape of the result; bytes of scratch memory, forward and backward."""
        key = (*x.shape, *weight.shape, type(x))
        if key not in self._sizes:
            height, width = self._geometry.output(x.shape[1:3], weight.shape[2:])
            shape = (x.shape[0], height, width, weight.shape[0])
            self._sizes[key] = (shape, *self.engine.scratch(source, weight, shape))
        return self._sizes[key]

    def skips_pixels(self, weight: NDArray[np.float32]) -> bool:
        """Whether it reads every stride-th pixel of a map and no other."""
        return weight.shape[2:] == (1, 1) and self.stride != (1, 1) and self._padding == (0, 0)


class _Ready(NamedTuple):
    """What a unit prepares: its operation, parameters, and memory for their gradients except that of a large weight."""

    operation: _Operation
    parameters: tuple[NDArray[np.float32] | None, ...]  # weight, gamma, beta
    gradients: list[Tensor | None]
    arrays: list[NDArray[np.float32] | None]  # the gradients' memory


@dataclass
class ConvNorm(Unit):
    """Convolution, quantized normalization, and a rectifier or none; what lies between stays integers."""

    reads: tuple[str, ...]
    result: str
    conv: IntegerConv2d
    norm: QuantizedL1BatchNorm
    name: str  # of the normalization
    rectified: bool
    pooled: bool  # a fused maximum pooling alone reads the result

    def __post_init__(self) -> None:
        self._made: tuple[Any, _Operation | None] = (None, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": (None, None)}  # a copy makes the engine's operation anew

    def _operation(self) -> _Operation:
        layer, norm = self.conv, self.norm
        rule = (layer.rule, layer.stride, layer.padding, layer.dilation)
        key = (*rule, norm.rounding, norm.bits, norm.l2, norm.eps, norm.l1_scale)
        at, made = self._made
        if made is None or at != key:
            made = _Operation(layer, norm, self.name)
            self._made = key, made
        return made

    def prepare(self, step: Step, *, backward: bool) -> None:
        trained = (self.conv.weight, self.norm.weight, self.norm.bias)
        gradients = [
            torch.empty(p.shape) if backward and p is not None and p.requires_grad and p.nbytes < LARGE else None
            for p in trained
        ]
        parameters = tuple(None if p is None else array(p.contiguous()) for p in trained)
        step.ready[id(self)] = _Ready(self._operation(), parameters, gradients, [array(g) for g in gradients])

    def run(self, step: Step) -> None:
        x: Value = step.env[self.reads[0]]
        operation, parameters, _, _ = step.ready[id(self)]
        layer, pool = self.conv, step.pool
        try:
            signed = not (layer.rule.unsigned_nonneg and x.never_negative())
            source = x.input(Format(layer.rule.a, layer.rule.shift_groups, signed, layer.rule.clip_ratio))
        except NotFiniteError as error:
            raise NotFiniteError(f"{layer.state.name}: {error}") from error
        shape, needed, _ = operation.sizes(x, source, parameters[0])
        normed = pool.take(shape, np.int8)  # before what goes at once, so that it does not lie behind that
        scratch = pool.take((needed,), np.uint8)
        made, lost = operation.engine.forward(source, *parameters, scratch, normed, FASTEST, step.threads)
        pool.give(scratch)
        if made is None:
            raise NotFiniteError(f"{layer.state.name}: its {'weight' if lost == 'weight' else 'result'} is not finite")
        step.statistics.append((self.norm, made))
        signs_suffice = self.pooled and not self.norm.l2
        value = Normed(made, normed, self.rectified, shape, pool, signs_suffice=signs_suffice)
        step.env[self.result] = value
        step.tape.append(lambda s: self._backward(s, x, source, value))

    def _backward(self, step: Step, x: Value, source: Any, value: Normed) -> None:
        if not value.gradient:
            value.release()
            return
        operation, parameters, gradients, arrays = step.ready[id(self)]
        layer, norm, pool = self.conv, self.norm, step.pool
        single, pooled, total, known = value.gradient.single(), None, None, None
        if isinstance(single, Pooled):
            value.wake(single.places, single.window)
            real, scale, pooled = single.rows, None, (single.places, single.window)
        elif single is not None:
            real, scale = single
            if scale is not None:
                known = value.gradient.passed
            elif not self.rectified:
                known = value.gradient.range
        else:
            total, _ = value.gradient.total(pool)
            real, scale = total, None
        scratch = pool.take((operation.sizes(x, source, parameters[0])[2],), np.uint8)
        strided = isinstance(x, Real) and operation.skips_pixels(parameters[0])
        shape = (*value.shape[:3], x.shape[3]) if strided else x.shape
        sums = self._sums(shape, value, pool) if x.wanted else None
        factor = np.empty(x.shape[3], np.float32) if x.wanted else None
        if layer.weight.requires_grad and arrays[0] is None:
            arrays[0] = step.lasting.take(layer.weight.shape, np.float32)
            gradients[0] = torch.from_numpy(arrays[0])
        lost, passed = operation.engine.backward(
            value.norm,
            value.normed,
            real,
            pooled,
            scale,
            known,
            self.rectified,
            operation.norm.noise(),
            noise_of(layer.rule.grad_rounding, layer.state.noise),
            source,
            parameters[0],
            scratch,
            sums,
            factor,
            *arrays,
            FASTEST,
            step.threads,
        )
        if total is not None:
            pool.give(total)
        pool.give(scratch)
        value.release()
        if lost:
            owner = f"{type(norm).__name__} {self.name!r}" if lost == "norm" else layer.state.name
            what = "weight" if lost == "weight" else "gradient"
            raise NotFiniteError(f"{owner}: its {what} contains NaN or infinity")
        for parameter, gradient in zip((layer.weight, norm.weight, norm.bias), gradients, strict=True):
            if gradient is not None:
                step.add(parameter, gradient)
        if sums is not None and factor is not None:
            if strided:
                x.gradient.products.append(Strided(sums, factor, x.shape[1:3], operation.stride))
            else:
                x.gradient.products.append((sums.reshape(x.rows), factor))
            x.gradient.passed = passed

    @staticmethod
    def _sums(shape: Shape, value: Normed, pool: Pool) -> NDArray[np.int32]:
        """Memory for the input's gradient, of this shape: that of the result's, which is read before the other is
        written, if it is a product's sums alone and as large.
        """
        products, single = value.gradient.products, value.gradient.single()
        if products and isinstance(single, tuple):
            own = single[0]
            if own.size == math.prod(shape) and pool.sole(own):
                products.clear()
                return own.reshape(shape)
        return pool.take(shape, np.int32)


@dataclass
class Join(Unit):
    """normalization + other, and a rectifier or none. reads: the normalization's node, then the other."""

    reads: tuple[str, ...]
    result: str
    rectified: bool

    def run(self, step: Step) -> None:
        normed: Normed = step.env[self.reads[0]]
        other: Value = step.env[self.reads[1]]
        if normed.shape != other.shape:
            raise ValueError(f"fused sum {self.result!r}: shapes {normed.shape} and {other.shape} differ")
        pool, count = step.pool, normed.rows[0] * normed.rows[1]
        bits = pool.take(((count + 7) // 8,), np.uint8) if self.rectified else None
        out = pool.take(normed.rows, np.float32)
        ranges = normed.norm.to_f32(normed.normed_rows(), self.rectified, other.real(), out, bits)
        value = Real(out, normed.shape, pool, escaped=False, rectified=self.rectified, ranges=ranges)
        step.env[self.result] = value
        step.tape.append(lambda s: self._backward(s, normed, other, value, bits))

    @staticmethod
    def _backward(step: Step, normed: Normed, other: Value, value: Real, bits: NDArray[np.uint8] | None) -> None:
        if value.gradient:
            total, largest = value.gradient.total(step.pool, bits)
            receivers = [v for v in (normed, other) if v.wanted]
            step.pool.share(total, len(receivers))
            for receiver in receivers:
                receiver.gradient.append(total, largest)
        if bits is not None:
            step.pool.give(bits)
        value.release()


class _Places(NamedTuple):
    """Where maxima were, at rest: a stream of so many bits each. window: of the pooling, as the engine takes it."""

    packed: NDArray[np.uint8]
    bits: int
    window: Any


@dataclass
class MaxPool(Unit):
    """Maximum pooling of a normalization's result, from its codes."""

    reads: tuple[str, ...]
    result: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def run(self, step: Step) -> None:
        normed: Normed = step.env[self.reads[0]]
        n, h, w, c = normed.shape
        height, width = (
            (size + 2 * pad - kernel) // stride + 1
            for size, kernel, stride, pad in zip((h, w), self.kernel, self.stride, self.padding, strict=True)
        )
        if min(height, width) < 1:
            raise ValueError(
                f"fused pooling {self.result!r}: windows {self.kernel} do not fit into maps of {h}x{w} with padding "
                f"{self.padding}"
            )
        shape, pool = (n, height, width, c), step.pool
        window = ((h, w), self.kernel, self.stride, self.padding)
        bits = 4 if math.prod(self.kernel) <= 16 else 8  # of a place
        packed = pool.take(((math.prod(shape) * bits + 7) // 8,), np.uint8)
        out, places = pool.take(shape, np.float32), pool.take(shape, np.uint8)
        ranges = normed.norm.max_pool(normed.normed_rows(), normed.rectified, window, out, places)
        rows = out.reshape(n * height * width, c)
        value = Real(rows, shape, pool, escaped=False, rectified=normed.rectified, ranges=ranges)
        step.env[self.result] = value
        _engine.pack_codes(places.reshape(-1), bits, packed, FASTEST, step.threads)
        if normed.signs_suffice:
            normed.rest(places, window)
        pool.give(places)
        step.tape.append(lambda s: self._backward(s, normed, value, _Places(packed, bits, window)))

    @staticmethod
    def _backward(step: Step, normed: Normed, value: Real, at_rest: _Places) -> None:
        packed, bits, window = at_rest
        if value.gradient:
            total, _ = value.gradient.total(step.pool)
            places = step.pool.take(value.shape, np.uint8)
            _engine.unpack_codes(packed, bits, False, places.reshape(-1), FASTEST, step.threads)
            normed.gradient.append(Pooled(total, places, window))
        step.pool.give(packed)
        value.release()
