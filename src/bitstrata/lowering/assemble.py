"""From what the walk collected to a program, and the proof that it cannot overflow."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitstrata_runtime.derive import derive
from bitstrata_runtime.errors import ProgramError
from bitstrata_runtime.graph import validate
from bitstrata_runtime.program import AffineInfo, Factors, Layer, Program, Weights

from ..nn.layers import QuantizedLayer
from ..prepare.precision import precision
from ..quantizers.pixels import PixelInput
from .errors import LowerError
from .factors import input_grid, integer_form, program_factors, weight_codes
from .frozen import input_factors, shift_name
from .ops import Context

FRACTION_BITS = 20  # below this many, rounding of the residual stream was seen to change predictions
Shape = tuple[int, int, int]


def assemble(ctx: Context, model: nn.Module, served: tuple[int, ...], shape: Shape, output: str) -> Program:
    """The program of a walked model.

    Args:
        ctx: nodes, layers and normalizations met.
        model: the float64 evaluation copy.
        served: precisions, ascending.
        shape: of the input, (C, H, W).
        output: name of the output value.

    Raises:
        LowerError: the input's grid is not one, or a grid has no integer form.
    """
    pixels = _input_is_pixels(ctx)
    factors: dict[str, Factors] = {}
    grids: dict[str, dict[int, _Grids]] = {name: {} for name in ctx.layers}
    with torch.no_grad():
        for p in served:
            with precision(model, p):
                factors[str(p)] = program_factors(ctx.layers, ctx.folded, ctx.standalone)
                for name, layer in ctx.layers.items():
                    grids[name][p] = _grids(name, layer)
    layers, weights = {}, {}
    for name, layer in ctx.layers.items():
        weights[name] = _source_codes(name, grids[name])
        layers[name] = _record(name, layer, grids[name], weights[name], shape[0])
    affines = {name: AffineInfo(name, int(layer.weight.shape[0])) for name, layer in ctx.layers.items()}
    for name, powers in input_factors(ctx.layers).items():
        affines[shift_name(name)] = AffineInfo(name, powers.numel())
    for name, norm in ctx.standalone.items():
        if norm.owner not in layers:
            raise LowerError(
                f"lower: normalization {name!r} follows {norm.owner!r}, which the traced graph does not run"
            )
        affines[name] = AffineInfo(norm.owner, factors[str(served[0])].affine[name].shape[1])
    return Program(
        input_shape=shape,
        input_kind="pixels" if pixels else "codes",
        nodes=tuple(ctx.builder.nodes),
        output=output,
        layers=layers,
        affines=affines,
        precisions=served,
        weights=weights,
        factors=factors,
    )


def _input_is_pixels(ctx: Context) -> bool:
    readers = sorted(set(ctx.readers))
    kinds = {isinstance(ctx.layers[name].act_quant, PixelInput) for name in readers}
    if not kinds:
        raise LowerError("lower: no quantized layer reads the network's input")
    if len(kinds) > 1 or (kinds == {False} and len(readers) > 1):
        raise LowerError(
            f"lower: the network's input is read by {len(readers)} layers with input grids of their own: "
            f"{', '.join(readers)}; let one layer read it"
        )
    return kinds == {True}


@dataclass(frozen=True)
class _Grids:
    """What one layer's quantizers say at one precision."""

    width: int
    codes: NDArray[np.int8]
    form: tuple[int, int]
    input_range: tuple[int, int]
    offset: tuple[float, ...]
    pad_code: tuple[int, ...]


def _grids(name: str, layer: QuantizedLayer) -> _Grids:
    assert layer.act_quant is not None
    grid, offset = layer.act_quant.grid(), input_grid(layer, name)[1]
    form = integer_form(layer.weight_grid().offset, name)
    if not isinstance(layer.act_quant, PixelInput):
        pads = tuple(min(max(round(-z), grid.lo), grid.hi) for z in offset)  # the code nearest the value 0
    else:
        pads = (0,) if isinstance(layer, nn.Linear) else layer.act_quant.pad_codes
    return _Grids(layer.weight_quant.width, weight_codes(layer, name), form, (grid.lo, grid.hi), offset, pads)


def _source_codes(name: str, grids: Mapping[int, _Grids]) -> Weights:
    """The widest codes, of which all others must be the upper bits."""
    source = max(grids.values(), key=lambda grid: grid.width)
    for grid in grids.values():
        if not np.array_equal(grid.codes, source.codes >> (source.width - grid.width)):
            raise LowerError(
                f"lower: the {grid.width}-bit codes of {name!r} are not the upper bits of its {source.width}-bit "
                "codes, so one artifact cannot hold both; lower one precision at a time: lower(..., precisions=(b,))"
            )
    return Weights(source.codes, source.width)


def _record(
    name: str, layer: QuantizedLayer, grids: Mapping[int, _Grids], weights: Weights, input_channels: int
) -> Layer:
    linear = isinstance(layer, nn.Linear)
    out, per_group, height, width = weights.codes.shape
    return Layer(
        name=name,
        kind="linear" if linear else "conv",
        shape=(out, per_group, height, width),
        source_bits=weights.bits,
        planes=not layer.edge or len({grid.width for grid in grids.values()}) > 1,
        weight_bits={p: grid.width for p, grid in grids.items()},
        integer_form={p: grid.form for p, grid in grids.items()},
        input_range={p: grid.input_range for p, grid in grids.items()},
        pad_code={p: grid.pad_code for p, grid in grids.items()},
        input_offset={p: _a_channel(grid.offset, input_channels) for p, grid in grids.items()},
        grid=type(layer.weight_quant).__name__,
    )


def _a_channel(offset: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Offsets of flattened pixels (C, H, W order) as one a channel, where all positions of a channel agree."""
    if len(offset) in (1, channels) or len(offset) % channels:
        return offset
    rows = [offset[start : start + len(offset) // channels] for start in range(0, len(offset), len(offset) // channels)]
    return tuple(row[0] for row in rows) if all(len(set(row)) == 1 for row in rows) else offset


def prove(program: Program, chosen: tuple[int | str, ...] | None = None) -> None:
    """Derive every precision once: overflow proofs and fixed-point positions.

    Args:
        chosen: precisions or plans to derive; all precisions by default.

    Raises:
        LowerError: the program is malformed, or a value may overflow.
    """
    coarse: dict[str, int] = {}
    try:
        validate(program)
        for p in program.precisions if chosen is None else chosen:
            for v in derive(program, p).values:
                if v.scale is not None:
                    bits = 1 - math.frexp(v.scale)[1]
                    coarse[v.name] = min(bits, coarse.get(v.name, bits))
    except ProgramError as error:
        raise LowerError(f"lower: {error}") from error
    worst = {name: bits for name, bits in coarse.items() if bits < FRACTION_BITS}
    if worst:
        name = min(worst, key=worst.__getitem__)
        warnings.warn(
            f"lower: {len(worst)} fixed-point values have fewer than {FRACTION_BITS} fraction bits (least: "
            f"{worst[name]} in {name!r}): the worst case of the weights is far above what data reach; "
            "predictions may differ more often",
            stacklevel=3,
        )
