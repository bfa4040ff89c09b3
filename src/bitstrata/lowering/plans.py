"""Plans: per-layer precision maps with batch-normalization statistics of their own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from bitstrata_runtime.derive import resolve_map
from bitstrata_runtime.errors import ProgramError
from bitstrata_runtime.layout import factors_file
from bitstrata_runtime.program import Factors, Program
from bitstrata_runtime.source import check_name

from ..nn.norm import PrecisionBatchNorm
from ..prepare.calibrate import _average_statistics_, _input_of
from ..prepare.precision import quantized_layers, set_precision
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
    except ValueError as error:
        raise LowerError(f"add_plan: plan {name!r}: {error}") from error
    twin = double_copy(reestimated(model, chosen, batches))
    layers = quantized_layers(twin)
    missing = sorted(set(program.layers) - set(layers))
    if missing:
        raise LowerError(
            f"add_plan: the model has no layer {missing[0]!r}; is it the one the program was lowered from?"
        )
    norms = {
        key: m for key, m in twin.named_modules() if isinstance(m, PrecisionBatchNorm) and m.owner in program.layers
    }
    standalone = {key: norm for key, norm in norms.items() if key in program.affines}
    folded = {norm.owner: norm for key, norm in norms.items() if key not in program.affines}
    affines = program_factors({key: layers[key] for key in program.layers}, folded, standalone).affine
    fitted = {key: affines[key] for key in program.affines if key in standalone or key in folded}
    result = dataclasses.replace(
        program, plans={**program.plans, name: chosen}, factors={**program.factors, name: Factors(fitted)}
    )
    try:
        prove(result, (name,))
    except ProgramError as error:
        raise LowerError(f"add_plan: plan {name!r}: {error}") from error
    return result


def reestimated(model: nn.Module, precision_map: Mapping[str, int], batches: Iterable[Any]) -> nn.Module:
    """A copy of the model at `precision_map` whose batch normalizations have the statistics of `batches` under it.

    Args:
        model: quantized and calibrated; unchanged.
        precision_map: layer -> precision; other layers keep theirs.
        batches: inputs as the model takes them, or (input, ...) tuples; every batch counts alike.

    Raises:
        LowerError: no batches, or a map the model cannot take.
    """
    data = [_input_of(batch) for batch in batches]
    if not data:
        raise LowerError("add_plan: no batches given to estimate the normalizations' statistics on")
    twin = copy.deepcopy(model)
    try:
        set_precision(twin, precision_map)
    except ValueError as error:
        raise LowerError(f"add_plan: {error}") from error
    _average_statistics_(twin, data)
    return twin
