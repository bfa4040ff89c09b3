"""verify: the fake-quantized model, the reference executor and the engine, compared layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitstrata_runtime import available_isas
from bitstrata_runtime.derive import Precision
from bitstrata_runtime.plan import Conv, Plan, Requant
from bitstrata_runtime.program import Program
from bitstrata_runtime.session import Pass, Session

from .lowering.factors import weight_codes
from .lowering.rounding import rounding_bounds, unrounded
from .lowering.trace import double_copy
from .nn.layers import QuantizedLayer
from .prepare.precision import precision, quantized_layers
from .prepare.wrapped import unwrapped
from .quantizers.base import Quantizer
from .quantizers.pixels import PixelInput

MODEL_ROUNDING = 1e-9  # of a code step; float64 keeps 1e-16 of the largest intermediate number
Label = int | str  # a precision; a plan's name; "map" for a per-layer map


@dataclass(frozen=True)
class VerifyRow:
    """One layer's input, or the output, at one precision.

    layer: the layer that reads the codes, or "" for the output. sources: the layers whose accumulators it was computed
    from. differing: integers, of `count`, that are not the model's real number rounded. distance: how far the numbers
    of program and model are apart, at most: for codes in steps, in front of the rounding to codes; for the output in
    units of its fixed point. tolerance: how far the roundings since the sources can take them.
    """

    precision: Label
    layer: str
    sources: tuple[str, ...]
    count: int
    differing: int
    distance: float
    tolerance: float

    @property
    def explained(self) -> bool:
        """Whether rounding explains the difference: the program's, or that of the float64 model itself.

        A model that subtracts a large mean from a large bias loses digits that the folded program never had.
        """
        return self.distance <= max(self.tolerance, MODEL_ROUNDING)

    @property
    def place(self) -> str:
        """The compared value in words."""
        what = f"the input of {self.layer!r}" if self.layer else "the output"
        return what + (f", computed from {', '.join(map(repr, self.sources))}" if self.sources else "")


@dataclass(frozen=True)
class Mismatch:
    """A value whose integers differ between engine and reference. difference: the largest."""

    precision: Label
    isa: str
    value: str
    differing: int
    difference: int


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; `str()` lays it out.

    rows: inputs of layers in execution order and the output, precision by precision. mismatches: engine against
    reference. weights: (precision, layer, codes that differ from the model's). logit_error: precision -> largest
    difference of logits, each layer fed the program's codes. top1_agreement: precision -> share of inputs classified
    alike when the float64 model runs on its own.
    """

    images: int
    isas: tuple[str, ...]
    rows: tuple[VerifyRow, ...] = ()
    mismatches: tuple[Mismatch, ...] = ()
    weights: tuple[tuple[Label, str, int], ...] = ()
    logit_error: dict[Label, float] = field(default_factory=dict)
    top1_agreement: dict[Label, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Weights are the model's, the engine equals the reference, and rounding explains every other difference."""
        return not self.mismatches and not self.weights and all(row.explained for row in self.rows)

    @property
    def first_difference(self) -> str:
        """Where the first difference is, and how large; or "none"."""
        if self.weights:
            label, layer, count = self.weights[0]
            return f"program and model differ at precision {label} in {count} weight codes of {layer!r}"
        if self.mismatches:
            m = self.mismatches[0]
            return (
                f"engine ({m.isa}) and reference differ at precision {m.precision} in {m.value!r}: {m.differing} "
                f"integers, by up to {m.difference}"
            )
        bad = next((row for row in self.rows if not row.explained), None)
        if bad is not None:
            return (
                f"program and model differ at precision {bad.precision} in {bad.place}: {bad.differing} of {bad.count} "
                f"integers, by up to {bad.distance:.3g} steps before rounding (explained: {bad.tolerance:.3g})"
            )
        near = next((row for row in self.rows if row.layer and row.differing), None)
        if near is None:
            return "none"
        return (
            f"none beyond rounding; first at precision {near.precision} in {near.place}: {near.differing} of "
            f"{near.count} integers, by at most {near.distance:.3g} steps before rounding (explained: "
            f"{near.tolerance:.3g})"
        )

    def __str__(self) -> str:
        lines = [f"verified {self.images} inputs; engine: {', '.join(self.isas) or 'not built'}"]
        for label, error in self.logit_error.items():
            codes = [row for row in self.rows if row.precision == label and row.layer]
            total, differing = sum(row.count for row in codes), sum(row.differing for row in codes)
            worst = max((row.distance for row in codes), default=0.0)
            wrong = sum(1 for m in self.mismatches if m.precision == label)
            lines.append(
                f"precision {label}: {differing} of {total:,} codes differ from the model's (at most {worst:.2g} steps "
                f"before rounding), logits by at most {error:.2g}, same class {self.top1_agreement[label]:.2%}, engine "
                f"values unequal to the reference's: {wrong}"
            )
        lines.append(f"first difference: {self.first_difference}")
        return "\n".join(lines)


def verify(
    model: nn.Module,
    program: Program,
    data: Tensor | NDArray[Any],
    *,
    at: Sequence[Precision] | None = None,
    isas: Sequence[str] | None = None,
    passes: Sequence[Pass] = (),
) -> VerifyReport:
    """Compare model, reference executor and engine on `data`, layer by layer, at every precision.

    The model is evaluated in float64 and each layer is fed the program's own input codes, so that what differs is the
    doing of the layers just before and not of earlier ones. The numbers that are rounded to codes must agree up to the
    fixed-point roundings since then, so a code can differ only at a threshold. Engine and reference must
    agree in every integer of every value, weight codes with the model's in every one.

    Args:
        model: the quantized model that `program` was lowered from; unchanged.
        program: from `lower`, or read from an artifact with all precisions.
        data: uint8 pixels (N, C, H, W) for a program on pixels; else real inputs as the model takes them.
        at: precisions, plans or per-layer maps to verify; every precision by default. A plan needs the model with its
            normalizations re-estimated (`lowering.reestimated`).
        isas: instruction sets of the engine to check; all available by default.
        passes: that the engine's plans go through, as of `bitstrata_runtime.load`; the reference's does not.

    Raises:
        ValueError: data of the wrong dtype or shape, or a layer the model does not have.
    """
    x = data.detach().cpu().numpy() if isinstance(data, Tensor) else np.asarray(data)
    _check_data(program, x)
    twin = double_copy(unwrapped(model), program.precisions)
    missing = sorted(set(program.layers) - set(quantized_layers(twin)))
    if missing:
        raise ValueError(
            f"verify: the model has no quantized layer {missing[0]!r}; is it the one this program was lowered from?"
        )
    checked = tuple(available_isas() if isas is None else isas)
    choices = program.precisions if at is None else at
    findings = [_compare(twin, program, x, choice, checked, passes) for choice in choices]
    return VerifyReport(
        images=len(x),
        isas=checked,
        rows=tuple(row for f in findings for row in f.rows),
        mismatches=tuple(m for f in findings for m in f.mismatches),
        weights=tuple(w for f in findings for w in f.weights),
        logit_error={f.label: f.logit_error for f in findings},
        top1_agreement={f.label: f.top1_agreement for f in findings},
    )


def _check_data(program: Program, x: NDArray[Any]) -> None:
    pixels = program.input_kind == "pixels"
    if pixels and x.dtype != np.uint8:
        raise ValueError(f"verify: the program reads pixels: data must be uint8 (N, C, H, W), got {x.dtype} {x.shape}")
    if not pixels and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"verify: the program reads real numbers: data must be floating point, got {x.dtype} {x.shape}"
        )
    if not len(x) or x[0].size != np.prod(program.input_shape) or (pixels and x.shape[1:] != program.input_shape):
        raise ValueError(f"verify: the program takes (N, {str(program.input_shape)[1:]}, got data of shape {x.shape}")


