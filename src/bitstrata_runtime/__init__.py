"""bitstrata_runtime: run low-bit networks in integer arithmetic, at any bit-width they were trained for.

Needs numpy only; the compiled engine is used where it is built.

    session = bitstrata_runtime.load("model.strata", bits=1)
    logits = session.run(pixels)  # uint8 (N, C, H, W)
    session.upgrade(3)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .derive import derive, headroom
from .errors import ArtifactError, ProgramError
from .lookup import as_tables
from .plan import Plan
from .profile import Profile, profile
from .program import AffineInfo, Factors, Layer, Node, Program, Weights
from .session import Memory, Session, load
from .snapshot import Snapshot
from .thresholds import as_thresholds
from .tuning import tune

__all__ = [
    "AffineInfo",
    "ArtifactError",
    "Factors",
    "Layer",
    "Memory",
    "Node",
    "Plan",
    "Profile",
    "Program",
    "ProgramError",
    "Session",
    "Snapshot",
    "Weights",
    "__version__",
    "as_tables",
    "as_thresholds",
    "available_isas",
    "derive",
    "headroom",
    "kernel_table",
    "load",
    "profile",
    "tune",
]


if TYPE_CHECKING:
    from .engine import KernelRow


def available_isas() -> tuple[str, ...]:
    """Instruction sets that the engine can use on this machine, slowest first; empty where the engine is not built."""
    try:
        from .engine import available_isas as isas
    except ImportError:
        return ()
    return tuple(isas())


def kernel_table() -> tuple[KernelRow, ...]:
    """The engine's instruction sets, with what this machine lacks for those that it cannot run, and which one is used.

    Slowest first; empty where the engine is not built.
    """
    try:
        from .engine import kernel_table as table
    except ImportError:
        return ()
    return table()


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for: what reads it takes longer to import than this package."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("bitstrata")
    except PackageNotFoundError:  # run from a source tree
        return "0+source"
