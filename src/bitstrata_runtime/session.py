"""Sessions: a program, in memory or in an artifact, running at a precision that can change at any time."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .artifact import Artifact
from .derive import Precision, derive, resolve_map
from .errors import ProgramError
from .plan import Plan
from .program import Program
from .reference import DTYPES, OracleExecutor, ReferenceExecutor
from .source import Source
from .tuning import make_executor, tune_path

_CACHED = 4  # executors kept for precisions left; each holds its weights

Integers = NDArray[np.integer[Any]]


class Executor(Protocol):
    """Runs one plan. Codes and results are (N, H, W, C); see `reference.ReferenceExecutor`, the normative one."""

    def run(self, codes: Integers) -> NDArray[np.int32]: ...

    def run_all(self, codes: Integers) -> dict[str, Integers]: ...


class ProgramSource(Protocol):
    """Where a session's program comes from: `artifact.Artifact`, or a program in memory."""

    @property
    def reads(self) -> list[tuple[str, int]]: ...

    def needs(self, precision: Precision) -> tuple[set[str], int]: ...

    def load(self, precisions_needed: set[str], weight_bits_needed: int) -> Program: ...


class _InMemory:
    """A program that is held whole."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.reads: list[tuple[str, int]] = []

    def needs(self, precision: Precision) -> tuple[set[str], int]:
        return set(), 0

    def load(self, precisions_needed: set[str], weight_bits_needed: int) -> Program:
        return self._program


class Session:
    """A program at one precision, ready to run. Made by `load` or `Session.from_program`.

    A precision is an int (all layers), a map layer -> int (complete), or the name of one of the program's plans. A
    change of precision that fails raises and leaves the session as it was. Not safe for use by several threads at once.
    """

    program: Program  # as far as it has been read
    plan: Plan
    precision_map: dict[str, int]  # layer -> precision

    def __init__(self, source: ProgramSource, precision: Precision, make_executor: Callable[[Plan], Executor]) -> None:
        self._source = source
        self._make_executor = make_executor
        self._cache: OrderedDict[Any, tuple[Plan, Executor]] = OrderedDict()
        self._switch(precision)

    @classmethod
    def from_program(
        cls,
        program: Program,
        bits: Precision | None = None,
        *,
        executor: str | None = None,
        isa: str | None = None,
        threads: int = 1,
        tune: bool | str | os.PathLike[str] = False,
    ) -> Session:
        """A session on a program in memory; arguments and errors as of `load`."""
        make = _executor_factory(executor, isa, threads, tune)
        return cls(_InMemory(program), _narrowest(program.precisions) if bits is None else bits, make)

    @property
    def executor(self) -> Executor:
        """What runs at the present precision."""
        return self._executor

    # Precision

    @property
    def reads(self) -> list[tuple[str, int]]:
        """(file, bytes) of every file of the artifact read so far; empty for a program in memory."""
        return self._source.reads

    def set_precision(self, bits: Precision) -> None:
        """Run at `bits` from now on, reading what is not held yet.

        Raises ProgramError for an unknown precision, plan or layer, ArtifactError if a file cannot be read.
        """
        resolve_map(self.program, bits)
        self._switch(bits)

    def upgrade(self, bits: Precision) -> None:
        """`set_precision`, provided that it raises some layers and lowers none; else ProgramError."""
        self._move(bits, 1, "upgrade")

    def downgrade(self, bits: Precision) -> None:
        """`set_precision`, provided that it lowers some layers and raises none; else ProgramError."""
        self._move(bits, -1, "downgrade")

    def _move(self, bits: Precision, sign: int, verb: str) -> None:
        chosen = resolve_map(self.program, bits)
        steps = [sign * (chosen[layer] - now) for layer, now in self.precision_map.items()]
        if min(steps) < 0 or max(steps) == 0:
            now = sorted(set(self.precision_map.values()))
            raise ProgramError(
                f"{verb}: {bits!r} is no {verb} from the present precision {now[0] if len(now) == 1 else now}; "
                f"use set_precision for any other change"
            )
        self._switch(bits)

    def _switch(self, precision: Precision) -> None:
        program = self._source.load(*self._source.needs(precision))
        chosen = resolve_map(program, precision)
        key = (precision if isinstance(precision, str) else None, *chosen.items())
        ready = self._cache.get(key)
        if ready is None:
            plan = derive(program, precision)
            ready = (plan, self._make_executor(plan))
        self._cache[key] = ready
        self._cache.move_to_end(key)
        if len(self._cache) > _CACHED:
            self._cache.popitem(last=False)
        self.program, self.precision_map = program, chosen
        self.plan, self._executor = ready

    # Running

    def run(self, x: ArrayLike, *, floats: bool = False) -> NDArray[np.float32]:
        """Logits: float32 (N, classes), or (N, C, H, W) where the output is a map.

        x: (N, C, H, W). A program on pixels takes uint8; with floats=True, real pixels in [0, 1], which are
        multiplied by 255 and rounded (any normalization is in the program). A program on codes takes floats only:
        floats=True and real values, normalized as in training, which are rounded to the input's grid (spec/numerics.md,
        section 5). Raises ValueError for another dtype, shape or range.
        """
        scale = self.plan.values[self.plan.output].scale
        return (self.run_raw(x, floats=floats) * np.float64(scale if scale is not None else 1.0)).astype(np.float32)

    def run_raw(self, x: ArrayLike, *, floats: bool = False) -> NDArray[np.int32]:
        """The output's integers, int32 of `run`'s shape: logits = scale * integer. x and errors as in `run`."""
        result = self._executor.run(self.encode(x, floats=floats))
        if result.shape[1:3] == (1, 1):
            return result[:, 0, 0, :]
        return np.ascontiguousarray(result.transpose(0, 3, 1, 2))

    def run_all(self, x: ArrayLike, *, floats: bool = False) -> dict[str, Integers]:
        """Every value by name, integers (N, H, W, C), the input's codes included. x and errors as in `run`."""
        return self._executor.run_all(self.encode(x, floats=floats))

    def encode(self, x: ArrayLike, *, floats: bool = False) -> Integers:
        """The input's codes (N, H, W, C) for `x`, as `run` makes them."""
        array = np.asarray(x)
        shape = tuple(self.program.input_shape)
        if array.ndim != 4 or array.shape[1:] != shape:
            raise ValueError(f"run: input must be (N, {', '.join(map(str, shape))}), is {array.shape}")
        if not floats:
            if self.program.input_kind != "pixels":
                raise ValueError("run: the program's input are real values; pass them with floats=True")
            if array.dtype != np.uint8:
                raise ValueError(f"run: input must be uint8 pixels, is {array.dtype}; floats need floats=True")
            return np.ascontiguousarray(array.transpose(0, 2, 3, 1))
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"run: with floats=True the input must be floating point, is {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError("run: input has values that are not finite")
        return self._encode_floats(array.transpose(0, 2, 3, 1).astype(np.float64))

    def _encode_floats(self, x: NDArray[np.float64]) -> Integers:
        value = self.plan.values[self.plan.input]
        if self.program.input_kind == "pixels":
            if x.size and not 0.0 <= x.min() <= x.max() <= 1.0:
                raise ValueError(f"run: real pixels must lie in [0, 1], reach [{x.min()}, {x.max()}]")
            codes = np.rint(x * 255.0)
        else:
            codes = np.rint(x / self.plan.input_step - np.asarray(self.plan.input_offset))
        return np.ascontiguousarray(np.clip(codes, value.lo, value.hi), dtype=DTYPES[value.dtype])


