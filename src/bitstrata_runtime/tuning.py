"""Which kernels and tile sizes are fastest on this machine: measured once, kept in a file, never changing a result.

    report = bitstrata_runtime.tune(session, pixels)           # measures, and adds to the file
    session = bitstrata_runtime.load("model.strata", tune=True)  # uses what the file knows

Every kernel that may be chosen computes the same integers, and tiles only order the work.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .machine import cpu_name
from .plan import Conv, Plan

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .engine import EngineExecutor, Resources
    from .session import Session

TILE_BYTES = (12 << 10, 24 << 10, 96 << 10, 192 << 10)  # beside the engine's own
VARIABLE = "BITSTRATA_TUNE_FILE"
_FORMAT = 1
_GAIN = 0.03  # what a choice must save to be taken: less is within what repeated measurements differ by


@dataclass(frozen=True)
class Choice:
    """Kernels by name of their convolution, and bytes of a tile; what is missing is the engine's own choice."""

    kernels: dict[str, str] = field(default_factory=dict)
    tile_bytes: int | None = None


@dataclass(frozen=True)
class TuneReport:
    """What tuning found: least seconds of a run with the engine's own choices and with `choice`, measured by turns.

    Where nothing was faster, the choice is empty and both times are one.
    """

    choice: Choice
    default_seconds: float
    tuned_seconds: float
    path: Path


def tune_path(tune: bool | str | os.PathLike[str] = True) -> Path:
    """The file that `tune` means: itself, or, for True, the one named by BITSTRATA_TUNE_FILE, else bitstrata/tune.json
    in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    if not isinstance(tune, bool):
        return Path(tune)
    if named := os.environ.get(VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitstrata" / "tune.json"


def machine_key(isa: str) -> str:
    """What a choice is good for: processor, instruction set and engine."""
    from . import __version__

    return f"{cpu_name()} | {isa} | {__version__}"


def conv_key(plan: Plan, op: Conv, threads: int, batch: int) -> str:
    """What else a kernel's speed depends on: sizes, precision, threads and batch."""
    x, y = plan.values[op.inputs[0]], plan.values[op.output]
    sizes = f"{x.dtype}[{x.lo},{x.hi}] {x.shape}->{y.shape} k{op.codes.shape[2:]} s{op.stride} d{op.dilation}"
    weights = f"g{op.groups} p{op.padding} w[{op.codes.min()},{op.codes.max()}]*{op.mul}+{op.add}"
    return f"{sizes} {weights} t{threads} n{batch}"


