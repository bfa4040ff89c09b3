"""Codes of quantization-aware layers as a fused step takes them: rules of activation quantizers, integer weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitstrata_runtime import _engine

from ..functional.uniform import EPS
from ..nn.layers import QuantConv2d
from ..quantizers.base import ActivationQuantizer, Grid, Quantizer
from ..quantizers.int8 import Int8Activation
from ..quantizers.lsq import LSQActivation
from ..quantizers.pact import CGPactActivation, PactActivation
from ..quantizers.pixels import PixelInput
from ..quantizers.uniq import UniqActivation
from .torch_op import sources_of
from .units import Sources
from .values import NotFiniteError

TINY = float(np.finfo(np.float32).tiny)  # the smallest number above 0 that no processor takes for 0
FINEST = 9  # offsets of weight grids that are multiples of 2^-FINEST become integers
LARGEST_SUM = 2**28  # of a convolution in codes, as the engine takes it
PIXELS = (0, 255)
QUANTIZERS = (LSQActivation, UniqActivation, PactActivation, CGPactActivation, Int8Activation)


class NotCodesError(ValueError):
    """A weight whose grid no small integers stand for."""


@dataclass(frozen=True)
class Rule:
    """An activation quantizer at its present precision and step: code = clamp(round(x / step), lo, hi).

    first, last: the gradient passes where first <= x / step <= last. inner: factor of the step's gradient there.
    scale: factor of the step's gradient. parameter: which gets it; None if nobody asks.
    """

    step: float
    lo: int
    hi: int
    first: float
    last: float
    inner: float
    scale: float
    parameter: nn.Parameter | None

    @property
    def numbers(self) -> tuple[float, float, float, float, float]:
        """As the engine takes it."""
        return (self.lo, self.hi, self.first, self.last, self.inner)

    @property
    def dtype(self) -> Any:
        """Of the codes: numpy's int8 or uint8."""
        return np.int8 if self.lo < 0 else np.uint8

    def gradient(self, total: float) -> Tensor:
        """The parameter's gradient from the sum over the tensor."""
        assert self.parameter is not None
        return torch.full_like(self.parameter, total * self.scale)


def fusable_quantizer(quantizer: Quantizer | None) -> bool:
    """Whether `rule_of` knows the quantizer's gradient, and its grid has code 0 for 0; or its codes are pixels."""
    return type(quantizer) is PixelInput or (type(quantizer) in QUANTIZERS and not quantizer.shifted)  # type: ignore[union-attr]


def ready(quantizer: Quantizer) -> bool:
    """Whether the step is set, and no calibration is going on."""
    if isinstance(quantizer, PixelInput):
        return True
    return isinstance(quantizer, ActivationQuantizer) and quantizer.is_initialized() and not quantizer.observing


