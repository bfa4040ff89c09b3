"""verify: the fake-quantized model, the reference executor and the engine, compared layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitstrata_runtime import available_isas
from bitstrata_runtime.plan import Plan
from bitstrata_runtime.program import Program
from bitstrata_runtime.session import Session

from .lowering.trace import double_copy
from .nn.layers import QuantizedLayer
from .prepare.precision import precision, quantized_layers
from .quantizers.base import Quantizer
from .quantizers.pixels import PixelInput


@dataclass(frozen=True)
class VerifyRow:
    """One layer's input at one precision.

    differing: codes in which program and fake-quantized model differ, of `codes`; `distance`: the largest distance of such a code's
    real value to the threshold that separates the two codes, in code steps; `tolerance`: what fixed-point rounding upstream explains.
    """

    precision: int
    layer: str
    codes: int
    differing: int
    distance: float
    tolerance: float

    @property
    def explained(self) -> bool:
        return self.distance <= self.tolerance


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    rows: layers in execution order, precision by precision. mismatches: (precision, instruction set, value, integers
    that differ, largest difference) between engine and reference. logit_error: precision -> largest difference of logits, each layer fed the
    program's codes. top1_agreement: precision -> share of inputs classified alike when the fake model (float64) runs on its own.
    """

    images: int
    rows: tuple[VerifyRow, ...]
    mismatches: tuple[tuple[int, str, str, int, int], ...]
    isas: tuple[str, ...]
    logit_error: dict[int, float]
    top1_agreement: dict[int, float]

    @property
    def ok(self) -> bool:
        """Engine equals reference everywhere, and every differing code is explained by rounding at its threshold."""
        return not self.mismatches and all(row.explained for row in self.rows)

    @property
    def first_difference(self) -> str:
        """The first layer at which something differs, and by how much; or "none"."""
        if self.mismatches:
            p, isa, value, count, largest = self.mismatches[0]
            return f"engine ({isa}) and reference differ at precision {p} in {value!r}: {count} integers, by up to {largest}"
        bad = next((row for row in self.rows if not row.explained), None)
        if bad is not None:
            return (
                f"program and model differ at precision {bad.precision} in the input of {bad.layer!r}: {bad.differing} of "
                f"{bad.codes} codes, up to {bad.distance:.3g} code steps from the threshold (rounding explains {bad.tolerance:.3g})"
            )
        near = next((row for row in self.rows if row.differing), None)
        if near is None:
            return "none"
        return (
            f"none beyond rounding; first at precision {near.precision} in the input of {near.layer!r}: {near.differing} of "
            f"{near.codes} codes, at most {near.distance:.3g} code steps from their threshold"
        )

    def __str__(self) -> str:
        lines = [f"verified {self.images} inputs; engine: {', '.join(self.isas) or 'not built'}"]
        for p, error in self.logit_error.items():
            mine = [row for row in self.rows if row.precision == p]
            total, differing = sum(r.codes for r in mine), sum(r.differing for r in mine)
            worst = max((r.distance for r in mine), default=0.0)
            wrong = sum(1 for m in self.mismatches if m[0] == p)
            lines.append(
                f"precision {p}: {differing} of {total:,} codes differ from the model (largest distance {worst:.2g} steps), "
                f"logits within {error:.2g}, same class {self.top1_agreement[p]:.2%}, engine values unequal to reference: {wrong}"
            )
        lines.append(f"first difference: {self.first_difference}")
        return "\n".join(lines)


def verify(
    model: nn.Module, program: Program, data: Tensor | NDArray[Any], *, isas: Sequence[str] | None = None
) -> VerifyReport:
    """Compare model, reference executor and engine on `data`, layer by layer, at every precision.

    The model is evaluated in float64 and each layer is fed the program's own input codes, so that a code that differs is
    this layer's doing and not an earlier one's. Engine and reference must agree in every integer of every value.

    Args:
        model: the quantized model that `program` was lowered from; unchanged.
        program: from `lower`, or read from an artifact with all precisions.
        data: uint8 pixels (N, C, H, W) for a program on pixels; else real inputs as the model takes them.
        isas: instruction sets of the engine to check; all available by default.

    Raises:
        ValueError: data of the wrong dtype or shape, or a layer the model does not have.
    """
    x = data.numpy() if isinstance(data, Tensor) else np.asarray(data)
    pixels = program.input_kind == "pixels"
    if pixels and x.dtype != np.uint8:
        raise ValueError(f"verify: the program reads pixels: data must be uint8 (N, C, H, W), got {x.dtype} {x.shape}")
    twin = double_copy(model)
    layers = quantized_layers(twin)
    missing = sorted(set(program.layers) - set(layers))
    if missing:
        raise ValueError(
            f"verify: the model has no quantized layer {missing[0]!r}; is it the one this program was lowered from?"
        )
    real = _normalised(twin, program, x) if pixels else torch.as_tensor(x).double()
    checked = tuple(available_isas() if isas is None else isas)
    rows: list[VerifyRow] = []
    mismatches: list[tuple[int, str, str, int, int]] = []
    errors, agreement = {}, {}
    for p in program.precisions:
        reference = Session.from_program(program, p, executor="reference")
        values = reference.run_all(x, floats=not pixels)
        for isa in checked:
            engine = Session.from_program(program, p, executor="engine", isa=isa)
            mismatches += _unequal(p, isa, values, engine.run_all(x, floats=not pixels))
        with precision(twin, p), torch.no_grad():
            own = twin(real)
            logits, found = _forced(twin, layers, program, reference.plan, values, real)
        rows += [VerifyRow(p, *row) for row in found]
        scale = reference.plan.values[reference.plan.output].scale
        ours = _as_model(values[program.output], logits).double() * float(scale or 1.0)
        errors[p] = float((ours - logits).abs().max())
        agreement[p] = float((ours.flatten(1).argmax(1) == own.flatten(1).argmax(1)).double().mean())
    return VerifyReport(len(x), tuple(rows), tuple(mismatches), checked, errors, agreement)


