"""From what the walk collected to a program, and the proof that it cannot overflow."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import nn

from bitstrata_runtime.derive import derive
from bitstrata_runtime.errors import ProgramError
from bitstrata_runtime.graph import validate
from bitstrata_runtime.program import AffineInfo, Layer, Program, Weights

from ..nn.layers import QuantizedLayer
from ..prepare.precision import precision
from ..quantizers.pixels import PixelInput
from .errors import LowerError
from .factors import input_grid, integer_form, program_factors, shape4, weight_codes
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
    factors, layers, weights = {}, {}, {}
    with torch.no_grad():
        for p in served:
            with precision(model, p):
                factors[str(p)] = program_factors(ctx.layers, ctx.folded, ctx.standalone)
        for name, layer in ctx.layers.items():
            layers[name], weights[name] = _layer_record(model, name, layer, served, shape)
    affines = {name: AffineInfo(name, int(layer.weight.shape[0])) for name, layer in ctx.layers.items()}
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


def _layer_record(
    model: nn.Module, name: str, layer: QuantizedLayer, served: tuple[int, ...], input_shape: Shape
) -> tuple[Layer, Weights]:
    widths = layer.weight_quant.bits
    with precision(model, max(served, key=lambda p: widths[p])):
        source_bits, source = layer.weight_quant.width, weight_codes(layer)
    forms, ranges = {}, {}
    for p in served:
        with precision(model, p):
            forms[p] = integer_form(layer.weight_quant.grid().offset, name)
            if not np.array_equal(weight_codes(layer), source >> (source_bits - widths[p])):
                raise LowerError(
                    f"lower: the {widths[p]}-bit codes of {name!r} are not the upper bits of its {source_bits}-bit "
                    "codes"
                )
            assert layer.act_quant is not None
            grid = layer.act_quant.grid()
            ranges[p] = (grid.lo, grid.hi)
    linear = isinstance(layer, nn.Linear)
    pixels = layer.act_quant if isinstance(layer.act_quant, PixelInput) else None
    record = Layer(
        name=name,
        kind="linear" if linear else "conv",
        shape=_four(shape4(source).shape),
        source_bits=source_bits,
        planes=not layer.edge,
        weight_bits={p: widths[p] for p in served},
        integer_form=forms,
        input_range=ranges,
        pad_code=pixels.pad_codes if pixels and not linear else (0,),
        input_offset=_a_channel(input_grid(layer)[1], input_shape[0]),
        grid=type(layer.weight_quant).__name__,
    )
    return record, Weights(source, source_bits)


def _four(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    out, per_group, height, width = (int(n) for n in shape)
    return out, per_group, height, width


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
