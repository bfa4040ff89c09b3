"""The units of a fused step: each runs forward, and returns what it does in the backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitstrata_runtime import _engine

from ..integer.convolution import Geometry
from ..integer.engine_codes import array, best_isa, noise_of
from ..integer.engine_norm import NormRule
from ..integer.linear import WeightCodes
from ..nn.integer_layers import IntegerConv2d
from ..nn.l1_norm import QuantizedL1BatchNorm
from .pool import Pool
from .values import Codes, Format, Normed, NotFinite, Plain, Real, Shape, Value

Env = dict[str, Any]  # node name -> Value, or whatever else the node is
Backward = Callable[["Step"], None]


@dataclass
class Step:
    """One pass. gradients: of parameters, by identity; tape: what the units do in the backward pass, in forward order."""

    pool: Pool
    env: Env = field(default_factory=dict)
    tape: list[Backward] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add to a parameter's gradient."""
        seen = self.gradients.get(id(parameter))
        self.gradients[id(parameter)] = gradient if seen is None else seen + gradient


class Unit(ABC):
    """One or several nodes of the graph. reads: names of nodes. result: the name of the last node."""

    reads: tuple[str, ...]
    result: str

    @abstractmethod
    def run(self, step: Step) -> None:
        """Compute the result into step.env, and put the backward pass on the tape."""


def product_geometry(geometry: Geometry) -> tuple[Any, ...]:
    """Stride, dilation, padding (top, bottom, left, right) and groups, as the engine takes them."""
    planar = geometry.planar(2)
    (top, left) = planar["padding"]
    return planar["stride"], planar["dilation"], (top, top, left, left), geometry.groups


