"""lower: walk the traced graph once and build the program."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitstrata_runtime.program import Program

from ..nn.layers import FORMS, QuantizedLayer
from ..nn.norm import PrecisionBatchNorm
from ..nn.own import OwnLayer
from ..prepare.observe import BATCH_NORMS
from ..prepare.precision import precisions as all_precisions
from ..prepare.swap import SKIPPED
from ..prepare.wrapped import is_sharded, unwrapped
from ..quantizers.pixels import PixelInput
from . import advice
from .assemble import assemble, prove
from .builder import Builder, Real
from .errors import LowerError, NoFormError, UnsupportedError
from .frozen import ShiftedLayer, deployed, shift_name
from .ops import FUNCTIONS, METHODS, MODULES, Context, as_map, name_of, pool_window
from .problems import Problems
from .trace import Traced, function_of, trace, where


def lower(model: nn.Module, example: Tensor, precisions: Iterable[int] | None = None) -> Program:
    """Turn a quantized, calibrated model into an integer-only program that holds all its precisions, or some.

    Everything is evaluated in float64. Batch normalization is folded per precision, accumulators are proved to fit
    int32 at every precision, and a fixed-point value with fewer than 20 fraction bits is a warning. Values are named by
    the model's modules: "layer1.0.conv1" is that layer's accumulators, "layer1.0.add" the sum that `layer1.0` forms.

    Args:
        model: prepared by `quantize_`, with activation steps set, or by `integer_` and frozen by `freeze_`, whose one
            precision is the width of its inner layers' weights; unchanged.
        example: one input batch as the model takes it (N, C, H, W), (N, C, L) or (N, C); only its shape matters.
        precisions: which to serve; all by default. A model whose precisions have weights of their own (edge layers with
            own_edges, codes that are no upper bits of the widest) has a program for one precision at a time.

    Raises:
        UnsupportedError: operations outside the integer set, all of them, each with what to put in its place.
        LowerError: a layer left in float, parameters that are not finite, a step
            that was never set, or an accumulator that may overflow.
    """
    if not isinstance(example, Tensor):
        raise LowerError(f"lower: example must be one input tensor, got {type(example).__name__}")
    if is_sharded(model):
        raise LowerError(
            "lower: the parameters are sharded over ranks (FSDP); load the gathered state_dict into a copy"
        )
    model = deployed(unwrapped(model), example)
    served = _served(model, precisions)
    if not 2 <= example.dim() <= 4:
        raise LowerError(
            f"lower: example must be a batch (N, C, H, W), (N, C, L) or (N, C), got shape {tuple(example.shape)}"
        )
    traced = trace(model, example, served)
    ctx = Context(Builder(), traced.values)
    output = _walk(ctx, traced)
    program = assemble(ctx, traced.model, served, as_map(tuple(example.shape[1:]), "example"), output)
    prove(program)
    return program


def _served(model: nn.Module, wanted: Iterable[int] | None) -> tuple[int, ...]:
    known = all_precisions(model)
    if not known:
        raise LowerError("lower: the model has no quantized layers; call quantize_ first")
    served = known if wanted is None else tuple(sorted(set(wanted)))
    if not served or not set(served) <= set(known):
        raise LowerError(f"lower: precisions must be among {known}, got {served}")
    own = [name for name, module in model.named_modules() if isinstance(module, OwnLayer)]
    if own and len(served) > 1:
        raise LowerError(
            f"lower: {', '.join(map(repr, own))} have weights of their own at every precision, so each precision is a "
            f"program of its own: lower(model, example, precisions=({served[0]},))"
        )
    return served


def _walk(ctx: Context, traced: Traced) -> str:
    """Add every node that depends on the input; returns the name of the output value."""
    env: dict[fx.Node, Real] = {}
    problems = Problems()
    _find_folds(ctx, traced)

    def known(node: fx.Node) -> Any:
        return env[node] if node in env else ctx.values[node]

    def value(argument: Any) -> Any:
        return fx.node.map_arg(argument, known)

    for node in traced.graph.nodes:
        if node.op == "placeholder":
            if node.users:
                env[node] = Real(ctx.builder.emit("input", "input", ()), "input", ctx.shape(node))
        elif node.op == "output":
            problems.raise_if_any()
            result = value(node.args[0])
            if not isinstance(result, Real):
                raise LowerError(f"lower: the model must return one tensor, it returns a {type(result).__name__}")
            return ctx.builder.fixed(result, "the model's output", name="logits").base
        elif _is_tensor(ctx.values[node]) and any(n in env for n in node.all_input_nodes):
            try:
                env[node] = _lower_node(ctx, traced.model, node, value(node.args), value(node.kwargs))
            except LowerError as error:  # go on, so that all operations without a form are named at once
                problems.add(node, error)
                env[node] = Real(name_of(node, "unsupported"), "fixed", problems.shape(node, ctx.values[node]))
    raise LowerError("lower: the model returns nothing")


def _is_tensor(value: Any) -> bool:
    """Whether a node's value, as `Traced` notes it, is a tensor (or several)."""
    return isinstance(value, tuple) and not isinstance(value, torch.Size)


