"""From a program and a choice of precisions to a plan: every integer constant, every bound.

Follows spec/numerics.md, whose sections the comments name. What `derive` returns is proved not to overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from . import attrs, intervals
from .errors import ProgramError
from .graph import ValueInfo, check_readers, code_readers, validate
from .intervals import INT32_MAX, Bounds, align
from .plan import Add, Clip, Conv, Flatten, MaxPool, Op, Pad, Plan, Requant, Slice, SumPool, Value
from .program import Layer, Node, Program
from .tables import MIN_STEP, check_map

if TYPE_CHECKING:
    from numpy.typing import NDArray

Precision = int | str | Mapping[str, int]  # of all layers | name of a plan | of each layer


def resolve_map(program: Program, precision: Precision) -> dict[str, int]:
    """The per-layer precision map that `precision` stands for, complete and in the order of `program.layers`.

    Raises ProgramError for an unknown precision, plan or layer, and for a map that leaves a layer out.
    """
    if isinstance(precision, Mapping):
        return check_map(program.layers, program.precisions, precision, "precision map")
    if isinstance(precision, str):
        if precision not in program.plans:
            raise ProgramError(f"precision: no plan {precision!r}; there are {sorted(program.plans)}")
        return check_map(program.layers, program.precisions, program.plans[precision], f"plan {precision!r}")
    if type(precision) is not int or precision not in program.precisions:
        raise ProgramError(
            f"precision: there is no {precision!r}; there are {program.precisions} and plans {sorted(program.plans)}"
        )
    return dict.fromkeys(program.layers, precision)


def derive(program: Program, precision: Precision) -> Plan:
    """The plan of `program` at a precision, at a per-layer map (layer -> precision) or at a named plan.

    Raises ProgramError if the program is malformed, if it does not hold the weights or factors that the precision
    needs, or if an accumulator or a constant would not fit ("accumulator overflow", ...).
    """
    infos = validate(program)
    chosen = resolve_map(program, precision)
    check_readers(program, code_readers(program, infos), chosen)
    derivation = _Derivation(_Chosen(program, chosen, precision if isinstance(precision, str) else None), infos)
    for node in program.nodes:
        derivation.add_node(node)
    return derivation.plan()


def headroom(program: Program, precision: Precision) -> dict[str, float]:
    """Section 2: bits between each layer's largest possible accumulator and overflow; 31 where it is always 0."""
    return plan_headroom(derive(program, precision))


def plan_headroom(plan: Plan) -> dict[str, float]:
    """`headroom` of a plan already derived."""
    result: dict[str, float] = {}
    for op in plan.ops:
        if isinstance(op, Conv):
            value = plan.values[op.output]
            bits = 31 - math.log2(max(abs(value.lo), abs(value.hi), 1))
            result[op.layer] = min(bits, result.get(op.layer, bits))
    return result


