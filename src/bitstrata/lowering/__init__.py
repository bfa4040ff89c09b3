"""lower: from a trained model to an integer-only program; pack: from a program to an artifact."""

from .errors import LowerError, UnsupportedError
from .factors import program_factors
from .lower import lower
from .plans import add_plan, reestimated
from .report import program_summary
from .trace import double_copy
from .write import pack

__all__ = [
    "LowerError",
    "UnsupportedError",
    "add_plan",
    "double_copy",
    "lower",
    "pack",
    "program_factors",
    "program_summary",
    "reestimated",
]
