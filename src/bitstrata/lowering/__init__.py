"""lower: from a trained model to an integer-only program; pack: from a program to an artifact."""

from .errors import LowerError
from .factors import program_factors
from .lower import lower
from .report import program_summary
from .write import pack

__all__ = ["LowerError", "lower", "pack", "program_factors", "program_summary"]
