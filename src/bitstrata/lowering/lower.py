"""lower: walk the traced graph once and build the program."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from bitstrata_runtime.derive import derive
from bitstrata_runtime.errors import ProgramError
from bitstrata_runtime.graph import validate
from bitstrata_runtime.program import AffineInfo, Layer, Node, Program, Weights

from ..nn.layers import FORMS, QuantizedLayer
from ..nn.norm import PrecisionBatchNorm
from ..prepare.precision import precision, precisions
from ..quantizers.pixels import PixelInput
from .builder import Builder, Real
from .errors import LowerError
from .factors import input_grid, integer_form, program_factors, shape4, weight_codes
from .ops import FUNCTIONS, METHODS, MODULES, Context, as_map
from .trace import Traced, trace

FRACTION_BITS = 20  # below this many, rounding of the residual stream was seen to change predictions


def lower(model: nn.Module, example: Tensor) -> Program:
    """Turn a quantized, calibrated model into an integer-only program that holds all its precisions.

    Everything is evaluated in float64. Batch normalization is folded per precision, accumulators are proved to fit int32 at
    every precision, and a value of the residual stream with fewer than 20 fraction bits is a warning.

    Args:
        model: prepared by `quantize_`, with activation steps set; unchanged.
        example: one input batch as the model takes it (N, C, H, W), (N, C, L) or (N, C); only its shape matters.

    Raises:
        LowerError: an operation outside the integer set, a layer left in float, or an accumulator that may overflow.
    """
    served = precisions(model)
    if not served:
        raise LowerError("lower: the model has no quantized layers; call quantize_ first")
    if not isinstance(example, Tensor):
        raise LowerError(f"lower: example must be one input tensor, got {type(example).__name__}")
    try:
        traced = trace(model, example)
    except RuntimeError as error:  # an activation step that was never set
        raise LowerError(f"lower: the model does not run on the example: {error}") from error
    ctx = Context(Builder(), traced.values)
    output = _walk(ctx, traced)
    program = _assemble(ctx, traced.model, served, as_map(tuple(example.shape[1:]), "example"), output)
    _prove(program)
    return program


def _walk(ctx: Context, traced: Traced) -> str:
    env: dict[fx.Node, Real] = {}

    def value(argument: Any) -> Any:
        def one(node: fx.Node) -> Any:
            return env[node] if node in env else ctx.values[node]

        return fx.node.map_arg(argument, one)

    for node in traced.graph.nodes:
        if node.op == "placeholder":
            if node.users:
                env[node] = Real(ctx.builder.emit("input", "input", ()), "input", ctx.shape(node))
        elif node.op == "output":
            result = value(node.args[0])
            if not isinstance(result, Real):
                raise LowerError(f"lower: the model must return one tensor, it returns {type(result).__name__}")
            return ctx.builder.fixed(result, "logits").base
        elif isinstance(ctx.values[node], tuple) and not isinstance(ctx.values[node], torch.Size) and _reads(node, env):
            args, kwargs = value(node.args), value(node.kwargs)
            env[node] = _lower_node(ctx, traced.model, node, args, kwargs)
    raise LowerError("lower: the model returns nothing")


def _reads(node: fx.Node, env: dict[fx.Node, Real]) -> bool:
    return any(n in env for n in node.all_input_nodes)


def _lower_node(ctx: Context, model: nn.Module, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Real:
    if node.op == "call_module":
        return _lower_module(ctx, str(node.target), model.get_submodule(str(node.target)), node, args[0])
    table: dict[Any, Any] = FUNCTIONS if node.op == "call_function" else METHODS
    handler = table.get(node.target)
    if handler is None:
        what = getattr(node.target, "__name__", str(node.target))
        raise LowerError(
            f"lower: {what!r} (at {node.name!r}{_where(node)}) has no integer form; replace it by one of: convolution, linear, "
            "batch normalization, ReLU or clamp, add, max or average pooling, strided slice, zero padding, flatten"
        )
    try:
        return handler(ctx, node, *args, **kwargs)
    except TypeError as error:
        raise LowerError(f"lower: arguments of {node.name!r}{_where(node)} are not supported: {error}") from error


def _where(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    inside = list(stack.values())[-1] if stack else None
    return f" in module {inside[0]!r}" if inside and inside[0] else ""


def _lower_module(ctx: Context, name: str, module: nn.Module, node: fx.Node, x: Real) -> Real:
    if isinstance(module, QuantizedLayer):
        return _lower_layer(ctx, name, module, node, x)
    if isinstance(module, PrecisionBatchNorm):
        return _lower_norm(ctx, name, module, node, x)
    handler = MODULES.get(type(module))
    if handler is not None:
        return handler(ctx, node, module, x)
    kind = type(module).__name__
    if isinstance(module, tuple(FORMS)):
        raise LowerError(f"lower: {kind} {name!r} is in float; quantize it (summary(model) tells why it was left out)")
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        raise LowerError(f"lower: {kind} {name!r} follows a layer in float; quantize that layer too")
    raise LowerError(f"lower: module {name!r} of type {kind} has no integer form; replace it or leave it out of the model")


def _lower_layer(ctx: Context, name: str, layer: QuantizedLayer, node: fx.Node, x: Real) -> Real:
    if layer.act_quant is None:
        raise LowerError(f"lower: layer {name!r} reads float activations; an integer program needs a recipe with them quantized")
    rank = len(ctx.values[node.args[0]])  # type: ignore[index]
    if isinstance(layer, nn.Linear) and rank != 1:
        raise LowerError(f"lower: linear layer {name!r} reads {rank + 1} dimensions; only (N, features) is supported")
    pixels = isinstance(layer.act_quant, PixelInput)
    if pixels != (x.kind == "input") and pixels:
        raise LowerError(f"lower: layer {name!r} expects the network's pixels, but reads the value {x.base!r}")
    if x.kind == "input":
        ctx.readers.append(name)
    known = ctx.layers.setdefault(name, layer)
    assert known is layer
    source = ctx.builder.codes(x, name)
    base = ctx.builder.emit(name, "conv", (source,), layer=name, **_geometry(layer))
    return Real(base, "acc", ctx.shape(node), affine=(name,))


def _geometry(layer: QuantizedLayer) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {"stride": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1}
    pad = list(layer._reversed_padding_repeated_twice)  # type: ignore[arg-type]
    pad = pad if len(pad) == 4 else [*pad, 0, 0]  # left, right, top, bottom
    stride, dilation = (list(getattr(layer, key)) for key in ("stride", "dilation"))
    return {
        "stride": stride if len(stride) == 2 else [1, *stride],
        "padding": [pad[2], pad[3], pad[0], pad[1]],
        "dilation": dilation if len(dilation) == 2 else [1, *dilation],
        "groups": int(layer.groups),  # type: ignore[arg-type]
    }


def _lower_norm(ctx: Context, name: str, norm: PrecisionBatchNorm, node: fx.Node, x: Real) -> Real:
    producer = node.args[0]
    assert isinstance(producer, fx.Node)
    alone = x.kind == "acc" and x.affine == (norm.owner,) and not x.clipped and len(producer.users) == 1
    if alone and norm.owner not in ctx.folded and str(producer.target) == norm.owner:
        ctx.folded[norm.owner] = norm
        return x
    if x.kind == "input":
        raise LowerError(f"lower: normalization {name!r} reads the network's input; give the mean and std to Pixels instead")
    source = ctx.builder.fixed(x, name) if x.clipped else x
    ctx.standalone[name] = norm
    return Real(source.base, source.kind, source.shape, (*source.affine, name), pooled=source.pooled)


def _assemble(ctx: Context, model: nn.Module, served: tuple[int, ...], shape: tuple[int, int, int], output: str) -> Program:
    kinds = {isinstance(ctx.layers[name].act_quant, PixelInput) for name in ctx.readers}
    if len(kinds) != 1:
        raise LowerError(f"lower: the input must be read by pixel layers alone or by others alone, readers: {ctx.readers}")
    if kinds == {False} and len(set(ctx.readers)) > 1:
        raise LowerError(
            f"lower: the input is read by layers with input grids of their own: {sorted(set(ctx.readers))}; let one layer read it, "
            "or describe it with Pixels"
        )
    factors = {}
    layers: dict[str, Layer] = {}
    weights: dict[str, Weights] = {}
    with torch.no_grad():
        for p in served:
            with precision(model, p):
                factors[str(p)] = program_factors(ctx.layers, ctx.folded, ctx.standalone)
        for name, layer in ctx.layers.items():
            layers[name], weights[name] = _layer_record(model, name, layer, served)
    affines = {name: AffineInfo(name, int(layer.weight.shape[0])) for name, layer in ctx.layers.items()}
    for name, norm in ctx.standalone.items():
        if norm.owner not in layers:
            raise LowerError(f"lower: normalization {name!r} follows {norm.owner!r}, which the traced graph does not run")
        affines[name] = AffineInfo(norm.owner, factors[str(served[0])].affine[name].shape[1])
    return Program(
        input_shape=shape,
        input_kind="pixels" if kinds == {True} else "codes",
        nodes=tuple(ctx.builder.nodes),
        output=output,
        layers=layers,
        affines=affines,
        precisions=served,
        weights=weights,
        factors=factors,
    )


def _layer_record(
    model: nn.Module, name: str, layer: QuantizedLayer, served: tuple[int, ...]
) -> tuple[Layer, Weights]:
    widest = max(served, key=lambda p: layer.weight_quant.bits[p])
    with precision(model, widest):
        source_bits = layer.weight_quant.width
        source = weight_codes(layer)
    forms, ranges = {}, {}
    for p in served:
        with precision(model, p):
            forms[p] = integer_form(layer.weight_quant.grid().offset, name)
            width = layer.weight_quant.width
            if not np.array_equal(weight_codes(layer), source >> (source_bits - width)):
                raise LowerError(f"lower: the {width}-bit codes of {name!r} are not the upper bits of its {source_bits}-bit codes")
            act = layer.act_quant
            assert act is not None
            grid = act.grid()
            ranges[p] = (grid.lo, grid.hi)
    pixels = layer.act_quant if isinstance(layer.act_quant, PixelInput) else None
    record = Layer(
        name=name,
        kind="linear" if isinstance(layer, nn.Linear) else "conv",
        shape=tuple(int(n) for n in shape4(np.empty(tuple(layer.weight.shape), dtype=np.int8)).shape),  # type: ignore[arg-type]
        source_bits=source_bits,
        planes=not layer.edge,
        weight_bits=dict(layer.weight_quant.bits),
        integer_form=forms,
        input_range=ranges,
        pad_code=pixels.pad_codes if pixels else (0,),
        input_offset=input_grid(layer)[1],
        grid=type(layer.weight_quant).__name__,
    )
    return record, Weights(source, source_bits)


def _prove(program: Program) -> None:
    """Derive every precision once: overflow proofs and fixed-point positions."""
    coarse: dict[str, int] = {}
    try:
        validate(program)
        for p in program.precisions:
            for v in derive(program, p).values:
                if v.scale is not None:
                    bits = -int(np.frexp(v.scale)[1]) + 1
                    coarse[v.name] = min(bits, coarse.get(v.name, bits))
    except ProgramError as error:
        raise LowerError(f"lower: {error}") from error
    worst = {name: bits for name, bits in coarse.items() if bits < FRACTION_BITS}
    if worst:
        name = min(worst, key=worst.__getitem__)
        warnings.warn(
            f"lower: {len(worst)} fixed-point values have fewer than {FRACTION_BITS} fraction bits (least: {worst[name]} in "
            f"{name!r}): the worst case of the weights is far above what data reach; predictions may differ more often",
            stacklevel=3,
        )


__all__ = ["Node", "lower"]