@dataclass(frozen=True)
class _Finding:
    """The comparison at one precision."""

    label: Label
    rows: list[VerifyRow]
    mismatches: list[Mismatch]
    weights: list[tuple[Label, str, int]]
    logit_error: float
    top1_agreement: float


def _compare(  # noqa: PLR0917
    twin: nn.Module,
    program: Program,
    x: NDArray[Any],
    choice: Precision,
    isas: tuple[str, ...],
    passes: Sequence[Pass],
) -> _Finding:
    label = "map" if isinstance(choice, Mapping) else choice
    floats = program.input_kind != "pixels"
    images = x.reshape(len(x), *program.input_shape)
    reference = Session.from_program(program, choice, executor="reference")
    values = reference.run_all(images, floats=floats)
    mismatches = []
    for isa in isas:
        engine = Session.from_program(program, choice, executor="engine", isa=isa, passes=passes)
        mismatches += _unequal(label, isa, values, engine.run_all(images, floats=floats))
    real = torch.as_tensor(x).double() if floats else _normalised(twin, program, x)
    with precision(twin, reference.precision_map), torch.no_grad():
        own = twin(real)
        weights = [(label, *found) for found in _weights(twin, reference.plan)]
        rows: list[VerifyRow] = []
        with _fed(twin, program, reference.plan, values, lambda *row: rows.append(VerifyRow(label, *row))):
            theirs = twin(real)
    unit = float(reference.plan.values[reference.plan.output].scale or 1.0)
    ours = _as_model(values[program.output], theirs).double()
    distance = (ours - theirs / unit).abs()
    sources, bound = _sources(program)[program.output], rounding_bounds(reference.plan)[program.output]
    differing = int((distance > 0.5).sum())
    rows.append(VerifyRow(label, "", sources, ours.numel(), differing, float(distance.max()), bound))
    same = ours.flatten(1).argmax(1) == own.flatten(1).argmax(1)
    return _Finding(label, rows, mismatches, weights, float(distance.max()) * unit, float(same.double().mean()))