@dataclass(frozen=True)
class _Chosen:
    """A program's tables at the precisions of one map."""

    program: Program
    map: Mapping[str, int]
    plan: str | None

    def _factors_key(self, layer: str) -> str:
        key = str(self.map[layer])
        if key not in self.program.factors:
            raise ProgramError(f"layer {layer!r}: the factors of precision {key} are not held")
        return key

    def affine(self, name: str) -> NDArray[np.float64]:
        if self.plan is not None:
            if self.plan not in self.program.factors:
                raise ProgramError(f"plan {self.plan!r}: its factors are not held")
            if name in self.program.factors[self.plan].affine:
                return self.program.factors[self.plan].affine[name]
        owner = self.program.affines[name].owner
        return self.program.factors[self._factors_key(owner)].affine[name]

    def step(self, layer: str) -> float:
        return float(self.program.factors[self._factors_key(layer)].step[layer])

    def input_range(self, layer: str) -> tuple[int, int]:
        low, high = self.program.layers[layer].input_range[self.map[layer]]
        return low, high

    def input_offset(self, layer: str) -> tuple[float, ...]:
        return tuple(float(value) for value in self.program.layers[layer].input_offset[self.map[layer]])

    def pad_code(self, layer: str) -> NDArray[np.int32]:
        return np.asarray(self.program.layers[layer].pad_code[self.map[layer]], np.int32)

    def codes(self, layer: Layer) -> NDArray[np.int8]:
        """Section 1: the weight codes at the layer's width."""
        held, bits = self.program.weights[layer.name], layer.weight_bits[self.map[layer.name]]
        if bits > held.bits:
            raise ProgramError(
                f"layer {layer.name!r}: precision {self.map[layer.name]} needs {bits} bits of its weight codes, "
                f"{held.bits} are held"
            )
        return held.codes if bits == held.bits else held.codes >> np.int8(held.bits - bits)

    def line(self, names: tuple[str, ...], scale: float | None, channels: int) -> tuple[NDArray[np.float64], ...]:
        """Section 3: (a, b) of y = a*x + b for an input of scale `scale` after the affines `names`."""
        a, b = np.full(channels, 1.0 if scale is None else scale), np.zeros(channels)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows has no constants, and fails there
            for name in names:
                gain, shift = self.affine(name)
                a, b = gain * a, gain * b + shift
        return a, b


@dataclass
class _Derivation:
    """The plan as far as it is built, with the per-channel bounds that later nodes need."""

    chosen: _Chosen
    infos: Mapping[str, ValueInfo]
    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    index: dict[str, int] = field(default_factory=dict)
    bounds: list[Bounds] = field(default_factory=list)

    def plan(self) -> Plan:
        program = self.chosen.program
        entry = next(node.name for node in program.nodes if node.op == "input")
        layer = program.layers[self.infos[entry].layer or ""]
        offset, step = self.chosen.input_offset(layer.name), self.chosen.step(layer.name)
        ends = self.index[entry], self.index[program.output]
        return Plan(tuple(self.values), tuple(self.ops), *ends, step, offset)

    def add_node(self, node: Node) -> None:
        _DERIVE[node.op](self, node)

    def source(self, node: Node, which: int = 0) -> tuple[Value, Bounds]:
        index = self.index[node.inputs[which]]
        return self.values[index], self.bounds[index]

    def head(self, node: Node) -> tuple[str, tuple[int, ...], int]:
        """Name, inputs and output of the operation that `store` is called for next."""
        return node.name, tuple(self.index[name] for name in node.inputs), len(self.values)

    def store(self, node: Node, bounds: Bounds, dtype: str, scale: float | None, op: Op | None) -> None:
        channels, height, width = self.infos[node.name].shape
        low, high = int(bounds[0].min()), int(bounds[1].max())
        self.index[node.name] = len(self.values)
        self.values.append(Value(node.name, (height, width, channels), dtype, low, high, scale))
        self.bounds.append(bounds)
        if op is not None:
            self.ops.append(op)


def _dtype(code_range: tuple[int, int]) -> str:
    return "u8" if code_range[0] >= 0 else "s8"


def _where(node: Node) -> str:
    return f"node {node.name!r} ({node.op})"


def _input(state: _Derivation, node: Node) -> None:
    info = state.infos[node.name]
    low, high = state.chosen.input_range(info.layer or "")
    state.store(node, intervals.constant(low, high, info.shape[0]), _dtype((low, high)), None, None)


def _conv(state: _Derivation, node: Node) -> None:
    layer, (source, bounds) = state.chosen.program.layers[node.attrs["layer"]], state.source(node)
    codes, (mul, add) = state.chosen.codes(layer), layer.integer_form[state.chosen.map[layer.name]]
    pads, groups = attrs.padding(node), node.attrs["groups"]
    pad_code = np.broadcast_to(state.chosen.pad_code(layer.name), source.shape[2:]).copy()
    result = intervals.conv(codes, mul, add, groups, intervals.join(bounds, pad_code) if any(pads) else bounds)
    magnitude = intervals.largest(result)
    if int(magnitude.max()) > INT32_MAX:
        channel = int(magnitude.argmax())
        raise ProgramError(
            f"{_where(node)}: accumulator overflow: layer {layer.name!r} at precision "
            f"{state.chosen.map[layer.name]} can reach [{result[0][channel]}, {result[1][channel]}] in output channel "
            f"{channel}, beyond 32 bits"
        )
    stride, dilation = attrs.extents(node, "stride"), attrs.extents(node, "dilation")
    op = Conv(*state.head(node), layer.name, codes, mul, add, stride, pads, dilation, groups, pad_code)
    state.store(node, result, "i32", None, op)


