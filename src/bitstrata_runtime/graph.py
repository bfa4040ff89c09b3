"""Shape and kind inference over a program's graph, which is also the check of everything a node can get wrong.

A program may come from an artifact that somebody else made, so nothing is taken on trust: derivation starts with
`validate`, and what passes it stays within the size limits below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from .attrs import (
    MAX_ELEMENTS,
    affine_names,
    clip_bounds,
    extents,
    integer,
    margins,
    node_error,
    padding,
    slice_bounds,
)
from .errors import ProgramError
from .program import Layer, Node, Program
from .tables import MAX_CHANNELS, check_tables

MAX_MACS = 1 << 40  # of the whole program, an image

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class ValueInfo:
    """What is known of a value without its numbers. `shape` is (C, H, W)."""

    shape: Shape
    kind: str  # "code" | "acc" | "fixed"
    layer: str | None = None  # code: the layer whose input grid it is on; acc: the layer that made it
    origin: str = ""  # code: the input or requant node that made the codes, seen through slices and poolings
    aligned: bool = True  # fixed: the scale is a power of two


def validate(program: Program) -> dict[str, ValueInfo]:
    """Check the whole program; return shape and kind of every value, by node name.

    Raises ProgramError that names the node or layer, the attribute, its value and the cause.
    """
    check_tables(program)
    infos: dict[str, ValueInfo] = {}
    macs = 0
    for node in program.nodes:
        rule = _check_form(node, infos)
        sources = tuple(infos[name] for name in node.inputs)
        info = rule.infer(program, node, sources)
        if info.shape[0] > MAX_CHANNELS or math.prod(info.shape) > MAX_ELEMENTS:
            raise node_error(
                node, f"result of shape {info.shape} exceeds {MAX_CHANNELS} channels or {MAX_ELEMENTS} elements"
            )
        if node.op == "conv":
            macs += math.prod(info.shape) * math.prod(program.layers[node.attrs["layer"]].shape[1:])
        infos[node.name] = info
    if macs > MAX_MACS:
        raise ProgramError(f"program: {macs} multiply-accumulates an image exceed the limit of {MAX_MACS}")
    return _check_ends(program, infos)


def code_readers(program: Program, infos: Mapping[str, ValueInfo]) -> dict[str, list[str]]:
    """Node that makes codes -> layers that take part in their grid; the first one gives the step."""
    readers: dict[str, list[str]] = {}
    for node in program.nodes:
        if node.op == "requant":
            readers[node.name] = [node.attrs["to"]]
        elif node.op == "conv":
            readers.setdefault(infos[node.inputs[0]].origin, []).append(node.attrs["layer"])
    return readers


def check_readers(program: Program, readers: Mapping[str, list[str]], chosen: Mapping[str, int]) -> None:
    """Layers that read the same codes must mean the same by them: equal ranges and offsets at precisions `chosen`."""
    for origin, names in readers.items():
        first, p = names[0], chosen[names[0]]
        for name, q in ((name, chosen[name]) for name in names[1:]):
            for table in ("input_range", "input_offset"):
                want, have = (tuple(getattr(program.layers[n], table)[at]) for n, at in ((first, p), (name, q)))
                if not (_same_offsets(want, have) if table == "input_offset" else want == have):
                    raise ProgramError(
                        f"node {origin!r}: layers {first!r} (precision {p}) and {name!r} (precision {q}) share its "
                        f"codes, but their {table} differ: {want} and {have}"
                    )


def _same_offsets(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two offsets, each one for all channels or one a channel, are the same."""
    return a == b or (1 in (len(a), len(b)) and len({*a, *b}) == 1)


