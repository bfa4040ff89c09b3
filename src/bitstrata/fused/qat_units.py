"""The units of a fused quantization-aware step: what lies between the codes of one convolution and those of the next.

A convolution of codes is exact in integers. Forward its sums are kept (in 16 bits where they fit), with the scale and
offset that the batch normalization gives each channel; the next codes, and residual sums, are made of them in one pass,
and again in the backward pass. There one pass
sums up what the normalization and the quantizer's step need of the gradient, one writes the gradient of the sums, which
is multiplied with the integers of weight and codes, which floats of either width hold exactly: by the engine where it
is faster (`qat_products`), else by torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitstrata_runtime import _engine

from ..integer.convolution import Geometry
from ..integer.engine_codes import FASTEST
from ..integer.pool import Pool
from ..nn.layers import QuantConv2d
from ..nn.norm import PrecisionBatchNorm
from ..quantizers.base import ActivationQuantizer
from .qat_codes import IntegerWeight, Rule, integer_weight, rule_of
from .qat_products import input_gradient, takes_input_gradient, takes_weight_gradient, weight_gradient
from .qat_values import MEMORY, Activation, Arrived, add_step_gradient, to_map, to_rows
from .units import Step, Unit
from .values import NotFiniteError, Plain, Shape

DEEPEST = 2  # convolutions one after the other that are repeated: those of a residual block


@dataclass(frozen=True)
class Batch:
    """Of a batch's sums, (channels,) each in float64: mean and 1 over the deviation, with what 1 of them stands for."""

    mean: NDArray[np.float64]
    inverse: NDArray[np.float64]  # of the values' deviation
    unit: NDArray[np.float64]


@dataclass(frozen=True)
class Pending:
    """What a unit's backward pass needs of its forward pass."""

    x: Activation
    rule: Rule
    weight: IntegerWeight
    value: Activation
    norm: nn.BatchNorm2d
    batch: Batch