def _normalised(model: nn.Module, program: Program, x: NDArray[np.uint8]) -> Tensor:
    grid = next(m for m in model.modules() if isinstance(m, PixelInput))
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (grid.mean, grid.std))
    shape = (-1, 1, 1) if mean.numel() in (1, program.input_shape[0]) else program.input_shape
    return (torch.as_tensor(x).double() / 255 - mean.view(shape)) / std.view(shape)


def _unequal(
    p: int, isa: str, reference: dict[str, NDArray[Any]], engine: dict[str, NDArray[Any]]
) -> list[tuple[int, str, str, int, int]]:
    found = []
    for name, expected in reference.items():
        difference = np.abs(expected.astype(np.int64) - engine[name].astype(np.int64))
        if difference.any():
            found.append((p, isa, name, int(np.count_nonzero(difference)), int(difference.max())))
    return found


def _forced(
    model: nn.Module,
    layers: dict[str, QuantizedLayer],
    program: Program,
    plan: Plan,
    values: dict[str, NDArray[Any]],
    real: Tensor,
) -> tuple[Tensor, list[tuple[str, int, int, float, float]]]:
    """Run the model with every layer's input codes replaced by the program's; note where its own codes differ."""
    sources: dict[str, list[str]] = defaultdict(list)
    for node in program.nodes:
        if node.op == "conv":
            sources[str(node.attrs["layer"])].append(node.inputs[0])
    rounding = _rounding(program, plan)
    calls: dict[str, int] = defaultdict(int)
    rows: list[tuple[str, int, int, float, float]] = []

    def hook(name: str) -> Any:
        def replace(quantizer: Quantizer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            value = sources[name][calls[name]]
            calls[name] += 1
            ours = _as_model(values[value], output)
            theirs = quantizer.codes(args[0])
            grid = quantizer.grid(args[0]) if isinstance(quantizer, PixelInput) else quantizer.grid()
            wrong = ours != theirs
            distance = 0.0
            if wrong.any():
                position = args[0] / grid.scale - grid.offset
                border = torch.where(ours > theirs, ours - 0.5, ours + 0.5)
                distance = float((position - border)[wrong].abs().max())
            rows.append((name, ours.numel(), int(wrong.sum()), distance, rounding.get(value, 0.0)))
            return grid.dequantize(ours)

        return replace

    handles = [
        layer.act_quant.register_forward_hook(hook(name))
        for name, layer in layers.items()
        if layer.act_quant is not None and name in sources
    ]
    try:
        return model(real), rows
    finally:
        for handle in handles:
            handle.remove()


def _rounding(program: Program, plan: Plan) -> dict[str, float]:
    """Code value -> how many code steps rounding in fixed point and in the requantization constants can move it.

    Each fixed-point node upstream rounds by at most one unit of a scale no coarser than the last one's.
    """
    named = {value.name: value for value in plan.values}
    nodes = {node.name: node for node in program.nodes}
    slack = 2.0**-20  # requantization constants carry about 31 bits
    result = {}
    for node in program.nodes:
        if node.op != "requant":
            continue
        scale = named[node.inputs[0]].scale
        result[node.name] = slack
        if scale is not None:
            steps = {key: factor.step.get(str(node.attrs["to"])) for key, factor in program.factors.items()}
            step = min(s for s in steps.values() if s)
            gains = [
                np.abs(f.affine[a][0]).max()
                for f in program.factors.values()
                for a in node.attrs["affine"]
                if a in f.affine
            ]
            fixed = sum(1 for n in nodes.values() if n.op in ("rescale", "add", "clip", "avgpool"))
            result[node.name] = slack + fixed * float(scale) / step * float(max(gains, default=1.0))
    return result


def _as_model(codes: NDArray[Any], like: Tensor) -> Tensor:
    """(N, H, W, C) integers in the layout of a model tensor: (N, C, H, W), (N, C, L) or (N, C)."""
    tensor = torch.as_tensor(codes.astype(np.int32)).permute(0, 3, 1, 2)
    return tensor.reshape(like.shape)