def plan_key(plan: Plan, threads: int, batch: int) -> str:
    """As `conv_key`, of a whole plan: its convolutions and its values' shapes."""
    convs = [conv_key(plan, op, threads, batch) for op in plan.ops if isinstance(op, Conv)]
    text = "\n".join([*convs, *(f"{v.shape} {v.dtype}" for v in plan.values)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read(path: Path) -> dict[str, Any]:
    """Machine key -> what is known there. A file that is absent is empty; one that is not ours is ignored, with a
    warning."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this version reads {_FORMAT}")
        _check(content["machines"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"tune: {path} is ignored, it is not a tuning file of this version: {error!r}", stacklevel=3)
        return {}
    return dict(content["machines"])


def _check(machines: Any) -> None:
    for key, known in machines.items():
        for section, kind in (("convs", str), ("tiles", int)):
            if not all(isinstance(value, kind) for value in known[section].values()):
                raise ValueError(f"{section} of {key!r} hold something else than {kind.__name__}")


def lookup(path: Path, plan: Plan, isa: str, threads: int, batch: int = 1) -> Choice:
    """What the file at `path` knows of `plan` on this machine."""
    known = read(path).get(machine_key(isa))
    if known is None:
        return Choice()
    kernels = {}
    for op in plan.ops:
        if isinstance(op, Conv) and (kernel := known["convs"].get(conv_key(plan, op, threads, batch))):
            kernels[op.name] = kernel
    return Choice(kernels, known["tiles"].get(plan_key(plan, threads, batch)))


def store(path: Path, plan: Plan, isa: str, *, threads: int, batch: int, choice: Choice) -> None:
    """Add a choice to the file at `path`, whole or not at all. Raises OSError if it cannot be written."""
    machines = read(path)
    known = machines.setdefault(machine_key(isa), {"convs": {}, "tiles": {}})
    for op in plan.ops:
        if isinstance(op, Conv):
            key = conv_key(plan, op, threads, batch)
            known["convs"].pop(key, None)
            if op.name in choice.kernels:
                known["convs"][key] = choice.kernels[op.name]
    known["tiles"].pop(plan_key(plan, threads, batch), None)
    if choice.tile_bytes is not None:
        known["tiles"][plan_key(plan, threads, batch)] = choice.tile_bytes
    path.parent.mkdir(parents=True, exist_ok=True)
    import tempfile  # with much behind it, and needed here alone

    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, "machines": machines}, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def make_executor(plan: Plan, isa: str | None, resources: Resources, path: Path) -> EngineExecutor:
    """The engine with what the file at `path` knows for single images; what it cannot use is ignored with a warning."""
    from .engine import EngineExecutor

    plain = EngineExecutor(plan, isa=isa, resources=resources)
    choice = lookup(path, plan, plain.isa, resources.threads)
    if choice == Choice():
        return plain
    try:
        return EngineExecutor(plan, isa=isa, resources=resources, choice=choice)
    except ValueError as error:
        warnings.warn(f"tune: {path} is ignored: {error}", stacklevel=2)
        return plain


def tune(
    session: Session,
    x: ArrayLike,
    *,
    path: str | os.PathLike[str] | None = None,
    repeats: int = 30,
    floats: bool = False,
) -> TuneReport:
    """Measure kernels and tile sizes for `session` at its present precision on the batch `x`, and keep the fastest.

    Choices are kept for the batch's size; `load(..., tune=...)` uses those of single images. path: of the file, None
    for `tune_path()`. repeats: runs of each candidate in each of three turns; the least time counts. x, floats: as of
    `Session.run`. Raises ValueError as `profile` does, OSError if the file cannot be written.
    """
    from .engine import EngineExecutor

    if type(repeats) is not int or repeats < 1:
        raise ValueError(f"tune: repeats = {repeats!r}: must be a positive integer")
    executor = session.executor
    if not isinstance(executor, EngineExecutor):
        raise ValueError(f"tune: only the engine can be tuned, the session runs on {type(executor).__name__}")
    codes = session.encode(x, floats=floats)
    if len(codes) == 0:
        raise ValueError(f"tune: at least one image is needed, the batch has shape {codes.shape} (N, H, W, C)")
    plan, isa, threads = executor.plan, executor.isa, executor.resources.threads

    def make(choice: Choice) -> EngineExecutor:
        return EngineExecutor(plan, isa=isa, threads=threads, choice=choice)

    kernels = _fastest_kernels(make, plan, codes, repeats)
    choices = [Choice(kernels), *(Choice(kernels, tile) for tile in TILE_BYTES)]
    totals = [least for least, _ in _least([make(choice) for choice in choices], codes, repeats)]
    best = min(range(len(choices)), key=totals.__getitem__)
    choice = choices[best if totals[best] < totals[0] * (1 - _GAIN) else 0]
    if choice != Choice():  # parts that were faster alone do not have to be so together
        (before, _), (after, _) = _least([make(Choice()), make(choice)], codes, repeats)
        choice = choice if after < before else Choice()
    if choice == Choice():
        before = after = totals[0]
    file = tune_path() if path is None else Path(path)
    store(file, plan, isa, threads=threads, batch=len(codes), choice=choice)
    return TuneReport(choice, before, after, file)


def _fastest_kernels(make: Any, plan: Plan, codes: Any, repeats: int) -> dict[str, str]:
    """The kernel of each convolution that is not fastest with the engine's own choice."""
    candidates = make(Choice()).candidates
    most = max((len(names) for names in candidates.values()), default=1)
    ranks = [{name: names[r] for name, names in candidates.items() if r < len(names)} for r in range(most)]
    times = [ops for _, ops in _least([make(Choice(rank)) for rank in ranks], codes, repeats)]
    chosen = {}
    for i, op in enumerate(plan.ops):
        names = candidates.get(op.name, [])
        if len(names) > 1:
            best = min(range(len(names)), key=lambda r: times[r][i])
            if times[best][i] < times[0][i] * (1 - _GAIN):
                chosen[op.name] = names[best]
    return chosen


def _least(executors: list[EngineExecutor], codes: Any, repeats: int) -> list[tuple[float, list[float]]]:
    """Least seconds of a run and of each operation, of every executor; they take turns, so that all see the same."""
    runs: list[list[tuple[float, list[float]]]] = [[] for _ in executors]
    for turn in range(4):
        for executor, found in zip(executors, runs, strict=True):
            timed = executor.time_ops(codes, repeats)
            if turn > 0:  # the first warms up
                found.extend(timed)
    return [
        (min(seconds for seconds, _ in found), [min(times) for times in zip(*(ops for _, ops in found), strict=True)])
        for found in runs
    ]
