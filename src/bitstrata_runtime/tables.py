"""Checks of what surrounds a program's graph: input, layers, affines, weights, factors and plans."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np

from .errors import ProgramError
from .program import Factors, Layer, Program, Weights

MAX_CHANNELS = 1 << 16
MAX_KERNEL = 1 << 10
MAX_WEIGHTS = 1 << 28  # codes of one layer
MAX_FACTOR = 256  # |mul|, |add| of an integer form
MIN_STEP, MAX_STEP = 1e-30, 1e30  # far beyond any activation's, and safe to divide clip bounds by
INPUT_KINDS = ("pixels", "codes")
BY_PRECISION = ("weight_bits", "integer_form", "input_range", "pad_code", "input_offset")  # tables of a layer


def check_tables(program: Program) -> None:
    """Check everything but the nodes. Raises ProgramError that names the table, the entry, its value and the cause."""
    _check_input(program)
    _check_precisions(program)
    for name, layer in program.layers.items():
        if layer.name != name:
            raise ProgramError(f"layer {name!r}: its own name is {layer.name!r}")
        _check_layer(layer, program.precisions)
    for name, affine in program.affines.items():
        if affine.owner not in program.layers:
            raise ProgramError(f"affine {name!r}: its owner {affine.owner!r} is not a layer")
        _integer(affine.channels, 1, MAX_CHANNELS, f"affine {name!r}: channels")
    _check_keys(program.weights, program.layers, "program: weights")
    for name, weights in program.weights.items():
        _check_weights(program.layers[name], weights)
    _check_plans(program)
    for key, factors in program.factors.items():
        _check_factors(program, key, factors)


def _integer(value: object, low: int, high: int, where: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ProgramError(f"{where} = {value!r}: must be an integer in [{low}, {high}]")
    return value


def _integers(value: object, count: int, low: int, high: int, where: str) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != count:
        raise ProgramError(f"{where} = {value!r}: must be {count} integers")
    return tuple(_integer(item, low, high, where) for item in value)


def _check_keys(have: Collection[object], want: Collection[object], where: str) -> None:
    missing, unknown = [key for key in want if key not in have], [key for key in have if key not in want]
    if missing or unknown:
        raise ProgramError(f"{where}: missing {missing}, unknown {unknown}")


def _check_input(program: Program) -> None:
    if program.input_kind not in INPUT_KINDS:
        raise ProgramError(f"program: input_kind = {program.input_kind!r}: must be one of {', '.join(INPUT_KINDS)}")
    _integers(program.input_shape, 3, 1, MAX_CHANNELS, "program: input_shape")


def _check_precisions(program: Program) -> None:
    precisions = program.precisions
    if not isinstance(precisions, tuple) or not precisions:
        raise ProgramError(f"program: precisions = {precisions!r}: must be a non-empty tuple")
    for precision in precisions:
        _integer(precision, 1, 64, "program: precisions, entry")
    if list(precisions) != sorted(set(precisions)):
        raise ProgramError(f"program: precisions = {precisions}: must ascend")


def _check_layer(layer: Layer, precisions: tuple[int, ...]) -> None:
    where = f"layer {layer.name!r}"
    if layer.kind not in ("conv", "linear"):
        raise ProgramError(f"{where}: kind = {layer.kind!r}: must be 'conv' or 'linear'")
    shape = _integers(layer.shape, 4, 1, MAX_CHANNELS, f"{where}: shape")
    if max(shape[2:]) > MAX_KERNEL or math.prod(shape) > MAX_WEIGHTS:
        raise ProgramError(f"{where}: shape = {shape}: exceeds a kernel of {MAX_KERNEL} or {MAX_WEIGHTS} weights")
    _integer(layer.source_bits, 1, 8, f"{where}: source_bits")
    for table in BY_PRECISION:
        _check_keys(getattr(layer, table), precisions, f"{where}: precisions of {table}")
    for precision in precisions:
        _integer(layer.weight_bits[precision], 1, layer.source_bits, f"{where}: weight_bits[{precision}]")
        form = f"{where}: integer_form[{precision}]"
        mul, add = _integers(layer.integer_form[precision], 2, -MAX_FACTOR, MAX_FACTOR, form)
        _integer(mul, 1, MAX_FACTOR, f"{form}, mul")
        _check_integer_weights(mul, add, layer.weight_bits[precision], form)
        _check_range(layer, precision)
        _check_offset(layer, precision)


def _check_integer_weights(mul: int, add: int, bits: int, form: str) -> None:
    low, high = add - (mul << (bits - 1)), add + mul * ((1 << (bits - 1)) - 1)
    if low < -(1 << 15) or high >= 1 << 15:
        raise ProgramError(f"{form} = {(mul, add)}: integer weights of {bits} bits reach [{low}, {high}], beyond int16")


def _check_range(layer: Layer, precision: int) -> None:
    where = f"layer {layer.name!r}: input_range[{precision}]"
    low, high = _integers(layer.input_range[precision], 2, -128, 255, where)
    if low > high or (low < 0 and high > 127):
        raise ProgramError(f"{where} = {(low, high)}: must ascend and lie within uint8 or int8")
    where, codes = f"layer {layer.name!r}: pad_code[{precision}]", layer.pad_code[precision]
    if not isinstance(codes, tuple) or not codes:
        raise ProgramError(f"{where} = {codes!r}: must be a non-empty tuple")
    for code in codes:
        _integer(code, low, high, f"{where} (within the input_range)")


def _check_offset(layer: Layer, precision: int) -> None:
    offsets = layer.input_offset[precision]
    if not isinstance(offsets, tuple) or not offsets or not all(_is_finite(value) for value in offsets):
        raise ProgramError(
            f"layer {layer.name!r}: input_offset[{precision}] = {offsets!r}: must be a non-empty tuple of finite "
            f"numbers"
        )


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and math.isfinite(value)


def _check_weights(layer: Layer, weights: Weights) -> None:
    where, codes = f"layer {layer.name!r}: weights", weights.codes
    bits = _integer(weights.bits, 1, layer.source_bits, f"{where}: bits")
    if not isinstance(codes, np.ndarray) or codes.dtype != np.int8 or codes.shape != tuple(layer.shape):
        have = f"{codes.dtype} {codes.shape}" if isinstance(codes, np.ndarray) else type(codes).__name__
        raise ProgramError(f"{where}: codes must be an int8 array of shape {tuple(layer.shape)}, are {have}")
    low, high = int(codes.min()), int(codes.max())
    if low < -(1 << (bits - 1)) or high >= 1 << (bits - 1):
        raise ProgramError(f"{where}: codes reach from {low} to {high}, beyond {bits} signed bits")


def _check_plans(program: Program) -> None:
    for name, chosen in program.plans.items():
        if not isinstance(name, str) or not name or name.isdecimal():
            raise ProgramError(f"plan {name!r}: its name must be a non-empty string and not a number")
        check_map(program.layers, program.precisions, chosen, f"plan {name!r}")


def check_map(
    layers: Collection[str], precisions: Collection[int], chosen: Mapping[str, int], where: str
) -> dict[str, int]:
    """A per-layer precision map as a dict in the order of `layers`, checked to be complete and known.

    Raises ProgramError for a missing or unknown layer and for a precision the program does not have.
    """
    _check_keys(chosen, layers, f"{where}: layers of the precision map")
    for layer, precision in chosen.items():
        if type(precision) is not int or precision not in precisions:
            raise ProgramError(f"{where}: layer {layer!r}: no precision {precision!r}; there are {tuple(precisions)}")
    return {layer: chosen[layer] for layer in layers}


def _check_factors(program: Program, key: str, factors: Factors) -> None:
    where = f"factors {key!r}"
    if key in program.plans:
        _check_keys([name for name in factors.affine if name not in program.affines], (), f"{where}: affine")
        _check_keys(factors.step, (), f"{where}: step (a plan has the steps of its precisions)")
    elif key in map(str, program.precisions):
        _check_keys(factors.affine, program.affines, f"{where}: affine")
        _check_keys(factors.step, program.layers, f"{where}: step")
    else:
        raise ProgramError(f"{where}: is neither a precision of {program.precisions} nor a plan")
    for name, array in factors.affine.items():
        want = (2, program.affines[name].channels)
        if not isinstance(array, np.ndarray) or array.dtype != np.float64 or array.shape != want:
            have = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ProgramError(f"{where}: affine {name!r} must be a float64 array of shape {want}, is {have}")
        if not np.isfinite(array).all():
            raise ProgramError(f"{where}: affine {name!r} has entries that are not finite")
    for name, step in factors.step.items():
        if not _is_finite(step) or not MIN_STEP <= step <= MAX_STEP:
            raise ProgramError(f"{where}: step of layer {name!r} = {step!r}: must be in [{MIN_STEP}, {MAX_STEP}]")