def _requant(state: _Derivation, node: Node) -> None:
    (source, _), to = state.source(node), node.attrs["to"]
    step, code_range = state.chosen.step(to), state.chosen.input_range(to)
    (offset,) = state.chosen.input_offset(to)  # validation has made sure that it is one
    a, b = state.chosen.line(attrs.affine_names(node), source.scale, source.shape[2])
    clamp = intervals.code_clamp(attrs.clip_bounds(node), step, offset, code_range)
    _store_requant(state, node, (a, b, step, offset), clamp, (_dtype(code_range), None))


def _rescale(state: _Derivation, node: Node) -> None:
    source, (low, high) = state.source(node)
    a, b = state.chosen.line(attrs.affine_names(node), source.scale, source.shape[2])
    clip = attrs.clip_bounds(node)
    with np.errstate(over="ignore", invalid="ignore"):
        ends = np.stack([a * low + b, a * high + b])
    if clip != (None, None):
        ends = np.clip(ends, *clip)
    # Besides the values, the gains must fit: clipping can leave a channel far narrower than a unit of its input.
    bound = float(max(np.abs(ends).max(), np.abs(a).max()))
    unit = math.ldexp(1.0, -intervals.fraction_bits(bound, _where(node)))
    clamp = intervals.clamp_range(clip, unit, -INT32_MAX, INT32_MAX, _where(node))
    _store_requant(state, node, (a, b, unit, 0.0), clamp, ("i32", unit))


def _store_requant(
    state: _Derivation,
    node: Node,
    line: tuple[NDArray[np.float64], NDArray[np.float64], float, float],
    clamp: tuple[int, int],
    result: tuple[str, float | None],
) -> None:
    """Section 3, common to requant and rescale: line = (a, b, target step, target offset), result = (dtype, scale)."""
    (_, bounds), (a, b, step, z) = state.source(node), line
    with np.errstate(over="ignore", invalid="ignore"):
        scale, offset = a / step, b / step - z
    constants = intervals.requant_constants(scale, offset, intervals.largest(bounds), _where(node))
    op = Requant(*state.head(node), constants.multiplier, constants.bias, constants.shift, *clamp)
    state.store(node, constants.image(bounds, *clamp), *result, op)


def _exponent(value: Value) -> int:
    """f of a scale 2^-f; validation has made sure that it is a power of two."""
    return 1 - math.frexp(value.scale or 1.0)[1]


def _add(state: _Derivation, node: Node) -> None:
    """Section 4: bring both inputs to one power-of-two scale, the finest that the sum's bound allows."""
    inputs = [state.source(node, which) for which in (0, 1)]
    places = [_exponent(value) for value, _ in inputs]
    real = [intervals.largest(bounds) * (value.scale or 1.0) for value, bounds in inputs]
    f = min(max(places), intervals.fraction_bits(float((real[0] + real[1]).max()), _where(node)))
    shifts = [place - f for place in places]
    if f < 0 or max(map(abs, shifts)) > 62:
        raise ProgramError(f"{_where(node)}: scales 2^-{places[0]} and 2^-{places[1]} cannot be brought to one scale")
    (low_a, high_a), (low_b, high_b) = (
        [align(end, shift) for end in bounds] for (_, bounds), shift in zip(inputs, shifts, strict=True)
    )
    bounds = (low_a + low_b, high_a + high_b)
    state.store(node, bounds, "i32", math.ldexp(1.0, -f), Add(*state.head(node), *shifts))


