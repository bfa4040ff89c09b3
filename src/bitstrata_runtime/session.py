"""Sessions: a program, in memory or in an artifact, running at a precision that can change at any time."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from .artifact import Artifact
from .backend import Backend, check_threads, choose_backend
from .derive import Precision, derive, resolve_map
from .errors import ProgramError
from .plan import Conv, Plan
from .program import Program
from .snapshot import Executor, Integers, Snapshot
from .source import Source

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Pass: TypeAlias = Callable[[Plan], Plan]
KEEP = 4  # precisions that a session keeps ready, if nothing else is asked for


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


@dataclass(frozen=True)
class Memory:
    """What a session holds, in bytes.

    codes: weight codes as read from the artifact, a byte each, and what the plans of the precisions that are ready
    derived from them. packed: (precision, bytes) of each precision that is ready, its weights as the kernels read them
    and other constants. workspaces: intermediate values of runs under way, or kept for the next ones.
    """

    codes: int
    packed: tuple[tuple[Precision, int], ...]
    workspaces: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.codes + sum(size for _, size in self.packed) + self.workspaces


class Session:
    """A program at one precision, ready to run. Made by `load` or `Session.from_program`.

    A precision is an int (all layers), a map layer -> int (complete), or the name of one of the program's plans. A
    change of precision that fails raises and leaves the session as it was.

    Safe for use by several threads at once: runs go on at the same time, each from start to end at the precision that
    the session had when the run began, and no change waits for them. `at` gives the precision that a run will have
    together with the means to run.
    """

    def __init__(
        self,
        source: ProgramSource,
        precision: Precision,
        backend: Backend,
        keep: int = KEEP,
        passes: Iterable[Pass] = (),
    ) -> None:
        if type(keep) is not int or keep < 1:
            raise ValueError(f"keep = {keep!r}: must be a positive integer")
        self._source = source
        self._backend = backend
        self._keep = keep
        self._passes = tuple(passes)
        self._loading = threading.Lock()  # held while a precision is read and made ready; taken before `_state`
        self._state = threading.Lock()  # of what follows; held for microseconds
        self._ready: OrderedDict[tuple[Any, ...], Snapshot] = OrderedDict()  # the most recently used last
        self._keys: dict[int | str, tuple[Any, ...]] = {}
        self._now = self._make(precision)
        self._ready[self._key(precision)] = self._now

    @classmethod
    def from_program(
        cls,
        program: Program,
        bits: Precision | None = None,
        *,
        executor: str | None = None,
        isa: str | None = None,
        threads: int = 1,
        keep: int = KEEP,
        tune: bool | str | os.PathLike[str] = False,
        passes: Iterable[Pass] = (),
    ) -> Session:
        """A session on a program in memory; arguments and errors as of `load`."""
        backend = choose_backend(executor, isa, threads, tune)
        first = _narrowest(program.precisions) if bits is None else bits
        return cls(_InMemory(program), first, backend, keep, passes)

    @property
    def executor(self) -> Executor:
        """What runs at the present precision."""
        return self._now.executor

    # Precision

    @property
    def program(self) -> Program:
        """The program, as far as the present precision needed it to be read."""
        return self._now.program

    @property
    def plan(self) -> Plan:
        """The plan of the present precision."""
        return self._now.plan

    @property
    def precision_map(self) -> dict[str, int]:
        """Layer -> precision, at present."""
        return dict(self._now.precision_map)

    @property
    def reads(self) -> list[tuple[str, int]]:
        """(file, bytes) of every file of the artifact read so far; empty for a program in memory."""
        return self._source.reads

    def at(self, bits: Precision | None = None) -> Snapshot:
        """The program at `bits`, None for the present precision, to run whatever the session changes to.

        Reads and prepares what is not ready yet, as `set_precision` does, but the session stays at its precision.
        """
        return self._now if bits is None else self._get(bits)

    def set_precision(self, bits: Precision) -> None:
        """Runs that begin from now on run at `bits`; reads and prepares what is not ready yet.

        Raises ProgramError for an unknown precision, plan or layer, ArtifactError if a file cannot be read.
        """
        self._switch(bits, lambda now: None)

    def upgrade(self, bits: Precision) -> None:
        """`set_precision`, provided that it raises some layers and lowers none; else ProgramError."""
        self._move(bits, 1, "upgrade")

    def downgrade(self, bits: Precision) -> None:
        """`set_precision`, provided that it lowers some layers and raises none; else ProgramError."""
        self._move(bits, -1, "downgrade")

    def release(self, bits: Precision | None = None) -> None:
        """Forget what was prepared for `bits`, None for all but the present precision, and memory of past runs.

        Runs under way and snapshots keep what they use. Codes that were read stay, so that nothing is read twice.
        Raises ProgramError for an unknown precision, and for the present one.
        """
        key = None if bits is None else self._key(bits)
        with self._state:
            present = next(known for known, ready in self._ready.items() if ready is self._now)
            if key == present:
                raise ProgramError(f"release: {bits!r} is the present precision; change it first")
            for known in [known for known in self._ready if known != present and key in (None, known)]:
                del self._ready[known]
            self._backend.trim([ready.executor for ready in self._ready.values()])

    @property
    def memory(self) -> Memory:
        """What the session holds at present. Snapshots and runs of precisions released since are not counted."""
        with self._state:
            ready = list(self._ready.values())
        packed = tuple((one.precision, self._backend.constant_bytes(one.executor)) for one in ready)
        return Memory(_bytes_of_codes(ready), packed, self._backend.workspace_bytes())

    def _move(self, bits: Precision, sign: int, verb: str) -> None:
        chosen = resolve_map(self.program, bits)

        def check(present: Snapshot) -> None:
            steps = [sign * (chosen[layer] - now) for layer, now in present.precision_map.items()]
            if min(steps) < 0 or max(steps) == 0:
                now = sorted(set(present.precision_map.values()))
                raise ProgramError(
                    f"{verb}: {bits!r} is no {verb} from the present precision {now[0] if len(now) == 1 else now}; "
                    f"use set_precision for any other change"
                )

        check(self._now)  # before anything is read
        self._switch(bits, check)

    def _switch(self, bits: Precision, check: Callable[[Snapshot], None]) -> None:
        """Change to `bits` if `check` accepts the precision that is present when the change takes place."""
        ready, key = self._get(bits), self._key(bits)
        with self._state:
            check(self._now)
            self._now = ready
            self._store(key, ready)

    def _get(self, bits: Precision) -> Snapshot:
        key = self._key(bits)
        with self._state:
            ready = self._ready.get(key)
        if ready is not None:
            return ready
        with self._loading:
            with self._state:
                ready = self._ready.get(key)  # another thread may have made it meanwhile
            if ready is None:
                ready = self._make(bits)
                with self._state:
                    self._store(key, ready)
            return ready

    def _store(self, key: tuple[Any, ...], ready: Snapshot) -> None:
        """Keep `ready` as the most recently used; the present precision is never dropped for another."""
        self._ready[key] = ready
        self._ready.move_to_end(key)
        while len(self._ready) > self._keep:
            del self._ready[next(known for known, one in self._ready.items() if one is not self._now)]

    def _make(self, bits: Precision) -> Snapshot:
        program = self._source.load(*self._source.needs(bits))
        chosen, plan = resolve_map(program, bits), derive(program, bits)
        for change in self._passes:
            plan = change(plan)
        return Snapshot(bits, chosen, program, plan, self._backend.make(plan))

    def _key(self, bits: Precision) -> tuple[Any, ...]:
        """What distinguishes precisions: a plan's name, and the precision of every layer. Raises ProgramError."""
        if type(bits) is int or type(bits) is str:  # no bool, which equals an int
            if bits not in self._keys:
                self._keys[bits] = self._full_key(bits)
            return self._keys[bits]
        return self._full_key(bits)

    def _full_key(self, bits: Precision) -> tuple[Any, ...]:
        return (bits if isinstance(bits, str) else None, *resolve_map(self.program, bits).values())

    # Running

    @property
    def threads(self) -> int:
        """How many threads a run may have."""
        return self._backend.threads

    def set_threads(self, threads: int) -> None:
        """For runs that begin from now on: how many threads one run at a time has; results do not depend on it.

        A run that begins while another has the threads works on its caller's thread alone. Raises ValueError.
        """
        self._backend.set_threads(check_threads(threads))

    def run(self, x: ArrayLike, *, floats: bool = False) -> NDArray[Any]:
        """Logits at the present precision: float32 (N, classes) or (N, C, H, W); see `Snapshot.run`."""
        return self._now.run(x, floats=floats)

    def run_raw(self, x: ArrayLike, *, floats: bool = False) -> NDArray[Any]:
        """The output's integers at the present precision, int32; see `Snapshot.run_raw`."""
        return self._now.run_raw(x, floats=floats)

    def run_all(self, x: ArrayLike, *, floats: bool = False) -> dict[str, Integers]:
        """Every value by name at the present precision; see `Snapshot.run_all`."""
        return self._now.run_all(x, floats=floats)

    def encode(self, x: ArrayLike, *, floats: bool = False) -> Integers:
        """The input's codes (N, H, W, C) for `x` at the present precision, as `run` makes them."""
        return self._now.encode(x, floats=floats)


