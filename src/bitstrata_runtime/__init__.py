"""bitstrata_runtime: run low-bit networks in integer arithmetic, at any bit-width they were trained for.

Needs numpy only; the compiled engine is used where it is built.

    session = bitstrata_runtime.load("model.strata", bits=1)
    logits = session.run(pixels)  # uint8 (N, C, H, W)
    session.upgrade(3)
"""

from importlib.metadata import PackageNotFoundError, version

from .derive import derive, headroom
from .errors import ArtifactError, ProgramError
from .plan import Plan
from .profile import Profile, profile
from .program import AffineInfo, Factors, Layer, Node, Program, Weights
from .session import Session, load
from .tuning import tune

try:
    __version__ = version("bitstrata")
except PackageNotFoundError:  # run from a source tree
    __version__ = "0+source"

__all__ = [
    "AffineInfo",
    "ArtifactError",
    "Factors",
    "Layer",
    "Node",
    "Plan",
    "Profile",
    "Program",
    "ProgramError",
    "Session",
    "Weights",
    "__version__",
    "available_isas",
    "derive",
    "headroom",
    "load",
    "profile",
    "tune",
]


def available_isas() -> tuple[str, ...]:
    """Instruction sets that the engine can use on this machine, slowest first; empty where the engine is not built."""
    try:
        from .engine import available_isas as isas
    except ImportError:
        return ()
    return tuple(isas())