def _find_folds(ctx: Context, traced: Traced) -> None:
    """Note the normalizations that can be part of their layer's affine.

    That needs every result of the layer to be read by the normalization alone, and the normalization to read nothing
    else; otherwise it stays an affine of its own.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    for name, nodes in calls.items():
        norm = traced.model.get_submodule(name)
        if not isinstance(norm, PrecisionBatchNorm):
            continue
        layer_calls = calls.get(norm.owner, [])
        read = {node.args[0] for node in nodes}
        if read == set(layer_calls) and all(set(call.users) <= set(nodes) for call in layer_calls):
            ctx.folded[norm.owner] = norm


def _lower_node(ctx: Context, model: nn.Module, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Real:
    if node.op == "call_module":
        inputs = [*args, *kwargs.values()]
        if len(inputs) != 1:
            raise UnsupportedError(
                [f"{where(node)} takes {len(inputs)} inputs; only modules of one input are supported"]
            )
        return _lower_module(ctx, str(node.target), model.get_submodule(str(node.target)), node, inputs[0])
    table: dict[Any, Any] = FUNCTIONS if node.op == "call_function" else METHODS
    handler = table.get(node.target)
    if handler is None:
        tensors = sum(isinstance(x, Real) for x in (*args, *kwargs.values()))
        raise NoFormError(f"{where(node)} has no integer form; {advice.for_function(function_of(node), tensors)}")
    try:
        return handler(ctx, node, *args, **kwargs)
    except TypeError as error:
        raise UnsupportedError([f"the arguments of {where(node)} are not supported: {error}"]) from error
    except LowerError as error:
        raise UnsupportedError([str(error).removeprefix("lower: ")]) from error


def _lower_module(ctx: Context, name: str, module: nn.Module, node: fx.Node, x: Real) -> Real:
    if isinstance(module, QuantizedLayer):
        return _lower_layer(ctx, name, module, node, x)
    if isinstance(module, PrecisionBatchNorm):
        return _lower_norm(ctx, name, module, x)
    handler = MODULES.get(type(module))
    if handler is not None:
        try:
            return handler(ctx, node, module, x)
        except LowerError as error:
            raise UnsupportedError([str(error).removeprefix("lower: ")]) from error
    kind = type(module).__name__
    if type(module) in FORMS:
        why = getattr(module, SKIPPED, None)
        text = f"{kind} {name!r} is in float; quantize it ({why or 'summary(model) tells why it was left out'})"
        if getattr(module, "padding_mode", "zeros") != "zeros":
            raise NoFormError(text)
        raise LowerError(f"lower: {text}")
    if isinstance(module, BATCH_NORMS):
        raise LowerError(f"lower: {kind} {name!r} follows a layer in float; quantize that layer too")
    raise NoFormError(f"module {name!r} of type {kind} has no integer form; {advice.for_module(module)}")


def _lower_layer(ctx: Context, name: str, layer: QuantizedLayer, node: fx.Node, x: Real) -> Real:
    if layer.act_quant is None:
        raise LowerError(
            f"lower: layer {name!r} reads float activations; an integer program needs a recipe that quantizes them"
        )
    rank = len(ctx.values[node.all_input_nodes[0]])
    if isinstance(layer, nn.Linear) and rank != 1:
        raise UnsupportedError(
            [f"linear layer {name!r} reads {rank + 1} dimensions; only (N, features) is supported: flatten first"]
        )
    if isinstance(layer.act_quant, PixelInput) and x.kind != "input":
        raise LowerError(f"lower: layer {name!r} expects the network's pixels, but reads the value {x.base!r}")
    if x.kind == "input":
        ctx.readers.append(name)
    ctx.layers[name] = layer
    source = ctx.builder.codes(_shifted(ctx, name, layer, x), name)
    if layer.input_pool is not None:
        window = pool_window(ctx, node, layer.input_pool, x)
        source = ctx.builder.emit(f"{name}.pool", "avgpool", (source,), **window)
    base = ctx.builder.emit(name, "conv", (source,), layer=name, **_geometry(layer))
    return Real(base, "acc", ctx.shape(node), affine=(name,))


def _shifted(ctx: Context, name: str, layer: QuantizedLayer, x: Real) -> Real:
    """The input with its channels multiplied by the layer's powers of two, if it has any."""
    if not isinstance(layer, ShiftedLayer):
        return x
    if x.kind == "input":
        raise LowerError(
            f"lower: layer {name!r} reads the network's input with finer steps in some channels, but the input has one "
            "step for all: let only the layer that runs first read it"
        )
    if {x.lo, x.hi} - {None, 0.0}:  # other bounds than 0 would have to be multiplied too
        x = ctx.builder.fixed(x, f"layer {name!r}")
    return replace(x, affine=(*x.affine, shift_name(name)))


def _geometry(layer: QuantizedLayer) -> dict[str, Any]:
    """Attributes of the conv node; one-dimensional layers run along the width."""
    if isinstance(layer, nn.Linear):
        return {"stride": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1}
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    left, right, top, bottom = [*layer._reversed_padding_repeated_twice, 0, 0][:4]
    missing = [1] * (2 - len(layer.stride))
    return {
        "stride": [*missing, *layer.stride],
        "padding": [top, bottom, left, right],
        "dilation": [*missing, *layer.dilation],
        "groups": layer.groups,
    }


def _lower_norm(ctx: Context, name: str, norm: PrecisionBatchNorm, x: Real) -> Real:
    if ctx.folded.get(norm.owner) is norm:
        return x
    if x.kind == "input":
        raise LowerError(
            f"lower: normalization {name!r} reads the network's input; normalise the data, or give mean and std as "
            "Pixels"
        )
    source = ctx.builder.fixed(x, f"normalization {name!r}") if x.clipped else x
    ctx.standalone[name] = norm
    return Real(source.base, source.kind, source.shape, (*source.affine, name), pooled=source.pooled)