class Convolution:
    """The three products of one layer, between values."""

    def __init__(self, layer: IntegerConv2d) -> None:
        self.layer = layer
        rule = layer.rule
        self.inputs, self.gradients = Format(rule.a, rule.shift_groups), Format(rule.g, rule.shift_groups)
        self.geometry = Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)

    def _weight(self, side: str) -> WeightCodes:
        try:
            return self.layer.rule.quantize_weight(self.layer.weight, side, self.layer.groups)
        except ValueError as error:
            raise ValueError(f"{self.layer.state.name}: weight {tuple(self.layer.weight.shape)}: {error}") from error

    def _tail(self) -> tuple[Any, ...]:
        return *product_geometry(self.geometry), best_isa(), torch.get_num_threads()

    def forward(self, x: Value, pool: Pool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Accumulators int32 (samples, height, width, channels), their channels' scales, least and largest."""
        codes, w = x.codes(self.inputs), self._weight("out")
        size = self.geometry.output(x.shape[1:3], tuple(w.codes.shape[2:]))
        channels = w.codes.shape[0]
        acc = pool.take((x.shape[0], size[0], size[1], channels), torch.int32)
        low, high = torch.empty(2, channels, dtype=torch.int32).unbind()
        _engine.conv_forward(
            array(codes.data),
            codes.range,
            array(w.codes),
            *self._tail(),
            shift=array(codes.shift),
            acc=array(acc),
            lo=array(low),
            hi=array(high),
        )
        return acc, (codes.unit * w.scale.double()).float(), low, high

    def backward(self, gradient: Codes, x: Value, step: Step) -> None:
        """The input's gradient to x, the weight's to the step."""
        if x.wanted:
            w = self._weight("in")
            acc = step.pool.take(x.shape, torch.int32)
            _engine.conv_input_grad(
                array(gradient.data),
                gradient.range,
                array(w.codes),
                *self._tail(),
                shift=array(gradient.shift),
                acc=array(acc),
            )
            x.gradient.products.append((acc.view(x.rows), (gradient.unit * w.scale.double()).float()))
        weight = self.layer.weight
        if weight.requires_grad:
            codes = x.codes(self.inputs)
            out = torch.empty(weight.shape)
            _engine.conv_weight_grad(
                array(gradient.data),
                array(codes.data),
                *self._tail(),
                values=array(out),
                out_factor=array(gradient.channel_scales()),
                in_factor=array(codes.channel_scales()),
            )
            step.add(weight, out.to(weight.dtype))


@dataclass
class ConvNorm(Unit):
    """Convolution, quantized normalization, and a rectifier or none; the sums in between are never floats."""

    reads: tuple[str, ...]
    result: str
    conv: IntegerConv2d
    norm: QuantizedL1BatchNorm
    name: str  # of the normalization
    rectified: bool

    def run(self, step: Step) -> None:
        x: Value = step.env[self.reads[0]]
        conv, pool, rule = Convolution(self.conv), step.pool, self._rule()
        try:
            acc, scale, low, high = conv.forward(x, pool)
        except NotFinite as error:
            raise NotFinite(f"{self.conv.state.name}: {error}") from error
        shape: Shape = (acc.shape[0], acc.shape[1], acc.shape[2], acc.shape[3])
        rows = (shape[0] * shape[1] * shape[2], shape[3])
        norm = rule.start(*rows, self.norm.weight, self.norm.bias)
        inputs = pool.take(rows, torch.int8)
        if not norm.forward(array(acc.view(rows)), array(scale), array(low), array(high), array(inputs)):
            raise NotFinite(f"{self.conv.state.name}: its result is beyond the range of float32")
        pool.give(acc)
        self.norm.track(torch.from_numpy(norm.mean), torch.from_numpy(norm.deviation))
        value = Normed(norm, inputs, self.rectified, shape, pool)
        step.env[self.result] = value
        step.tape.append(lambda s: self._backward(s, conv, x, value))

    def _rule(self) -> NormRule:
        rule = self.norm.engine_rule()
        if rule is None:
            raise ValueError(
                f"{type(self.norm).__name__} {self.name!r}: its rounding was exchanged; fuse the model again"
            )
        return rule

    def _backward(self, step: Step, conv: Convolution, x: Value, value: Normed) -> None:
        if not value.gradient:
            value.release()
            return
        pool, norm, layer = step.pool, value.norm, self.conv
        codes = pool.take(value.rows, torch.int8)
        single = value.gradient.single()
        real, scale = single if single is not None else (value.gradient.total(pool)[0], None)
        noise = self._rule().noise()
        known = None if self.rectified or single is None else value.gradient.range
        parts = (array(real), array(scale), known, array(value.inputs), self.rectified, noise, array(codes))
        if not norm.backward(*parts):
            raise NotFinite(f"{type(self.norm).__name__} {self.name!r}: its gradient contains NaN or infinity")
        if single is None:
            pool.give(real)
        for parameter, gradient in ((self.norm.weight, norm.weight_gradient), (self.norm.bias, norm.bias_gradient)):
            if parameter is not None and parameter.requires_grad:
                step.add(parameter, torch.from_numpy(gradient).to(parameter.dtype))
        form = conv.gradients
        out = pool.take(value.shape, torch.uint8)
        noise = noise_of(layer.rule.grad_rounding, layer.state.noise)
        unit, exponents = norm.gradient_codes(
            array(codes),
            array(value.inputs),
            form.bits,
            form.groups,
            form.absorbed,
            noise,
            array(out.view(value.rows)),
        )
        pool.give(codes)
        value.release()
        if unit != unit:
            raise NotFinite(f"{layer.state.name}: its gradient contains NaN or infinity")
        conv.backward(Codes(out.view(torch.int8), unit, exponents, form), x, step)
        pool.give(out)


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
        out = pool.take(normed.rows, torch.float32)
        bits = pool.take(((count + 7) // 8,), torch.uint8) if self.rectified else None
        normed.norm.to_f32(array(normed.inputs), self.rectified, array(other.real()), array(out), array(bits))
        value = Real(out, normed.shape, pool, escaped=False)
        step.env[self.result] = value
        step.tape.append(lambda s: self._backward(s, normed, other, value, bits))

    @staticmethod
    def _backward(step: Step, normed: Normed, other: Value, value: Real, bits: Tensor | None) -> None:
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
class TorchOp(Unit):
    """Any other node, by torch, on float tensors (N, C, H, W), or of other shapes."""

    reads: tuple[str, ...]
    result: str
    node: fx.Node
    module: nn.Module | None
    parameters: tuple[nn.Parameter, ...]

    def run(self, step: Step) -> None:
        leaves: dict[str, Tensor] = {}

        def argument(node: fx.Node) -> Any:
            value = step.env[node.name]
            if isinstance(value, Value) and node.name not in leaves:
                leaves[node.name] = _as_leaf(value)
            return leaves.get(node.name, value)

        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), argument)
        with torch.enable_grad():
            result = self._call(args, kwargs)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            step.env[self.result] = result
            return
        value = _from_torch(result, step.pool)
        step.env[self.result] = value
        wanting = [(step.env[name], leaf) for name, leaf in leaves.items() if leaf.requires_grad]
        if result.requires_grad:
            step.tape.append(lambda s: self._backward(s, result, wanting, value))

    def _call(self, args: Any, kwargs: Any) -> Any:
        if self.module is not None:
            return self.module(*args, **kwargs)
        if self.node.op == "call_method":
            return getattr(args[0], self.node.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
        return self.node.target(*args, **kwargs)  # type: ignore[operator]

    def _backward(self, step: Step, result: Tensor, wanting: list[tuple[Value, Tensor]], value: Value) -> None:
        arrived = _arrived(value, result)
        if arrived is not None:
            sources = [leaf for _, leaf in wanting] + [p for p in self.parameters if p.requires_grad]
            found = torch.autograd.grad(result, sources, arrived, allow_unused=True)
            for (reader, _), gradient in zip(wanting, found, strict=False):
                if gradient is not None:
                    _deliver(reader, gradient)
            trained = [p for p in self.parameters if p.requires_grad]
            for parameter, gradient in zip(trained, found[len(wanting) :], strict=True):
                if gradient is not None:
                    step.add(parameter, gradient)
        if not isinstance(value, Plain):
            value.release()


def _as_leaf(value: Value) -> Tensor:
    if isinstance(value, Plain):
        return value.tensor.detach().requires_grad_(value.wanted)
    value.real()
    value.escaped = True
    return value.real().view(value.shape).permute(0, 3, 1, 2).detach().requires_grad_(value.wanted)


def _from_torch(result: Tensor, pool: Pool) -> Value:
    if result.dim() != 4 or result.dtype != torch.float32 or result.numel() == 0:
        return Plain(result, pool)
    n, c, h, w = result.shape
    rows = result.detach().permute(0, 2, 3, 1).contiguous().view(n * h * w, c)
    value = Real(rows, (n, h, w, c), pool, escaped=True)
    value.wanted = result.requires_grad
    return value


def _arrived(value: Value, result: Tensor) -> Tensor | None:
    if isinstance(value, Plain):
        return value.arrived
    if not value.gradient:
        return None
    total, _ = value.gradient.total(value.pool)
    own = total.clone().view(value.shape).permute(0, 3, 1, 2)  # torch may keep it longer than the pool lends it
    value.pool.give(total)
    return own


def _deliver(value: Value, gradient: Tensor) -> None:
    if isinstance(value, Plain):
        value.add_gradient(gradient)
        return
    rows = value.pool.take(value.rows, torch.float32)
    rows.view(value.shape).copy_(gradient.permute(0, 2, 3, 1))
    value.gradient.append(rows)
