"""The engine executor: a plan run by the compiled extension `_engine`.

It computes the integers that spec/numerics.md defines, those of the reference executor, with the fastest kernels that
the processor supports.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import TYPE_CHECKING, Any

import numpy as np

from . import plan as p
from .tuning import Choice

if TYPE_CHECKING:
    from numpy.typing import NDArray

try:
    from . import _engine
except ImportError as error:
    raise ImportError(
        "bitstrata_runtime.engine needs the compiled extension bitstrata_runtime._engine, which is missing or does not "
        "load here; install the package with pip (a C++17 compiler is needed to build it from source), or use "
        f"executor='reference'. Cause: {error}"
    ) from error

_DTYPES = {"u8": np.dtype(np.uint8), "s8": np.dtype(np.int8), "i32": np.dtype(np.int32)}


def available_isas() -> tuple[str, ...]:
    """Names of the instruction sets that this build and this processor support, slowest first."""
    return tuple(_engine.available_isas())


def emulated_isas() -> tuple[str, ...]:
    """Names of the instruction sets that this build emulates, for tests: slow, and used only where named."""
    return tuple(_engine.emulated_isas())


@dataclass(frozen=True)
class KernelRow:
    """A row of the table of kernels. lacks: what this machine or this build lacks to run it, "" if it runs.

    emulated: for tests, runs everywhere and is used only where named. chosen: an executor made now without a name
    would use it.
    """

    isa: str
    emulated: bool
    lacks: str
    chosen: bool


def kernel_table() -> tuple[KernelRow, ...]:
    """Every row there is, slowest first, those that are emulated last.

    None is chosen if the environment variable BITSTRATA_ISA names what cannot run here.
    """
    try:
        chosen = _engine.chosen_isa("")
    except ValueError:
        chosen = ""
    return tuple(KernelRow(isa, emulated, lacks, isa == chosen) for isa, emulated, lacks in _engine.kernel_table())


class Resources:
    """Threads, and memory for intermediate values, which executors share. Safe for use by several threads at once.

    threads: 1 to 256. One run at a time has them all; a run that finds them taken works on its caller's thread alone.
    callers: 1 to 4096, how many runs may be under way at once, those beyond it wait; None takes the number of
    processors, and at least 4. Results depend on neither. Raises ValueError.
    """

    def __init__(self, threads: int = 1, callers: int | None = None) -> None:
        if callers is not None and callers < 1:
            raise ValueError(f"callers = {callers!r}: must be a positive integer")
        self._native = _engine.Resources(threads, callers or 0)

    @property
    def threads(self) -> int:
        """How many threads a run may have."""
        return int(self._native.threads)

    def set_threads(self, threads: int) -> None:
        """For runs that begin from now on. Raises ValueError."""
        self._native.set_threads(threads)

    @property
    def callers(self) -> int:
        """How many runs may be under way at once."""
        return int(self._native.callers)

    @property
    def bytes(self) -> int:
        """Memory held for intermediate values, by runs under way or for the next ones."""
        return int(self._native.bytes)

    def trim(self, bytes: int) -> None:
        """Give back what no run uses, but for this many bytes for one caller and each thread."""
        self._native.trim(bytes)


class EngineExecutor:
    """Runs a plan. Immutable once made; `run` may be called from several threads at once.

    isa: instruction set, one of `available_isas()` or `emulated_isas()`; None takes the one the environment variable
    BITSTRATA_ISA names, else the fastest. threads: 1 to 256, of its own; or resources, shared with other executors.
    choice: of kernels and tiles, see `tuning`. Results depend on none of these. Memory for one run at a time is
    allocated here.

    Raises ValueError if the instruction set is unknown or unsupported, if the plan is inconsistent, or if a chosen
    kernel cannot compute its convolution.
    """

    def __init__(
        self,
        plan: p.Plan,
        *,
        isa: str | None = None,
        threads: int = 1,
        resources: Resources | None = None,
        choice: Choice | None = None,
    ) -> None:
        self.plan = plan
        self.resources = Resources(threads) if resources is None else resources
        self._choice = choice or Choice()
        self._graph = _engine.Graph(isa or "", self.resources._native)
        if self._choice.tile_bytes is not None:
            self._graph.tile_bytes(self._choice.tile_bytes)
        self._index: dict[int, int] = {}  # plan value -> engine value
        source = plan.values[plan.input]
        self._index[plan.input] = self._graph.input(source.shape, source.dtype, source.lo, source.hi)
        for op in plan.ops:
            self._append(op)
        self._graph.finish(self._of(plan.output, "the plan"))

    @property
    def isa(self) -> str:
        """The instruction set whose kernels run."""
        return str(self._graph.isa)

    @property
    def kernels(self) -> dict[str, str]:
        """Value name -> name of the convolution kernel that computes it."""
        named = {self.plan.values[v].name: self._graph.kernel(i) for v, i in self._index.items()}
        return {name: kernel for name, kernel in named.items() if kernel}

    @property
    def candidates(self) -> dict[str, list[str]]:
        """Convolution -> names of the kernels that compute it here, the engine's own choice first."""
        convs = [op for op in self.plan.ops if isinstance(op, p.Conv)]
        return {op.name: list(self._graph.conv_kernels(self._index[op.output])) for op in convs}

    @property
    def chunk(self) -> int:
        """How many images pass through the plan together, at most."""
        return int(self._graph.chunk)

    @property
    def arena_bytes(self) -> int:
        """Memory for a chunk's intermediate values, in bytes a thread."""
        return int(self._graph.arena_bytes)

    @property
    def run_bytes(self) -> int:
        """What a run takes of the resources' memory, in bytes a thread: `arena_bytes` and a little more."""
        return int(self._graph.run_bytes)

    @property
    def constant_bytes(self) -> int:
        """Memory for weights, packed for the kernels, and other constants."""
        return int(self._graph.constant_bytes)

    def run(self, codes: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        """Input codes (N, H, W, C), uint8 or int8 as the plan says -> the output value (N, H, W, C), int32.

        Raises ValueError if dtype or shape are others, or if a code is outside the input's range.
        """
        (result,) = self._graph.run(self._checked(codes), [self._index[self.plan.output]])
        return np.asarray(result, dtype=np.int32)

    def run_all(self, codes: NDArray[np.integer[Any]]) -> dict[str, NDArray[np.integer[Any]]]:
        """Like `run`, but every value by name, (N, H, W, C) in the value's own dtype."""
        arrays = self._graph.run(self._checked(codes), list(self._index.values()))
        return {self.plan.values[v].name: array for v, array in zip(self._index, arrays, strict=True)}

    # For `profile`

    def time_ops(self, codes: NDArray[np.integer[Any]], repeats: int) -> list[tuple[float, list[float]]]:
        """Of each of `repeats` runs: seconds, and seconds of each operation of the plan over all threads.

        codes: at least one image; errors as of `run`.
        """
        order = [self._index[op.output] - 1 for op in self.plan.ops]
        runs = _engine.profile(self._graph, self._checked(codes), repeats)
        return [(seconds, [ops[i] for i in order]) for seconds, ops in runs]

    def work(self, value: int) -> dict[str, Any]:
        """What the operation that makes a value of the plan does to one image; see OpWork in profile.h."""
        return dict(_engine.work(self._graph, self._index[value]))

    def measure_machine(self) -> tuple[dict[str, float], list[tuple[str, int, float]]]:
        """Products per second of the instructions in use; (name, bytes, bytes per second) of caches and memory."""
        return dict(_engine.measure_products(self._graph)), list(_engine.measure_memory(self._graph))

    def _checked(self, codes: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        source = self.plan.values[self.plan.input]
        if codes.ndim != 4 or codes.shape[1:] != tuple(source.shape) or codes.dtype != _DTYPES[source.dtype]:
            h, w, c = source.shape
            raise ValueError(
                f"run: codes must be {_DTYPES[source.dtype]} of shape (N, {h}, {w}, {c}), "
                f"got {codes.dtype} of shape {codes.shape}"
            )
        return np.ascontiguousarray(codes)

    def _of(self, value: int, user: str) -> int:
        if value not in self._index:
            raise ValueError(f"{user} reads value {value}, which no earlier operation computes")
        return self._index[value]

    def _append(self, op: p.Op) -> None:
        result = self.plan.values[op.output]
        if op.output in self._index:
            raise ValueError(f"operation {op.name!r}: value {op.output} ({result.name!r}) is computed already")
        arity = 2 if isinstance(op, p.Add) else 1
        if len(op.inputs) != arity:
            raise ValueError(f"operation {op.name!r}: {type(op).__name__} takes {arity} inputs, got {len(op.inputs)}")
        inputs = [self._of(v, f"operation {op.name!r}") for v in op.inputs]
        if isinstance(op, p.Conv):
            index = _append_conv(op, self._graph, inputs, self._choice.kernels.get(op.name, ""))
        else:
            index = _append(op, self._graph, inputs, result.dtype)
        shape, dtype = self._graph.shape(index), self._graph.dtype(index)
        if (shape, dtype) != (tuple(result.shape), result.dtype):
            raise ValueError(
                f"operation {op.name!r}: the result is {dtype} of shape {shape} (H, W, C), "
                f"the plan says {result.dtype} of shape {tuple(result.shape)}"
            )
        self._index[op.output] = index


def _array(op: p.Op, argument: str, dtype: type[np.integer[Any]], ndim: int) -> NDArray[Any]:
    """A contiguous array attribute of `op`, whose dtype and dimensions must be these."""
    array = np.asarray(getattr(op, argument))
    if array.dtype != dtype or array.ndim != ndim:
        raise ValueError(
            f"operation {op.name!r}: {argument} must be {np.dtype(dtype)} of {ndim} dimensions, "
            f"got {array.dtype} of shape {array.shape}"
        )
    return np.ascontiguousarray(array)


@singledispatch
def _append(op: p.Op, graph: Any, inputs: list[int], dtype: str) -> int:
    """Add `op` to the engine's graph; the engine's index of its result. dtype: of the result."""
    raise ValueError(f"operation {op.name!r}: {type(op).__name__} is not an operation of the engine")


def _append_conv(op: p.Conv, graph: Any, inputs: list[int], kernel: str) -> int:
    """As `_append`, of a convolution. kernel: its name, "" for the engine's choice."""
    codes, pad_code = _array(op, "codes", np.int8, 4), _array(op, "pad_code", np.int32, 1)
    sizes = (op.stride, op.padding, op.dilation, op.groups)
    return int(graph.conv(op.name, *inputs, codes, op.mul, op.add, *sizes, pad_code, kernel))


@_append.register
def _(op: p.Requant, graph: Any, inputs: list[int], dtype: str) -> int:
    multiplier, bias = _array(op, "multiplier", np.int32, 1), _array(op, "bias", np.int64, 1)
    shift = _array(op, "shift", np.uint8, 1)
    return int(graph.requant(op.name, *inputs, multiplier, bias, shift, op.lo, op.hi, dtype))


@_append.register
def _(op: p.Thresholds, graph: Any, inputs: list[int], dtype: str) -> int:
    after, base = _array(op, "after", np.int32, 2), _array(op, "base", np.int32, 1)
    return int(graph.thresholds(op.name, *inputs, after, _array(op, "sign", np.int8, 1), base, dtype))


@_append.register
def _(op: p.Table, graph: Any, inputs: list[int], dtype: str) -> int:
    return int(graph.table(op.name, *inputs, _array(op, "table", np.int32, 2), op.first, dtype))


@_append.register
def _(op: p.Add, graph: Any, inputs: list[int], dtype: str) -> int:
    return int(graph.add(op.name, *inputs, op.shift_a, op.shift_b))


@_append.register
def _(op: p.Clip, graph: Any, inputs: list[int], dtype: str) -> int:
    return int(graph.clip(op.name, *inputs, op.lo, op.hi))


@_append.register
def _(op: p.MaxPool, graph: Any, inputs: list[int], dtype: str) -> int:
    return int(graph.max_pool(op.name, *inputs, op.kernel, op.stride, op.padding))


@_append.register
def _(op: p.SumPool, graph: Any, inputs: list[int], dtype: str) -> int:
    if dtype != "i32" and op.shift == 0:
        return int(graph.sum_codes(op.name, *inputs, op.kernel, op.stride, op.padding))
    return int(graph.sum_pool(op.name, *inputs, op.kernel, op.stride, op.padding, op.shift))


@_append.register
def _(op: p.Slice, graph: Any, inputs: list[int], dtype: str) -> int:
    return int(graph.slice(op.name, *inputs, op.h, op.w, op.c))


@_append.register
def _(op: p.Pad, graph: Any, inputs: list[int], dtype: str) -> int:
    return int(graph.pad(op.name, *inputs, op.h, op.w, op.c))


@_append.register
def _(op: p.Flatten, graph: Any, inputs: list[int], dtype: str) -> int:
    return int(graph.flatten(op.name, *inputs))
