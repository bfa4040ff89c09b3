"""Where a session's time goes: every operation's time, work and bytes, beside what the machine could do at best.

    found = bitstrata_runtime.profile(session, pixels)
    for op in found.worst(3):
        print(op.name, op.kernel, found.share_of_time(op), op.share_of_limit, op.bound)

The limit is a roofline: an operation takes at least as long as its products take at the measured peak of its kernel's
instructions, and as long as its bytes take to come from the cache, or the memory, that holds them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from . import plan as p

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .engine import EngineExecutor
    from .session import Session


@dataclass(frozen=True)
class Level:
    """A cache or the memory: what it holds (None: no bound is known), and bytes per second of one thread."""

    name: str
    bytes: int | None
    bytes_per_second: float


@dataclass(frozen=True)
class Machine:
    """What was measured of the machine, one thread, while as many threads were busy as the session has.

    peaks: products per second of each instruction that the session's convolutions are made of. levels: from the
    first-level cache to the memory.
    """

    isa: str
    threads: int
    peaks: dict[str, float]
    levels: tuple[Level, ...]

    def level(self, count: float) -> Level:
        """The smallest level that holds `count` bytes."""
        return next(level for level in self.levels if level.bytes is None or count <= level.bytes)


@dataclass(frozen=True)
class OpProfile:
    """One operation on the whole batch.

    seconds: time of all threads together, divided by their number; the least of all runs. It is 0 for a requantization
    that a convolution does with its sums, in whose time it is. operations: two for each product of a convolution, else
    one for each element. Bytes count once every element that takes part: inputs and
    outputs, constants (packed weights, requantization), scratch (the staged input, written and read). group: operations
    of one group run together, tile by tile. peak: the instructions of the kernel, "" where it is no convolution.
    compute_seconds and memory_seconds: the least time that operations and bytes take on this machine.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    kernel: str
    seconds: float
    operations: int
    input_bytes: int
    output_bytes: int
    weight_bytes: int
    scratch_bytes: int
    group: int
    peak: str
    compute_seconds: float
    memory_seconds: float

    @property
    def bytes(self) -> int:
        """All bytes moved."""
        return self.input_bytes + self.output_bytes + self.weight_bytes + 2 * self.scratch_bytes

    @property
    def gops(self) -> float:
        """Operations per nanosecond, of all threads."""
        return _ratio(self.operations, self.seconds) / 1e9

    @property
    def gbps(self) -> float:
        """Bytes per nanosecond, of all threads."""
        return _ratio(self.bytes, self.seconds) / 1e9

    @property
    def limit_seconds(self) -> float:
        """The least time that the operation takes on this machine."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def bound(self) -> str:
        """What the limit comes from: "compute" or "memory"."""
        return "compute" if self.compute_seconds >= self.memory_seconds else "memory"

    @property
    def share_of_limit(self) -> float:
        """limit_seconds / seconds: 1 is as fast as the machine allows."""
        return _ratio(self.limit_seconds, self.seconds)

    @property
    def share_of_peak(self) -> float | None:
        """The achieved share of the peak of the kernel's instructions; None where it is no convolution."""
        return _ratio(self.compute_seconds, self.seconds) if self.peak else None


@dataclass(frozen=True)
class Profile:
    """Operations in the order in which they run; seconds: of the fastest whole run, from call to return."""

    machine: Machine
    batch: int
    repeats: int
    seconds: float
    ops: tuple[OpProfile, ...]

    @property
    def outside_seconds(self) -> float:
        """Time of the fastest run that is in no operation: starting and waiting for threads, the loop over tiles."""
        return max(0.0, self.seconds - sum(op.seconds for op in self.ops))

    def share_of_time(self, op: OpProfile) -> float:
        """The operation's share of the whole run."""
        return _ratio(op.seconds, self.seconds)

    def worst(self, count: int = 3) -> tuple[OpProfile, ...]:
        """The operations that lose most time to their limits, most first."""
        return tuple(sorted(self.ops, key=lambda op: op.limit_seconds - op.seconds)[:count])

    def as_dict(self) -> dict[str, Any]:
        """Everything, derived numbers too, in what JSON can hold."""
        ops = [
            {
                **asdict(op),
                "bytes": op.bytes,
                "gops": op.gops,
                "gbps": op.gbps,
                "bound": op.bound,
                "share_of_limit": op.share_of_limit,
                "share_of_peak": op.share_of_peak,
                "share_of_time": self.share_of_time(op),
            }
            for op in self.ops
        ]
        total = {"batch": self.batch, "repeats": self.repeats, "seconds": self.seconds}
        worst = [op.name for op in self.worst()]
        return {
            "machine": asdict(self.machine),
            **total,
            "outside_seconds": self.outside_seconds,
            "ops": ops,
            "worst": worst,
        }