def load(
    path: str | os.PathLike[str] | Source,
    bits: Precision | None = None,
    *,
    executor: str | None = None,
    isa: str | None = None,
    threads: int = 1,
    keep: int = KEEP,
    tune: bool | str | os.PathLike[str] = False,
    passes: Iterable[Pass] = (),
) -> Session:
    """Open an artifact and get it ready to run at `bits`, reading only the files which that needs.

    bits: a precision, a map layer -> precision, the name of a plan, or None for the narrowest precision. executor:
    "engine" (compiled kernels), "reference" (slow, normative), "oracle" (the reference with exact matrix products),
    or None for the engine where it is available, else the reference with a warning. isa: the engine's instruction
    set, None for the best. threads: of the engine. keep: how many precisions stay ready at most, the present one
    included; each holds its weights. tune: take the kernels and tile sizes that `tune` found to be fastest, from the
    file it names or, for True, from `tuning.tune_path()`. passes: functions from a plan to one of equal results, as
    `as_thresholds` is, applied to every precision's plan. Raises ArtifactError for an artifact or precision that cannot
    be used, ValueError for a wrong executor, isa, threads, keep or tune, ImportError if the engine is asked for and not
    built.
    """
    backend = choose_backend(executor, isa, threads, tune)
    artifact = Artifact.open(path)
    return Session(artifact, _narrowest(artifact.precisions) if bits is None else bits, backend, keep, passes)


def _narrowest(precisions: tuple[int, ...]) -> int:
    if not precisions:
        raise ProgramError("program: precisions is empty")
    return min(precisions)


def _bytes_of_codes(snapshots: Iterable[Snapshot]) -> int:
    """Bytes of all arrays of weight codes, those that several share counted once."""
    sizes: dict[int, int] = {}
    for snapshot in snapshots:
        held = [weights.codes for weights in snapshot.program.weights.values()]
        held += [op.codes for op in snapshot.plan.ops if isinstance(op, Conv)]
        sizes.update((codes.__array_interface__["data"][0], codes.nbytes) for codes in held)
    return sum(sizes.values())