@dataclass
class QatConvNorm(Unit):
    """Convolution of codes, batch normalization, and a rectifier or none."""

    reads: tuple[str, ...]
    result: str
    conv: QuantConv2d
    norm: nn.Module
    name: str  # of the convolution
    rectified: bool
    repeated: int = 0  # sums of at most so many products are made again in the backward pass
    wide: set[int] = field(default_factory=set)  # precisions at which sums have not fit into 16 bits

    def level(self) -> nn.BatchNorm2d:
        """The normalization of the present precision."""
        norm = self.norm.level if isinstance(self.norm, PrecisionBatchNorm) else self.norm
        return cast("nn.BatchNorm2d", norm)

    def run(self, step: Step) -> None:
        layer, norm = self.conv, self.level()
        x, rule = self._coded(step, self._input(step))
        n, h, w, _ = x.shape
        try:
            weight = integer_weight(layer)
        except NotFiniteError as error:
            raise NotFiniteError(f"{self.name}: {error}") from error
        height, width = self._geometry().output((h, w), (layer.weight.shape[2], layer.weight.shape[3]))
        shape = (n, height, width, layer.weight.shape[0])
        if n * height * width == 1:
            raise ValueError(f"{self.name}: batch normalization in training needs more than one value a channel")
        data, moments = self._sums(x, rule, weight, shape)
        batch, scale, offset = self._normalize(norm, rule.step * weight.unit, moments)
        if not (np.isfinite(scale).all() and np.isfinite(offset).all()):
            raise NotFiniteError(f"{self.name}: its normalized result contains NaN or infinity")
        step.statistics.append((norm, (self._seen(batch, weight), moments, n * height * width)))
        value = Activation(
            data,
            shape,
            step.pool,
            step.real,
            scale=scale,
            offset=offset,
            rectified=self.rectified,
            remake=partial(self._again, x, rule, weight, shape, data.dtype) if self._repeats(x) else None,
            depth=x.depth + 1 if self._repeats(x) else 0,
        )
        step.env[self.result] = value
        pending = Pending(x, rule, weight, value, norm, batch)
        step.tape.append(lambda s: self._backward(s, pending))

    def _input(self, step: Step) -> Activation:
        x = step.env[self.reads[0]]
        if not isinstance(x, Activation):
            raise ValueError(
                f"fused convolution {self.name!r}: its input must be (N, C, H, W) in float32 or bfloat16 on the CPU"
            )
        if x.foreign and not bool(torch.isfinite(to_map(x.data, x.shape).sum())):
            raise NotFiniteError(f"{self.name}: its input contains NaN or infinity")
        return x

    def _coded(self, step: Step, x: Activation) -> tuple[Activation, Rule]:
        """What the convolution reads, and the rule of its codes."""
        n, h, w, c = x.shape
        rule = rule_of(cast("ActivationQuantizer", self.conv.act_quant), (n, c, h, w))
        if not np.isfinite(rule.step):
            raise NotFiniteError(f"{self.name}: the step of its input is not finite")
        return x, rule

    def _seen(self, batch: Batch, weight: IntegerWeight) -> Batch:
        """The batch as running statistics see it."""
        return batch

    def _geometry(self) -> Geometry:
        layer = self.conv
        return Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)

    def _sums(self, x: Activation, rule: Rule, weight: IntegerWeight, shape: Shape) -> tuple[NDArray[Any], Any]:
        precision = self.conv.precision
        while True:
            out = x.pool.take(shape, np.int32 if precision in self.wide else np.int16)
            fits, moments = self._convolve(x, rule, weight, out)
            if fits or precision in self.wide:
                return out.reshape(-1, shape[3]), moments
            x.pool.give(out)
            self.wide.add(precision)

    def _repeats(self, x: Activation) -> bool:
        """Whether the sums are sooner made again than kept; not through a whole network without anything kept."""
        return self.conv.weight[0].numel() <= self.repeated and x.depth < DEEPEST

    def _again(self, x: Activation, rule: Rule, weight: IntegerWeight, shape: Shape, dtype: Any) -> NDArray[Any]:
        """The sums of the forward pass: of integers, so the same."""
        out = x.pool.take(shape, dtype)
        self._convolve(x, rule, weight, out)
        x.drop_codes()
        return out.reshape(-1, shape[3])

    def _convolve(self, x: Activation, rule: Rule, weight: IntegerWeight, out: NDArray[Any]) -> tuple[bool, Any]:
        """Sums into `out`. Returns whether they fit, and their mean and variance a channel."""
        planar = self._geometry().planar(2)
        found: tuple[bool, Any] = _engine.qat_convolution(
            x.codes(rule),
            (rule.lo, rule.hi),
            weight.high,
            weight.low,
            planar["stride"],
            planar["dilation"],
            planar["padding"],
            self.conv.groups,
            out,
            True,
            FASTEST,
            torch.get_num_threads(),
        )
        return found

    @staticmethod
    def _normalize(
        norm: nn.BatchNorm2d, unit: NDArray[np.float64], moments: Any
    ) -> tuple[Batch, NDArray[np.float64], NDArray[np.float64]]:
        mean, variance = moments
        with np.errstate(all="ignore"):
            inverse = 1.0 / np.sqrt(variance * unit**2 + norm.eps)
            gamma = 1.0 if norm.weight is None else norm.weight.detach().double().numpy()
            beta = 0.0 if norm.bias is None else norm.bias.detach().double().numpy()
            scale = gamma * inverse * unit
            return Batch(mean, inverse, unit), scale, beta - scale * mean

    def _backward(self, step: Step, forward: Pending) -> None:
        weight, value, norm, batch = forward.weight, forward.value, forward.norm, forward.batch
        if not value.arrived:
            value.release()
            return
        pool, threads = step.pool, torch.get_num_threads()
        one = value.single(step)
        center = batch.mean.astype(np.float32)
        line = (value.data, *value.line(one.step), value.rectified, one.numbers, value.keep(), one.g, one.add)
        sums, moment, of_step = _engine.qat_gradient_sums(*line, center, FASTEST, threads)
        gamma = 1.0 if norm.weight is None else norm.weight.detach().double().numpy()
        deviation = batch.unit * batch.inverse  # 1 of the sums in deviations
        moment = deviation * (moment + (center - batch.mean) * sums)  # of the gradient times the normalized value
        if not (np.isfinite(sums).all() and np.isfinite(moment).all()):
            raise NotFiniteError(f"{self.name}: the gradient of its result contains NaN or infinity")
        for parameter, found in ((norm.weight, moment), (norm.bias, sums)):
            if parameter is not None and parameter.requires_grad:
                step.add(parameter, torch.from_numpy(found).to(parameter.dtype))
        add_step_gradient(step, one.rule, of_step)
        count = value.rows[0]
        factor = gamma * batch.inverse * weight.unit
        slope = -factor * deviation * moment / count
        constant = -factor * sums / count + slope * (center - batch.mean)
        place = value.own_gradient()
        out = pool.take(value.rows, MEMORY[step.real]) if place is None else place.rows
        _engine.qat_gradient(
            *line, np.stack((factor, constant, slope, center)).astype(np.float32), out, FASTEST, threads
        )
        value.release()
        self._products(step, forward.x, forward.rule, weight, to_map(out, value.shape))
        if place is None or place.pooled:
            pool.give(out)

    def _products(self, step: Step, x: Activation, rule: Rule, weight: IntegerWeight, gradient: Tensor) -> None:
        """Gradients of input and weight, from that of the sums in units of the integer weights."""
        asked, trained = x.wanted or rule.parameter is not None, weight.quantized is not None
        kernel = weight.high.shape[2:]
        own = asked and takes_input_gradient(step.real, self.conv.groups, kernel)
        own_weight = trained and takes_weight_gradient(step.real, self.conv.groups, x.shape[3])
        of_input, of_weight = self._by_torch(x, rule, weight, gradient, (asked and not own, trained and not own_weight))
        if asked:
            rows = self._input_rows(x, weight, gradient) if own else to_rows(of_input)
            if x.wanted:
                x.arrived.append(Arrived(rows, rule, pooled=own, own=True))
            else:
                x.step_gradient(step, rows, rule)
                if own:
                    step.pool.give(rows)
        if own_weight:
            of_weight = weight_gradient(self._channels_last(gradient), x.codes(rule), rule, weight, self._geometry())
        elif trained:
            scale = torch.from_numpy((rule.step / weight.unit).astype(np.float32)).view(-1, 1, 1, 1)
            of_weight = of_weight.float().mul_(scale)
        if trained:
            self._to_parameters(step, weight, of_weight)

    @staticmethod
    def _channels_last(maps: Tensor) -> NDArray[Any]:
        """(N, C, H, W) as (N, H, W, C): the same memory if channels are last in it."""
        n, c, h, w = maps.shape
        return to_rows(maps).reshape(n, h, w, c)

    def _input_rows(self, x: Activation, weight: IntegerWeight, gradient: Tensor) -> NDArray[Any]:
        """The engine's gradient of the input, in memory of the pool."""
        out = x.pool.take(x.rows, np.uint16)
        input_gradient(self._channels_last(gradient), weight, self._geometry(), out.reshape(x.shape))
        return out

    def _by_torch(
        self, x: Activation, rule: Rule, weight: IntegerWeight, gradient: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """What is wanted of the gradients of input and weight."""
        if not any(wanted):
            return gradient, gradient
        geometry = self._geometry()
        codes = x.code_values(rule)
        of_input, of_weight, _ = torch.ops.aten.convolution_backward(
            gradient,
            to_map(codes, x.shape),
            weight.real(x.dtype),
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            False,
            (0, 0),
            geometry.groups,
            (*wanted, False),
        )
        x.pool.give(codes)
        return of_input, of_weight

    @staticmethod
    def _to_parameters(step: Step, weight: IntegerWeight, gradient: Tensor) -> None:
        """Through the weight's quantizer; or to the leaf that collects gradients for it, where the layer shares one."""
        leaf = weight.quantized
        if isinstance(leaf, Tensor):
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            return
        sources = [source for _, source in weight.sources]
        found = torch.autograd.grad([leaf], sources, [gradient], allow_unused=True)
        step.add_all(weight.sources, found)


@dataclass
class QatJoin(Unit):
    """normalization + other, and a rectifier or none. reads: the normalization's node, then the other."""

    reads: tuple[str, ...]
    result: str
    rectified: bool

    def run(self, step: Step) -> None:
        normed, other = step.env[self.reads[0]], step.env[self.reads[1]]
        if not isinstance(other, Activation) or normed.shape != other.shape:
            shape = tuple(other.tensor.shape) if isinstance(other, Plain) else other.shape
            raise ValueError(f"fused sum {self.result!r}: shapes {normed.shape} and {shape} differ")

        def make() -> NDArray[Any]:
            return normed.values(other.real(), rectified=self.rectified)

        # made again only of what is there: convolutions of a whole network would be repeated for its last sum
        again = make if normed.depth == other.depth == 0 else None
        value = Activation(make(), normed.shape, step.pool, step.real, rectified=self.rectified, remake=again)
        step.env[self.result] = value
        step.tape.append(lambda s: self._backward(s, normed, other, value))

    @staticmethod
    def _backward(step: Step, normed: Activation, other: Activation, value: Activation) -> None:
        if value.arrived:
            total = value.total(step)
            receivers = [v for v in (normed, other) if v.wanted]
            if total.pooled:
                step.pool.share(total.rows, len(receivers))
            for receiver in receivers:
                receiver.arrived.append(Arrived(total.rows, None, total.pooled, own=total.pooled))
        value.release()


@dataclass
class QatMaxPool(Unit):
    """Maximum pooling of a normalization's result, from its sums."""

    reads: tuple[str, ...]
    result: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def run(self, step: Step) -> None:
        x: Activation = step.env[self.reads[0]]
        n, h, w, c = x.shape
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
        out, places = pool.take(shape, MEMORY[step.real]), pool.take(shape, np.uint8)
        threads = torch.get_num_threads()
        _engine.qat_max_pool(x.data, *x.line(), x.rectified, window, out, places, FASTEST, threads)
        value = Activation(out.reshape(-1, c), shape, pool, step.real)
        step.env[self.result] = value
        step.tape.append(lambda s: self._backward(s, x, value, places, window))

    @staticmethod
    def _backward(step: Step, x: Activation, value: Activation, places: NDArray[np.uint8], window: Any) -> None:
        if value.arrived and x.wanted:
            total = value.total(step)
            rows = step.pool.take(x.rows, MEMORY[step.real])
            _engine.qat_max_pool_gradient(
                total.rows.reshape(value.shape), places, window, rows, FASTEST, torch.get_num_threads()
            )
            if total.pooled:
                step.pool.give(total.rows)
            x.arrived.append(Arrived(rows, None, pooled=True, own=True))
        step.pool.give(places)
        value.release()


def track(step: Step) -> None:
    """Running statistics of all normalizations, as torch moves them: with the unbiased variance."""
    for norm, (batch, (_, variance), count) in step.statistics:
        if norm.running_mean is None:
            continue
        norm.num_batches_tracked.add_(1)
        momentum = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
        mean = torch.from_numpy(batch.mean * batch.unit).to(norm.running_mean.dtype)
        spread = torch.from_numpy(variance * batch.unit**2 * (count / (count - 1))).to(norm.running_var.dtype)
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(spread, momentum)


def entry(x: Tensor, pool: Pool, real: torch.dtype) -> Activation:
    """The network's input, which torch owns."""
    n, c, h, w = x.shape
    value = Activation(to_rows(x), (n, h, w, c), pool, real, pooled=False)
    value.wanted = x.requires_grad
    return value
