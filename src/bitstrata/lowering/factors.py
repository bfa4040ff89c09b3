"""The float64 factors of a program: what accumulators, normalizations and input grids mean in real numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from torch import nn

from bitstrata_runtime.program import Factors

from ..nn.layer_batch_norm import fold
from ..nn.layers import QuantizedLayer
from ..nn.norm import PrecisionBatchNorm
from ..quantizers.pixels import PixelInput
from .errors import LowerError
from .frozen import input_factors, shift_name

Array = NDArray[np.float64]


def norm_affine(norm: nn.Module, name: str) -> tuple[Array, Array]:
    """Multiplier and addend, float64 (C,), of a batch normalization; `name` is for errors."""
    try:
        gain, shift = fold(norm)
    except ValueError as error:
        raise LowerError(
            f"lower: the normalization {name} has no running statistics; use track_running_stats=True"
        ) from error
    except TypeError as error:
        raise LowerError(
            f"lower: the normalization {name}, {type(norm).__name__}, is no affine function of its input at inference; "
            "use its plain form"
        ) from error
    return gain.numpy(), shift.numpy()


def integer_form(offset: object, name: str) -> tuple[int, int]:
    """(mul, add) with code + offset = (mul*code + add)/mul; offsets must be binary fractions down to 1/256."""
    ratio = Fraction(float(offset))  # type: ignore[arg-type]
    if ratio.denominator > 256:
        raise LowerError(f"lower: the weight grid of {name!r} has offset {offset}, which is no multiple of 1/256")
    return ratio.denominator, ratio.numerator


def weight_codes(layer: QuantizedLayer, name: str = "") -> NDArray[np.int8]:
    """Codes of the layer's weight at its current precision, (out, in/groups, kh, kw), int8; `name` is for errors."""
    codes = layer.weight_codes().numpy()
    half = 2 ** (layer.weight_quant.width - 1)
    if codes.min() < -half or codes.max() >= half:
        whose = f"layer {name!r}: its" if name else "a layer's"
        raise LowerError(
            f"lower: {whose} weight codes lie in {codes.min()}..{codes.max()} and do not fit "
            f"{layer.weight_quant.width} bits; programs hold weights of at most 8 bits"
        )
    return shape4(codes).astype(np.int8)


def shape4(weight: NDArray[np.generic]) -> NDArray[np.generic]:
    """A linear, 1-d or 2-d weight as (out, in/groups, kh, kw); 1-d convolutions run along the width."""
    if weight.ndim == 2:
        return weight[:, :, None, None]
    return weight[:, :, None, :] if weight.ndim == 3 else weight


def layer_affine(layer: QuantizedLayer, name: str, norm: PrecisionBatchNorm | None) -> NDArray[np.float64]:
    """The layer's affine at its current precision, (2, out): spec/numerics.md section 6."""
    grid = layer.weight_grid()
    mul, add = integer_form(grid.offset, name)
    out = layer.weight.shape[0]
    weight_scale = np.broadcast_to(grid.scale.detach().double().reshape(-1).numpy(), (out,))
    step, offset = input_grid(layer, name)
    unit = weight_scale / mul * step / _pooled(layer, name, offset)
    constant = np.zeros(out) if layer.bias is None else layer.bias.detach().double().numpy().copy()
    if any(offset):
        integers = mul * weight_codes(layer).astype(np.float64) + add  # (out, in/groups, kh, kw)
        constant = constant + unit * (integers.sum(axis=(2, 3)) * _per_group(offset, layer)).sum(axis=1)
    if norm is None:
        return np.stack([unit, constant])
    gain, shift = norm_affine(norm.level, f"behind {name!r}")
    return np.stack([unit * gain, constant * gain + shift])


def _pooled(layer: QuantizedLayer, name: str, offset: tuple[float, ...]) -> int:
    """How many codes the layer's own pooling adds into one: 1 without."""
    pool = layer.input_pool
    if pool is None:
        return 1
    assert isinstance(pool, nn.AvgPool1d | nn.AvgPool2d)  # the walk has made sure
    if any(offset):
        raise LowerError(
            f"lower: layer {name!r} pools its input codes, whose grid has offset {offset}; sums of codes need offset 0"
        )
    sizes = pool.kernel_size
    return math.prod(sizes) if isinstance(sizes, tuple) else int(sizes) ** (1 if isinstance(pool, nn.AvgPool1d) else 2)


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
    if grid.valid is not None:
        raise LowerError(
            f"lower: the input codes of layer {name!r} leave out some between {grid.lo} and {grid.hi}; requantization "
            "rounds to every code in between"
        )
    return float(grid.scale), (float(grid.offset),)


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
    for name, powers in input_factors(layers).items():
        factors.affine[shift_name(name)] = np.stack([powers.numpy(), np.zeros(powers.numel())])
    for name, norm in standalone.items():
        factors.affine[name] = np.stack(norm_affine(norm.level, repr(name)))
    return factors
