"""What a session runs its plans with: the compiled engine, or one of the executors in numpy."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .plan import Plan
from .reference import OracleExecutor, ReferenceExecutor
from .snapshot import Executor
from .tuning import make_executor, tune_path

if TYPE_CHECKING:
    from .engine import Resources


class Backend(Protocol):
    """Makes executors, which share threads and memory for intermediate values."""

    @property
    def threads(self) -> int: ...

    def make(self, plan: Plan) -> Executor: ...

    def set_threads(self, threads: int) -> None: ...

    def constant_bytes(self, executor: Executor) -> int:
        """Memory that an executor made here holds beside its plan."""
        ...

    def workspace_bytes(self) -> int: ...

    def trim(self, executors: list[Executor]) -> None:
        """Give back memory for intermediate values that none of these executors needs."""
        ...


class NumpyBackend:
    """Executors that run on their caller's thread and hold nothing between runs; `threads` changes nothing."""

    def __init__(self, make: Callable[[Plan], Executor], threads: int) -> None:
        self.make = make
        self.threads = threads

    def set_threads(self, threads: int) -> None:
        self.threads = threads

    def constant_bytes(self, executor: Executor) -> int:
        return 0

    def workspace_bytes(self) -> int:
        return 0

    def trim(self, executors: list[Executor]) -> None:
        pass


class EngineBackend:
    """The compiled engine. `ImportError` where it is not built."""

    def __init__(self, isa: str | None, threads: int, tuned: Path | None = None) -> None:
        from .engine import EngineExecutor, Resources

        self._executor = EngineExecutor
        self._isa = isa
        self._tuned = tuned  # file of choices
        self._resources: Resources = Resources(threads)

    @property
    def threads(self) -> int:
        return self._resources.threads

    def make(self, plan: Plan) -> Executor:
        if self._tuned is not None:
            return make_executor(plan, self._isa, self._resources, self._tuned)
        return self._executor(plan, isa=self._isa, resources=self._resources)

    def set_threads(self, threads: int) -> None:
        self._resources.set_threads(threads)

    def constant_bytes(self, executor: Executor) -> int:
        assert isinstance(executor, self._executor)
        return executor.constant_bytes

    def workspace_bytes(self) -> int:
        return self._resources.bytes

    def trim(self, executors: list[Executor]) -> None:
        needed = [executor.run_bytes for executor in executors if isinstance(executor, self._executor)]
        self._resources.trim(max(needed, default=0))


def check_threads(threads: int) -> int:
    """`threads`; ValueError unless it is a positive integer."""
    if type(threads) is not int or threads < 1:
        raise ValueError(f"threads = {threads!r}: must be a positive integer")
    return threads


def choose_backend(
    executor: str | None, isa: str | None, threads: int, tune: bool | str | os.PathLike[str] = False
) -> Backend:
    """The backend for the arguments of `session.load`, which states the errors."""
    check_threads(threads)
    if executor not in (None, "engine", "reference", "oracle"):
        raise ValueError(f"executor = {executor!r}: must be 'engine', 'reference', 'oracle' or None")
    if executor in (None, "engine"):
        try:
            return EngineBackend(isa, threads, None if tune is False else tune_path(tune))
        except ImportError as error:
            if executor == "engine" or isa is not None:
                raise ImportError(f"the engine is not available: {error}") from error
            warnings.warn(f"the engine is not available ({error}); using the slow reference", stacklevel=3)
            return NumpyBackend(ReferenceExecutor, threads)
    if isa is not None:
        raise ValueError(f"isa = {isa!r}: only the engine has instruction sets, the executor is {executor!r}")
    if tune is not False:
        raise ValueError(f"tune = {tune!r}: only the engine can be tuned, the executor is {executor!r}")
    return NumpyBackend(ReferenceExecutor if executor == "reference" else OracleExecutor, threads)