def _clip(state: _Derivation, node: Node) -> None:
    source, bounds = state.source(node)
    unit = source.scale or 1.0
    low, high = intervals.clamp_range(attrs.clip_bounds(node), unit, -INT32_MAX - 1, INT32_MAX, _where(node))
    result = (np.clip(bounds[0], low, high), np.clip(bounds[1], low, high))
    state.store(node, result, "i32", source.scale, Clip(*state.head(node), low, high))


def _maxpool(state: _Derivation, node: Node) -> None:
    source, bounds = state.source(node)
    kernel, stride = attrs.extents(node, "kernel"), attrs.extents(node, "stride")
    op = MaxPool(*state.head(node), kernel, stride, attrs.padding(node))
    state.store(node, bounds, source.dtype, source.scale, op)


def _avgpool(state: _Derivation, node: Node) -> None:
    source, bounds = state.source(node)
    kernel, stride, pads = attrs.extents(node, "kernel"), attrs.extents(node, "stride"), attrs.padding(node)
    window = kernel[0] * kernel[1]
    low, high = (end * window for end in (intervals.join(bounds, 0) if any(pads) else bounds))
    if state.infos[node.name].kind == "code":
        _check_code_sums(node, source.dtype, low, high)
        state.store(node, (low, high), source.dtype, None, SumPool(*state.head(node), kernel, stride, pads, 0))
        return
    shift = next(t for t in range(64) if align(low, t).min() >= -INT32_MAX and align(high, t).max() <= INT32_MAX)
    scale = math.ldexp(source.scale or 1.0, shift) / window
    if scale < MIN_STEP:
        raise ProgramError(f"{_where(node)}: the scale of the result, {scale!r}, is below {MIN_STEP}")
    op = SumPool(*state.head(node), kernel, stride, pads, shift)
    state.store(node, (align(low, shift), align(high, shift)), "i32", scale, op)


def _check_code_sums(node: Node, dtype: str, low: NDArray[np.int64], high: NDArray[np.int64]) -> None:
    """Section 4: sums of codes stay in the codes' own 8 bits."""
    least, most = (0, 255) if dtype == "u8" else (-128, 127)
    if low.min() < least or high.max() > most:
        raise ProgramError(
            f"{_where(node)}: sums of codes can reach [{int(low.min())}, {int(high.max())}], beyond the range "
            f"[{least}, {most}] of {dtype}; pool fixed point instead, or fewer codes"
        )


def _slice(state: _Derivation, node: Node) -> None:
    source, (low, high) = state.source(node)
    height, width, channels = source.shape
    c = attrs.slice_bounds(node, "c", channels)
    op = Slice(*state.head(node), attrs.slice_bounds(node, "h", height), attrs.slice_bounds(node, "w", width), c)
    state.store(node, (low[slice(*c)], high[slice(*c)]), source.dtype, source.scale, op)


def _pad(state: _Derivation, node: Node) -> None:
    source, bounds = state.source(node)
    h, w, c = (attrs.margins(node, key) for key in "hwc")
    low, high = (np.pad(end, c) for end in intervals.join(bounds, 0))
    state.store(node, (low, high), source.dtype, source.scale, Pad(*state.head(node), h, w, c))


def _flatten(state: _Derivation, node: Node) -> None:
    source, bounds = state.source(node)
    low, high = (np.repeat(end, source.shape[0] * source.shape[1]) for end in bounds)
    state.store(node, (low, high), source.dtype, source.scale, Flatten(*state.head(node)))


_DERIVE: dict[str, Callable[[_Derivation, Node], None]] = {
    "input": _input,
    "conv": _conv,
    "requant": _requant,
    "rescale": _rescale,
    "add": _add,
    "clip": _clip,
    "maxpool": _maxpool,
    "avgpool": _avgpool,
    "slice": _slice,
    "pad": _pad,
    "flatten": _flatten,
}