def load(
    path: str | os.PathLike[str] | Source,
    bits: Precision | None = None,
    *,
    executor: str | None = None,
    isa: str | None = None,
    threads: int = 1,
    tune: bool | str | os.PathLike[str] = False,
) -> Session:
    """Open an artifact and get it ready to run at `bits`, reading only the files which that needs.

    bits: a precision, a map layer -> precision, the name of a plan, or None for the narrowest precision. executor:
    "engine" (compiled kernels), "reference" (slow, normative), "oracle" (the reference with exact matrix products),
    or None for the engine where it is available, else the reference with a warning. isa: the engine's instruction
    set, None for the best. threads: of the engine. tune: take the kernels and tile sizes that `tune` found to be
    fastest, from the file it names or, for True, from `tuning.tune_path()`. Raises ArtifactError for an artifact or
    precision that cannot be used, ValueError for a wrong executor, isa, threads or tune, ImportError if the engine is
    asked for and not built.
    """
    make = _executor_factory(executor, isa, threads, tune)
    artifact = Artifact.open(path)
    return Session(artifact, _narrowest(artifact.precisions) if bits is None else bits, make)


def _narrowest(precisions: tuple[int, ...]) -> int:
    if not precisions:
        raise ProgramError("program: precisions is empty")
    return min(precisions)


def _executor_factory(
    executor: str | None, isa: str | None, threads: int, tune: bool | str | os.PathLike[str]
) -> Callable[[Plan], Executor]:
    if type(threads) is not int or threads < 1:
        raise ValueError(f"threads = {threads!r}: must be a positive integer")
    if executor not in (None, "engine", "reference", "oracle"):
        raise ValueError(f"executor = {executor!r}: must be 'engine', 'reference', 'oracle' or None")
    if executor in (None, "engine"):
        try:
            from .engine import EngineExecutor
        except ImportError as error:
            if executor == "engine" or isa is not None:
                raise ImportError(f"the engine is not available: {error}") from error
            warnings.warn(f"the engine is not available ({error}); using the slow reference", stacklevel=3)
            return ReferenceExecutor
        if tune is not False:
            return lambda plan: make_executor(plan, isa, threads, tune_path(tune))
        return lambda plan: EngineExecutor(plan, isa=isa, threads=threads)
    if isa is not None:
        raise ValueError(f"isa = {isa!r}: only the engine has instruction sets, the executor is {executor!r}")
    if tune is not False:
        raise ValueError(f"tune = {tune!r}: only the engine can be tuned, the executor is {executor!r}")
    return ReferenceExecutor if executor == "reference" else OracleExecutor