def _check_ends(program: Program, infos: dict[str, ValueInfo]) -> dict[str, ValueInfo]:
    """Check the input and the output; return the infos with the reading layer of the input's codes filled in."""
    entries = [node.name for node in program.nodes if node.op == "input"]
    if len(entries) != 1:
        raise ProgramError(f"program: must have exactly one 'input' node, has {len(entries)}: {entries}")
    readers = code_readers(program, infos)
    first_layers = readers.get(entries[0], [])
    if not first_layers:
        raise ProgramError(f"node {entries[0]!r} (input): no conv reads it, so its codes have no grid")
    if program.output not in infos:
        raise ProgramError(f"program: output {program.output!r} is not the name of a node")
    if infos[program.output].kind != "fixed":
        raise ProgramError(
            f"program: output {program.output!r} is of kind {infos[program.output].kind!r}, must be 'fixed'"
        )
    for name in first_layers:
        _check_first_layer(program, program.layers[name])
    for origin, names in readers.items():
        if origin != entries[0]:
            for name in names:
                _check_inner_offset(origin, program.layers[name])
    _check_padded_sums(program, infos, readers)
    for precision in program.precisions:
        check_readers(program, readers, dict.fromkeys(program.layers, precision))
    return {
        name: replace(info, layer=readers[info.origin][0]) if info.kind == "code" and info.origin in readers else info
        for name, info in infos.items()
    }


def _check_first_layer(program: Program, layer: Layer) -> None:
    channels = program.input_shape[0]
    for precision, offsets in layer.input_offset.items():
        if len(offsets) not in (1, channels):
            raise ProgramError(
                f"layer {layer.name!r}: input_offset[{precision}] has {len(offsets)} entries, the network's input that "
                f"it reads {channels} channels; give one entry, or one a channel"
            )
    for precision, bounds in layer.input_range.items():
        if program.input_kind == "pixels" and tuple(bounds) != (0, 255):
            raise ProgramError(
                f"layer {layer.name!r}: input_range[{precision}] = {tuple(bounds)}, but the layer reads pixels, whose "
                f"range is (0, 255)"
            )


def _check_inner_offset(origin: str, layer: Layer) -> None:
    for precision, offsets in layer.input_offset.items():
        if len(offsets) != 1:
            raise ProgramError(
                f"node {origin!r}: its codes are on the grid of layer {layer.name!r}, whose input_offset[{precision}] "
                f"has {len(offsets)} entries; only the network's input may have one a channel"
            )


def _check_padded_sums(program: Program, infos: Mapping[str, ValueInfo], readers: Mapping[str, list[str]]) -> None:
    """What a pooling of codes adds outside the map is the code 0, which must mean the value 0."""
    for node in program.nodes:
        info = infos[node.name]
        if node.op != "avgpool" or info.kind != "code" or not any(padding(node)):
            continue
        for name in readers.get(info.origin, []):
            for precision, offsets in program.layers[name].input_offset.items():
                if any(offsets):
                    raise node_error(
                        node,
                        f"attribute 'padding' = {padding(node)}: the codes are on the grid of layer {name!r}, whose "
                        f"input_offset[{precision}] is {offsets}, so code 0 is not the value 0; pool without padding",
                    )


# Rules: how many inputs of which kinds an operation takes, its attributes, and the result's shape and kind.

Infer = Callable[[Program, Node, tuple[ValueInfo, ...]], ValueInfo]


@dataclass(frozen=True)
class _Rule:
    infer: Infer
    inputs: tuple[tuple[str, ...], ...]  # the kinds allowed, an input
    attrs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def _check_form(node: Node, infos: Mapping[str, ValueInfo]) -> _Rule:
    """Name, operation, attribute keys and inputs of a node, before anything is inferred from them."""
    if not isinstance(node.name, str) or not node.name:
        raise ProgramError(f"program: node name {node.name!r} is not a non-empty string")
    if node.name in infos:
        raise node_error(node, "another node has the same name")
    rule = _RULES.get(node.op) if isinstance(node.op, str) else None
    if rule is None:
        raise node_error(node, f"unknown operation; known are {', '.join(_RULES)}")
    missing = [key for key in rule.attrs if key not in node.attrs]
    unknown = [key for key in node.attrs if key not in rule.attrs + rule.optional]
    if missing or unknown:
        raise node_error(node, f"attributes missing: {missing}, unknown: {unknown}")
    if len(node.inputs) != len(rule.inputs):
        raise node_error(node, f"takes {len(rule.inputs)} inputs, has {len(node.inputs)}: {list(node.inputs)}")
    for name, kinds in zip(node.inputs, rule.inputs, strict=True):
        if not isinstance(name, str) or name not in infos:
            raise node_error(node, f"input {name!r} is not the name of an earlier node")
        if infos[name].kind not in kinds:
            raise node_error(node, f"input {name!r} is of kind {infos[name].kind!r}, must be {' or '.join(kinds)}")
    return rule


