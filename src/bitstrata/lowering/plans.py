"""Plans: per-layer precision maps with batch-normalization statistics of their own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from bitstrata_runtime.derive import resolve_map
from bitstrata_runtime.graph import validate
from bitstrata_runtime.layout import factors_file
from bitstrata_runtime.program import Factors, Program
from bitstrata_runtime.source import check_name

from ..nn.norm import PrecisionBatchNorm
from ..prepare.calibrate import average_statistics_, input_of
from ..prepare.precision import precision, quantized_layers, set_precision
from .assemble import prove
from .errors import LowerError
from .factors import program_factors
from .trace import double_copy


def add_plan(
    program: Program, model: nn.Module, name: str, precision_map: Mapping[str, int], batches: Iterable[Any]
) -> Program:
    """A program with one more plan: a per-layer precision map whose normalizations are fitted to it.

    A layer's normalization was trained behind layers at its own precision. Under a map that mixes precisions its inputs
    are distributed otherwise, so its running mean and variance are estimated anew on `batches` with every layer at its
    precision of the map. The plan stores the affines that follow, for every layer with batch normalization; weights and
    steps are those of the precisions.

    Args:
        program: lowered from `model`; unchanged.
        model: unchanged; the statistics are estimated on a copy, in the model's dtype and on its device.
        name: of the plan; part of a file name: characters a-z 0-9 . _ -, not a number.
        precision_map: layer -> precision, for every layer of the program.
        batches: inputs as the model takes them, or (input, ...) tuples.

    Raises:
        LowerError: a name that is taken or not allowed, an incomplete map, no batches, a model that is not the
            program's, or accumulators or constants that do not fit under the map.
    """
    if name in program.plans:
        raise LowerError(f"add_plan: the program has a plan {name!r} already")
    try:
        check_name(factors_file(name))
        chosen = resolve_map(program, precision_map)
        planned = dataclasses.replace(program, plans={**program.plans, name: chosen})
        validate(planned)
    except ValueError as error:
        raise LowerError(f"add_plan: plan {name!r}: {error}") from error
    fitted = double_copy(reestimated(model, chosen, batches))
    _check_model(program, double_copy(model), chosen)
    folded, standalone = _norms(program, fitted)
    affines = _factors(program, fitted).affine
    kept = {key: affines[key] for key in program.affines if key in folded or key in standalone}
    planned = dataclasses.replace(planned, factors={**program.factors, name: Factors(kept)})
    prove(planned, (name,))
    return planned


def _norms(program: Program, model: nn.Module) -> tuple[dict[str, PrecisionBatchNorm], dict[str, PrecisionBatchNorm]]:
    """Layer -> normalization folded into its affine, and affine -> normalization that is one of its own."""
    norms = {
        key: norm
        for key, norm in model.named_modules()
        if isinstance(norm, PrecisionBatchNorm) and norm.owner in program.layers
    }
    standalone = {key: norm for key, norm in norms.items() if key in program.affines}
    return {norm.owner: norm for key, norm in norms.items() if key not in standalone}, standalone


def _factors(program: Program, model: nn.Module) -> Factors:
    """Factors of the program's layers at the model's present precisions."""
    layers = quantized_layers(model)
    return program_factors({key: layers[key] for key in program.layers}, *_norms(program, model))


def _check_model(program: Program, model: nn.Module, chosen: Mapping[str, int]) -> None:
    """LowerError unless the model gives the factors that the program has: weights may not have moved since."""
    for p in sorted(set(chosen.values())):
        with precision(model, dict.fromkeys(program.layers, p)):
            affines = _factors(program, model).affine
        for key, held in program.factors[str(p)].affine.items() if str(p) in program.factors else ():
            if not np.allclose(affines[key], held, rtol=1e-9, atol=0):
                raise LowerError(
                    f"add_plan: the model is not the one the program was lowered from: its affine {key!r} at precision "
                    f"{p} is another"
                )


def reestimated(model: nn.Module, precision_map: Mapping[str, int], batches: Iterable[Any]) -> nn.Module:
    """A copy of the model at `precision_map` whose batch normalizations have the statistics of `batches` under it.

    Args:
        model: quantized and calibrated; unchanged.
        precision_map: layer -> precision; other layers keep theirs.
        batches: inputs as the model takes them, or (input, ...) tuples; every batch counts alike.

    Raises:
        LowerError: no batches, or a map the model cannot take.
    """
    data = [input_of(batch) for batch in batches]
    if not data:
        raise LowerError("add_plan: no batches given to estimate the normalizations' statistics on")
    twin = copy.deepcopy(model)
    try:
        set_precision(twin, precision_map)
    except ValueError as error:
        raise LowerError(f"add_plan: {error}") from error
    average_statistics_(twin, data)
    return twin