def rule_of(quantizer: ActivationQuantizer, shape: tuple[int, ...]) -> Rule:
    """The rule for an input of this shape, samples first. The formulas are those of the quantizers' own classes."""
    lo, hi = quantizer.limits()
    size = math.prod(shape)
    count = max(size if quantizer.numel == "batch" else size // max(shape[0], 1), 1)
    parameter = quantizer.step
    step = float(parameter.detach())
    opened = isinstance(quantizer, UniqActivation | PactActivation)
    inner, sign = 1.0, 1.0
    if isinstance(quantizer, PactActivation):  # the parameter is the clipping level, hi steps
        sign = -1.0 if step < 0 else 1.0
        step, inner = abs(step) / hi, float(quantizer.gradient == "cg")
        scale = sign / hi
    elif isinstance(quantizer, UniqActivation):
        scale = (count * (hi - lo)) ** -0.5
    elif isinstance(quantizer, LSQActivation):
        scale = (count * hi) ** -0.5
    else:
        scale = 1.0
    first = (TINY if lo == 0 else float(np.nextafter(np.float32(lo), np.float32(0)))) if opened else float(lo)
    last = float(np.nextafter(np.float32(hi), np.float32(0))) if opened else float(hi)
    smallest = EPS / hi if isinstance(quantizer, PactActivation) else EPS
    wanted = parameter if parameter.requires_grad else None
    return Rule(step if math.isnan(step) else max(step, smallest), lo, hi, first, last, inner, scale, wanted)


@dataclass(frozen=True)
class Fit:
    """How a weight grid becomes integers: value = scale / 2^shift * integer. wide: beyond 8 bits."""

    shift: int
    wide: bool


def fit_of(grid: Grid) -> Fit:
    """Integers for a grid.

    Raises:
        NotCodesError: the grid's offset is not one number, no multiple of 2^-9, or integers lie beyond -256..255.
    """
    offset = torch.as_tensor(grid.offset).detach()
    if offset.numel() != 1:
        raise NotCodesError(f"its weight grid has {offset.numel()} offsets, which must be one")
    shift = next((k for k in range(FINEST + 1) if (float(offset) * 2**k).is_integer()), None)
    if shift is None:
        raise NotCodesError(f"its weight grid's offset {float(offset)} is no multiple of 2^-{FINEST}")
    least, most = ((code + float(offset)) * 2**shift for code in (grid.lo, grid.hi))
    if least < -256 or most > 255:
        raise NotCodesError(f"its weight's integers, {least:.0f} to {most:.0f}, do not lie within -256..255")
    return Fit(shift, least < -128 or most > 127)


@dataclass(frozen=True)
class IntegerWeight:
    """A quantized weight as integers: value = unit * integer, unit (channels,) float64.

    high, low: integer = high * 2 + low, or high alone where low is None. quantized: the fake-quantized weight, of which
    only the place in autograd's graph is wanted: the edge there, or, if it is a leaf, the weight; None without
    gradient. sources: what it depends on. channels_last: the quantized weight's order in memory.
    """

    unit: NDArray[np.float64]
    high: NDArray[np.int8]
    low: NDArray[np.int8] | None
    quantized: Any
    sources: Sources
    channels_last: bool = False

    def real(self, dtype: torch.dtype) -> Tensor:
        """The integers as floats, which hold them exactly."""
        numbers = torch.from_numpy(self.high).to(dtype, memory_format=torch.channels_last)
        return numbers if self.low is None else numbers.mul_(2).add_(torch.from_numpy(self.low))


def integer_weight(layer: QuantConv2d) -> IntegerWeight:
    """The weight at the present precision.

    Raises:
        NotCodesError: see `fit_of`.
        NotFiniteError: the weight contains NaN or infinity, or so does its grid.
    """
    with torch.enable_grad(), sources_of(layer) as sources:
        quantized = layer.quantized_weight()
    grid = layer.weight_grid()
    fit = fit_of(grid)
    last = not quantized.is_contiguous() and quantized.is_contiguous(memory_format=torch.channels_last)
    detached = quantized.detach()
    values = (detached.permute(0, 2, 3, 1) if last else detached.contiguous()).numpy()
    scale = grid.scale.detach().double().reshape(-1).numpy() * 2.0**-fit.shift
    unit = np.ascontiguousarray(np.broadcast_to(scale, (values.shape[0],)))
    shape = tuple(quantized.shape)
    high, low = np.empty(shape, np.int8), np.empty(shape, np.int8) if fit.wide else None
    if not _engine.qat_integers(values, last, unit, high, low, torch.get_num_threads()):
        raise NotFiniteError("its weight contains NaN or infinity")
    place: Any = quantized if quantized.requires_grad else None
    if place is not None and not quantized.is_leaf:
        place = torch.autograd.graph.get_gradient_edge(quantized)  # the tensor itself takes four bytes a weight
    return IntegerWeight(unit, high, low, place, sources, last)


def fusable_weight(layer: QuantConv2d) -> bool:
    """Whether the weight is integers at every precision, and all sums of a convolution fit, whatever the weight."""
    here, inner = layer.precision, layer.weight[0].numel()
    try:
        for precision in layer.precisions:
            layer.set_precision(precision)
            fit = fit_of(layer.weight_grid())
            quantizer = layer.act_quant
            lo, hi = quantizer.limits() if isinstance(quantizer, ActivationQuantizer) else PIXELS
            if inner * (256 if fit.wide else 128) * max(-lo, hi) > LARGEST_SUM:
                return False
    except NotCodesError:
        return False
    finally:
        layer.set_precision(here)
    return True