def _layer(program: Program, node: Node, key: str) -> Layer:
    name = node.attrs[key]
    if not isinstance(name, str) or name not in program.layers:
        raise node_error(node, f"attribute {key!r} = {name!r}: no such layer")
    return program.layers[name]


def _windows(node: Node, shape: Shape, kernel: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """Height and width of what sliding a window over the padded map gives."""
    stride, (top, bottom, left, right) = extents(node, "stride"), padding(node)
    channels, height, width = shape
    padded = (height + top + bottom, width + left + right)
    if channels * padded[0] * padded[1] > MAX_ELEMENTS:
        raise node_error(node, f"the padded map {(channels, *padded)} exceeds {MAX_ELEMENTS} elements")
    span = (dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1)
    if span[0] > padded[0] or span[1] > padded[1]:
        raise node_error(
            node,
            f"a window of {span[0]} x {span[1]} (kernel {kernel}, dilation {dilation}) is larger than the padded map "
            f"of {padded[0]} x {padded[1]} (input {shape}, padding {(top, bottom, left, right)})",
        )
    return (padded[0] - span[0]) // stride[0] + 1, (padded[1] - span[1]) // stride[1] + 1


def _input(program: Program, node: Node, sources: tuple[ValueInfo, ...]) -> ValueInfo:
    return ValueInfo(program.input_shape, "code", origin=node.name)


def _conv(program: Program, node: Node, sources: tuple[ValueInfo, ...]) -> ValueInfo:
    layer, source = _layer(program, node, "layer"), sources[0]
    groups = integer(node, "groups", 1, MAX_CHANNELS)
    out, per_group, kernel_h, kernel_w = layer.shape
    channels = source.shape[0]
    if per_group * groups != channels or out % groups:
        raise node_error(
            node,
            f"layer {layer.name!r} of shape {tuple(layer.shape)} with groups = {groups} takes {per_group * groups} "
            f"input channels, and groups must divide its {out} output channels; the input has {channels} channels",
        )
    for precision, codes in layer.pad_code.items():
        if len(codes) not in (1, channels):
            raise node_error(
                node,
                f"layer {layer.name!r}: pad_code[{precision}] has {len(codes)} entries, the input {channels} channels",
            )
    size = _windows(node, source.shape, (kernel_h, kernel_w), extents(node, "dilation"))
    return ValueInfo((out, *size), "acc", layer=layer.name)


def _check_affines(program: Program, node: Node, source: ValueInfo) -> None:
    names = affine_names(node)
    for name in names:
        if name not in program.affines:
            raise node_error(node, f"attribute 'affine': no affine {name!r}")
        channels = program.affines[name].channels
        if channels != source.shape[0]:
            raise node_error(node, f"affine {name!r} has {channels} channels, the input {source.shape[0]}")
    if source.kind == "acc" and (not names or program.affines[names[0]].owner != source.layer):
        raise node_error(
            node,
            f"attribute 'affine' = {list(names)}: the input is an accumulator of layer {source.layer!r}, so the first "
            f"affine must be owned by that layer",
        )


def _requant(program: Program, node: Node, sources: tuple[ValueInfo, ...]) -> ValueInfo:
    layer = _layer(program, node, "to")
    _check_affines(program, node, sources[0])
    clip_bounds(node)
    return ValueInfo(sources[0].shape, "code", layer=layer.name, origin=node.name)


def _rescale(program: Program, node: Node, sources: tuple[ValueInfo, ...]) -> ValueInfo:
    _check_affines(program, node, sources[0])
    clip_bounds(node)
    return ValueInfo(sources[0].shape, "fixed")


def _add(program: Program, node: Node, sources: tuple[ValueInfo, ...]) -> ValueInfo:
    first, second = sources
    if first.shape != second.shape:
        raise node_error(node, f"inputs have different shapes: {first.shape} and {second.shape}")
    for name, source in zip(node.inputs, sources, strict=True):
        if not source.aligned:
            raise node_error(
                node, f"input {name!r} was pooled with a divisor that is no power of two; rescale it before adding"
            )
    return ValueInfo(first.shape, "fixed")


def _clip(program: Program, node: Node, sources: tuple[ValueInfo, ...]) -> ValueInfo:
    clip_bounds(node)
    return sources[0]


def _maxpool(program: Program, node: Node, sources: tuple[ValueInfo, ...]) -> ValueInfo:
    kernel, (top, bottom, left, right) = extents(node, "kernel"), padding(node)
    if max(top, bottom) >= kernel[0] or max(left, right) >= kernel[1]:
        raise node_error(
            node,
            f"attribute 'padding' = {(top, bottom, left, right)} reaches the kernel's size {kernel}: a window could "
            f"lie outside the map, where there is no maximum",
        )
    return replace(sources[0], shape=(sources[0].shape[0], *_windows(node, sources[0].shape, kernel)))


def _avgpool(program: Program, node: Node, sources: tuple[ValueInfo, ...]) -> ValueInfo:
    kernel = extents(node, "kernel")
    size = _windows(node, sources[0].shape, kernel)
    divisor = kernel[0] * kernel[1]
    aligned = sources[0].aligned and divisor & (divisor - 1) == 0
    return replace(sources[0], shape=(sources[0].shape[0], *size), aligned=aligned)


def _slice(program: Program, node: Node, sources: tuple[ValueInfo, ...]) -> ValueInfo:
    axes = zip("chw", sources[0].shape, strict=True)
    channels, height, width = (len(range(*slice_bounds(node, key, size))) for key, size in axes)
    return replace(sources[0], shape=(channels, height, width))


def _pad(program: Program, node: Node, sources: tuple[ValueInfo, ...]) -> ValueInfo:
    axes = zip("chw", sources[0].shape, strict=True)
    channels, height, width = (size + sum(margins(node, key)) for key, size in axes)
    return replace(sources[0], shape=(channels, height, width))


def _flatten(program: Program, node: Node, sources: tuple[ValueInfo, ...]) -> ValueInfo:
    return replace(sources[0], shape=(math.prod(sources[0].shape), 1, 1))


_CODE, _FIXED, _REAL, _HELD = ("code",), ("fixed",), ("acc", "fixed"), ("fixed", "code")

_RULES: dict[str, _Rule] = {
    "input": _Rule(_input, ()),
    "conv": _Rule(_conv, (_CODE,), ("layer", "stride", "padding", "dilation", "groups")),
    "requant": _Rule(_requant, (_REAL,), ("to", "affine"), ("clip",)),
    "rescale": _Rule(_rescale, (_REAL,), ("affine",), ("clip",)),
    "add": _Rule(_add, (_FIXED, _FIXED)),
    "clip": _Rule(_clip, (_FIXED,), ("clip",)),
    "maxpool": _Rule(_maxpool, (_HELD,), ("kernel", "stride", "padding")),
    "avgpool": _Rule(_avgpool, (_HELD,), ("kernel", "stride", "padding")),
    "slice": _Rule(_slice, (_HELD,), ("c", "h", "w")),
    "pad": _Rule(_pad, (_FIXED,), ("c", "h", "w")),
    "flatten": _Rule(_flatten, (_HELD,)),
}