def _normalised(model: nn.Module, program: Program, x: NDArray[np.uint8]) -> Tensor:
    grid = next(m for m in model.modules() if isinstance(m, PixelInput))
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (grid.mean, grid.std))
    shape = (-1, 1, 1) if mean.numel() in (1, program.input_shape[0]) else program.input_shape
    return (torch.as_tensor(x).double() / 255 - mean.view(shape)) / std.view(shape)


def _unequal(
    label: Label, isa: str, reference: Mapping[str, NDArray[Any]], engine: Mapping[str, NDArray[Any]]
) -> list[Mismatch]:
    found = []
    for name, expected in reference.items():
        difference = np.abs(expected.astype(np.int64) - engine[name].astype(np.int64))
        if difference.any():
            found.append(Mismatch(label, isa, name, int(np.count_nonzero(difference)), int(difference.max())))
    return found


def _weights(model: nn.Module, plan: Plan) -> list[tuple[str, int]]:
    """Layers whose weight codes in the plan are not the model's, with their number."""
    layers = quantized_layers(model)
    found = {
        op.layer: int(np.count_nonzero(weight_codes(layers[op.layer]) != op.codes))
        for op in plan.ops
        if isinstance(op, Conv)
    }
    return [(layer, count) for layer, count in found.items() if count]


@contextmanager
def _fed(
    model: nn.Module,
    program: Program,
    plan: Plan,
    values: Mapping[str, NDArray[Any]],
    note: Callable[[str, tuple[str, ...], int, int, float, float], None],
) -> Iterator[None]:
    """Every layer's input codes replaced by the program's; `note` is told where the model's own codes differ."""
    read: dict[str, list[str]] = defaultdict(list)  # layer -> values it reads, in execution order
    pooled = {node.name: node.inputs[0] for node in program.nodes if node.op == "avgpool"}
    for node in program.nodes:
        if node.op == "conv":  # which may read sums of the codes that the layer's quantizer makes
            read[str(node.attrs["layer"])].append(pooled.get(node.inputs[0], node.inputs[0]))
    sources, bounds = _sources(program), rounding_bounds(plan)
    made = {plan.values[op.output].name: op for op in plan.ops if isinstance(op, Requant)}
    clips = {node.name: node.attrs.get("clip", (None, None)) for node in program.nodes if node.op == "requant"}

    def hook(layer: str) -> Any:
        waiting = iter(read[layer])

        def replace(quantizer: Quantizer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            value = next(waiting)
            ours, theirs = _as_model(values[value], output), quantizer.codes(args[0])
            grid = quantizer.grid(args[0]) if isinstance(quantizer, PixelInput) else quantizer.grid()
            difference = (ours - theirs).abs()
            if value in made:  # not the network's input, whose codes are given
                op = made[value]
                before = unrounded(op, values[plan.values[op.inputs[0]].name])
                number = args[0] / grid.scale - grid.offset
                scale, offset = float(grid.scale), float(grid.offset)
                lo, hi = (None if bound is None else bound / scale - offset for bound in clips[value])
                if (lo, hi) != (None, None):  # may fall between codes, and cuts the model's number there
                    before = np.clip(np.clip(before, lo, hi), op.lo, op.hi)
                distance = (number.clamp(op.lo, op.hi) - _as_model(before, output)).abs()
            else:
                distance = difference
            differing = int(torch.count_nonzero(difference))
            note(layer, sources[value], ours.numel(), differing, float(distance.max()), bounds[value])
            return grid.dequantize(ours)

        return replace

    layers: dict[str, QuantizedLayer] = quantized_layers(model)
    handles = [q.register_forward_hook(hook(name)) for name in read if (q := layers[name].act_quant) is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sources(program: Program) -> dict[str, tuple[str, ...]]:
    """Value -> the layers from whose accumulators it is computed without further codes in between, in order."""
    result: dict[str, tuple[str, ...]] = {}
    for node in program.nodes:  # only convolutions read codes that were made, so the walk back ends there
        if node.op == "conv":
            result[node.name] = (str(node.attrs["layer"]),)
            continue
        result[node.name] = tuple(dict.fromkeys(layer for name in node.inputs for layer in result[name]))
    return result


def _as_model(codes: NDArray[Any], like: Tensor) -> Tensor:
    """(N, H, W, C) numbers in the layout of a model tensor: (N, C, H, W), (N, C, L) or (N, C)."""
    dtype = np.float64 if codes.dtype == np.float64 else np.int32
    rows = np.ascontiguousarray(codes.transpose(0, 3, 1, 2), dtype=dtype)  # a model may view() what it is fed
    return torch.as_tensor(rows).reshape(like.shape)
