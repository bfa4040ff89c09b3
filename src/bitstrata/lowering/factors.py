"""The float64 factors of a program: what accumulators, normalizations and input grids mean in real numbers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitstrata_runtime.program import Factors

from ..nn.layers import QuantizedLayer
from ..nn.norm import PrecisionBatchNorm
from ..quantizers.pixels import PixelInput
from .errors import LowerError

Array = NDArray[np.float64]


def norm_affine(norm: nn.Module, name: str) -> tuple[Array, Array]:
    """Multiplier and addend, float64 (C,), of a batch normalization; `name` is for errors."""
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    if norm.running_mean is None or norm.running_var is None:
        raise LowerError(f"lower: the normalization {name} has no running statistics; use track_running_stats=True")
    var, mean = norm.running_var.double(), norm.running_mean.double()
    gamma = torch.ones_like(var) if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(var) if norm.bias is None else norm.bias.detach().double()
    gain = gamma / torch.sqrt(var + norm.eps)
    return gain.numpy(), (beta - mean * gain).numpy()


def integer_form(offset: object, name: str) -> tuple[int, int]:
    """(mul, add) with code + offset = (mul*code + add)/mul; offsets must be binary fractions down to 1/256."""
    ratio = Fraction(float(offset))  # type: ignore[arg-type]
    if ratio.denominator > 256:
        raise LowerError(f"lower: the weight grid of {name!r} has offset {offset}, which is no multiple of 1/256")
    return ratio.denominator, ratio.numerator


def weight_codes(layer: QuantizedLayer) -> NDArray[np.int8]:
    """Codes of the layer's weight at its current precision, (out, in/groups, kh, kw), int8."""
    codes = layer.weight_quant.codes(layer.effective_weight().detach()).numpy()
    return shape4(codes).astype(np.int8)


def shape4(weight: NDArray[np.generic]) -> NDArray[np.generic]:
    """A linear, 1-d or 2-d weight as (out, in/groups, kh, kw); 1-d convolutions run along the width."""
    if weight.ndim == 2:
        return weight[:, :, None, None]
    return weight[:, :, None, :] if weight.ndim == 3 else weight


def layer_affine(layer: QuantizedLayer, name: str, norm: PrecisionBatchNorm | None) -> NDArray[np.float64]:
    """The layer's affine at its current precision, (2, out): spec/numerics.md section 6."""
    grid = layer.weight_quant.grid()
    mul, add = integer_form(grid.offset, name)
    out = layer.weight.shape[0]
    weight_scale = np.broadcast_to(grid.scale.detach().double().reshape(-1).numpy(), (out,))
    step, offset = input_grid(layer, name)
    unit = weight_scale / mul * step
    constant = np.zeros(out) if layer.bias is None else layer.bias.detach().double().numpy().copy()
    if any(offset):
        integers = mul * weight_codes(layer).astype(np.float64) + add  # (out, in/groups, kh, kw)
        constant = constant + unit * (integers.sum(axis=(2, 3)) * _per_group(offset, layer)).sum(axis=1)
    if norm is None:
        return np.stack([unit, constant])
    gain, shift = norm_affine(norm.level, f"behind {name!r}")
    return np.stack([unit * gain, constant * gain + shift])


def _per_group(offset: tuple[float, ...], layer: QuantizedLayer) -> Array:
    if len(offset) == 1:
        return np.array(offset)
    groups = int(getattr(layer, "groups", 1))
    return np.repeat(np.array(offset).reshape(groups, -1), layer.weight.shape[0] // groups, axis=0)


def input_grid(layer: QuantizedLayer, name: str) -> tuple[float, tuple[float, ...]]:
    """Step and offset (one, or one an input channel) of the layer's input grid at its current precision."""
    assert layer.act_quant is not None
    if isinstance(layer.act_quant, PixelInput):
        return 1.0 / 255.0, tuple(-255.0 * m for m in layer.act_quant.mean)
    try:
        grid = layer.act_quant.grid()
    except RuntimeError as error:  # a step that was never set
        raise LowerError(f"lower: layer {name!r}: {error}") from error
    if float(grid.offset) != 0:
        raise LowerError(f"lower: layer {name!r} has an input grid with offset {grid.offset}; only pixels may have one")
    return float(grid.scale), (0.0,)


def program_factors(
    layers: dict[str, QuantizedLayer], folded: dict[str, PrecisionBatchNorm], standalone: dict[str, PrecisionBatchNorm]
) -> Factors:
    """Factors of the model's present precisions.

    Args:
        layers: every quantized layer of the program.
        folded: layer -> the normalization folded into its affine.
        standalone: affine name -> normalization kept as an affine of its own.
    """
    factors = Factors()
    for name, layer in layers.items():
        factors.affine[name] = layer_affine(layer, name, folded.get(name))
        factors.step[name] = input_grid(layer, name)[0]
    for name, norm in standalone.items():
        factors.affine[name] = np.stack(norm_affine(norm.level, repr(name)))
    return factors