def profile(session: Session, x: ArrayLike, repeats: int = 100, *, floats: bool = False) -> Profile:
    """Time every operation of `session` at its present precision on the batch `x`.

    x, floats: as of `Session.run`, at least one image. repeats: timed runs, after a tenth as many that are not.
    Measuring the machine takes about a second more. Raises ValueError for repeats below 1, an empty batch, a session
    whose executor is not the engine, and what `Session.run` refuses.
    """
    from .engine import EngineExecutor

    if type(repeats) is not int or repeats < 1:
        raise ValueError(f"profile: repeats = {repeats!r}: must be a positive integer")
    executor = session.executor
    if not isinstance(executor, EngineExecutor):
        raise ValueError(f"profile: only the engine can be profiled, the session runs on {type(executor).__name__}")
    codes = session.encode(x, floats=floats)
    if len(codes) == 0:
        raise ValueError(f"profile: at least one image is needed, the batch has shape {codes.shape} (N, H, W, C)")
    executor.time_ops(codes, max(1, repeats // 10))
    runs = executor.time_ops(codes, repeats)
    peaks, levels = executor.measure_machine()
    known = tuple(Level(name, count or None, rate) for name, count, rate in levels)
    machine = Machine(executor.isa, executor.resources.threads, peaks, known)
    work = [executor.work(op.output) for op in executor.plan.ops]
    weights = sum(w["weight_bytes"] for w in work)
    ops = tuple(
        _op_profile(
            executor, op, w, min(times[i] for _, times in runs), batch=len(codes), machine=machine, weights=weights
        )
        for i, (op, w) in enumerate(zip(executor.plan.ops, work, strict=True))
    )
    return Profile(machine, len(codes), repeats, min(seconds for seconds, _ in runs), ops)


def _op_profile(
    executor: EngineExecutor,
    op: p.Op,
    work: dict[str, Any],
    seconds: float,
    *,
    batch: int,
    machine: Machine,
    weights: int,
) -> OpProfile:
    """seconds: of all threads together. weights: bytes of all the plan's constants, which every chunk passes by."""
    chunks = -(-batch // executor.chunk)
    counts = {key: batch * work[key] for key in ("operations", "input_bytes", "output_bytes", "scratch_bytes")}
    constants = chunks * work["weight_bytes"]
    # At best, a tile is in the nearest cache, and so is a chunk's values if they fit; weights come round once a chunk.
    tile, own = machine.levels[0], sum(work[key] for key in ("input_bytes", "output_bytes", "scratch_bytes"))
    chunk = machine.level(own * min(batch, executor.chunk))
    moved = (
        (counts["input_bytes"], tile if work["input_in_tile"] else chunk),
        (counts["output_bytes"], tile if work["output_in_tile"] else chunk),
        (2 * counts["scratch_bytes"], chunk),
        (constants, machine.level(weights + executor.arena_bytes)),
    )
    rate = 2 * machine.peaks[work["peak"]] / work["passes"] if work["peak"] else float("inf")
    value = executor.plan.values[op.output]
    return OpProfile(
        name=op.name,
        kind=type(op).__name__.lower(),
        shape=value.shape,
        kernel=executor.kernels.get(value.name, ""),
        seconds=seconds / machine.threads,
        weight_bytes=constants,
        group=work["group"],
        peak=work["peak"],
        compute_seconds=counts["operations"] / rate / machine.threads,
        memory_seconds=sum(count / level.bytes_per_second for count, level in moved) / machine.threads,
        **counts,
    )


def _ratio(a: float, b: float) -> float:
    """a / b; 0 where nothing was measured."""
    return a / b if b > 0 else 0.0
