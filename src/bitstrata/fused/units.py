"""The units of a fused step: each runs forward, and returns what it does in the backward pass."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitstrata_runtime import _engine

from ..integer.convolution import Geometry
from ..integer.engine_codes import FASTEST, array, noise_of
from ..integer.engine_norm import NormRule
from ..nn.integer_layers import IntegerConv2d
from ..nn.l1_norm import QuantizedL1BatchNorm
from .pool import Pool
from .values import Flow, Format, Normed, NotFiniteError, Real, Value, from_torch

Env = dict[str, Any]  # node name -> Value, or whatever else the node is
Backward = Callable[["Step"], None]
Sources = list[tuple[nn.Parameter, Tensor]]  # what gets a gradient, and what it is taken of


@dataclass
class Step:
    """One pass.

    env: values by node. tape: what the units do in the backward pass, in forward order. gradients: of parameters, by
    identity. statistics: normalizations with what the engine found of their batches. wrap: makes values of torch's
    results. real: dtype of floats; bfloat16 where torch's own operations run under autocast.
    """

    pool: Pool
    env: Env = field(default_factory=dict)
    tape: list[Backward] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    statistics: list[tuple[Any, Any]] = field(default_factory=list)
    wrap: Callable[[Tensor, Pool], Flow] = from_torch
    real: torch.dtype = torch.float32

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

    @abstractmethod
    def run(self, step: Step) -> None:
        """Compute the result into step.env, and put the backward pass on the tape."""


@dataclass
class ConvNorm(Unit):
    """Convolution, quantized normalization, and a rectifier or none; what lies between stays integers."""

    reads: tuple[str, ...]
    result: str
    conv: IntegerConv2d
    norm: QuantizedL1BatchNorm
    name: str  # of the normalization
    rectified: bool

    def __post_init__(self) -> None:
        self._made: tuple[Any, Any, Any, Any] = (None, None, None, None)

    def _unit(self) -> tuple[Any, NormRule, Geometry]:
        """The engine's operation for the layer's present rule, the normalization's rule, the geometry."""
        layer, norm = self.conv, self.norm
        key = (layer.rule, layer.stride, layer.padding, layer.dilation, norm.rounding, norm.bits, norm.l2, norm.eps)
        if self._made[0] == (*key, norm.l1_scale):
            return self._made[1:]
        rule = norm.engine_rule()
        if rule is None:
            raise ValueError(
                f"{type(self.norm).__name__} {self.name!r}: its rounding was exchanged; fuse the model again"
            )
        geometry = Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
        planar = geometry.planar(2)
        unit = _engine.ConvNorm(
            planar["stride"],
            planar["dilation"],
            planar["padding"],
            layer.groups,
            layer.rule.w,
            layer.rule.method == "tensor",
            rule.bits,
            rule.l2,
            rule.eps,
            rule.factor,
        )
        self._made = ((*key, norm.l1_scale), unit, rule, geometry)
        return self._made[1:]

    def run(self, step: Step) -> None:
        x: Value = step.env[self.reads[0]]
        unit, _, geometry = self._unit()
        layer, norm, pool = self.conv, self.norm, step.pool
        try:
            signed = not (layer.rule.unsigned_nonneg and x.never_negative())
            form = Format(layer.rule.a, layer.rule.shift_groups, signed, layer.rule.clip_ratio)
            codes = x.codes(form)
        except NotFiniteError as error:
            raise NotFiniteError(f"{layer.state.name}: {error}") from error
        weight = layer.weight.contiguous()
        height, width = geometry.output(x.shape[1:3], (weight.shape[2], weight.shape[3]))
        shape = (x.shape[0], height, width, weight.shape[0])
        acc = pool.take(shape, np.int32)
        inputs = pool.take((shape[0] * height * width, shape[3]), np.int8)
        made, lost = unit.forward(
            codes.data,
            codes.range,
            codes.unit,
            codes.shift,
            array(weight),
            array(norm.weight),
            array(norm.bias),
            acc,
            inputs,
            FASTEST,
            torch.get_num_threads(),
        )
        pool.give(acc)
        if made is None:
            raise NotFiniteError(f"{layer.state.name}: its {'weight' if lost == 'weight' else 'result'} is not finite")
        step.statistics.append((norm, made))
        value = Normed(made, inputs, self.rectified, shape, pool)
        step.env[self.result] = value
        step.tape.append(lambda s: self._backward(s, x, form, value))

    def _backward(self, step: Step, x: Value, inputs: Format, value: Normed) -> None:
        if not value.gradient:
            value.release()
            return
        unit, rule, _ = self._unit()
        layer, norm, pool = self.conv, self.norm, step.pool
        single = value.gradient.single()
        real, scale = single if single is not None else (value.gradient.total(pool)[0], None)
        known = None if self.rectified or single is None else value.gradient.range
        form = Format(layer.rule.g, layer.rule.shift_groups)
        codes = x.codes(inputs)
        scratch, products = pool.take(value.rows, np.int8), pool.take(value.shape, np.uint8)
        sums = self._sums(x, value, pool) if x.wanted else None
        factor = np.empty(x.shape[3], np.float32) if x.wanted else None
        of_weight = torch.empty(layer.weight.shape) if layer.weight.requires_grad else None
        lost = unit.backward(
            value.norm,
            value.inputs,
            real,
            scale,
            known,
            self.rectified,
            rule.noise(),
            form.bits,
            form.groups,
            form.absorbed,
            noise_of(layer.rule.grad_rounding, layer.state.noise),
            codes.data,
            codes.range,
            codes.shift,
            codes.channel_scales(),
            array(layer.weight.contiguous()),
            scratch,
            products,
            sums,
            factor,
            array(of_weight),
            FASTEST,
            torch.get_num_threads(),
        )
        if single is None:
            pool.give(real)
        pool.give(scratch)
        pool.give(products)
        value.release()
        if lost:
            owner = f"{type(norm).__name__} {self.name!r}" if lost == "norm" else layer.state.name
            what = "weight" if lost == "weight" else "gradient"
            raise NotFiniteError(f"{owner}: its {what} contains NaN or infinity")
        for parameter, gradient in ((norm.weight, value.norm.weight_gradient), (norm.bias, value.norm.bias_gradient)):
            if parameter is not None and parameter.requires_grad:
                step.add(parameter, torch.from_numpy(gradient))
        if sums is not None and factor is not None:
            x.gradient.products.append((sums.reshape(x.rows), factor))
        if of_weight is not None:
            step.add(layer.weight, of_weight)

    @staticmethod
    def _sums(x: Value, value: Normed, pool: Pool) -> NDArray[np.int32]:
        """Memory for the input's gradient: that of the result's, which is read before the other is written, if it is
        a product's sums alone and as large.
        """
        products = value.gradient.products
        if products and value.gradient.single() is not None:
            own = products[0][0]
            if own.size == math.prod(x.shape) and pool.sole(own):
                products.clear()
                return own.reshape(x.shape)
        return pool.take(x.shape, np.int32)


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
        out = pool.take(normed.rows, np.float32)
        bits = pool.take(((count + 7) // 8,), np.uint8) if self.rectified else None
        ranges = normed.norm.to_f32(normed.inputs, self.rectified, other.real(), out, bits)
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
        out, places = pool.take(shape, np.float32), pool.take(shape, np.uint8)
        ranges = normed.norm.max_pool(normed.inputs, normed.rectified, window, out, places)
        rows = out.reshape(n * height * width, c)
        value = Real(rows, shape, pool, escaped=False, rectified=normed.rectified, ranges=ranges)
        step.env[self.result] = value
        step.tape.append(lambda s: self._backward(s, normed, value, places, window))

    @staticmethod
    def _backward(step: Step, normed: Normed, value: Real, places: NDArray[np.uint8], window: Any) -> None:
        if value.gradient:
            total, _ = value.gradient.total(step.pool)
            rows = step.pool.take(normed.rows, np.float32)
            _engine.max_pool_gradient(
                total.reshape(value.shape),
                places,
                window,
                rows.reshape(normed.shape),
                FASTEST,
                torch.get_num_threads(),
            )
            step.pool.give(total)
            normed.gradient.append(rows)
        step.pool.give(places)
        value.release()
