"""Exceptions of the runtime. A caller that loads artifacts needs to catch one type only."""

from __future__ import annotations


class ArtifactError(ValueError):
    """An artifact, or the program in it, cannot be read or does not make sense."""


class ProgramError(ArtifactError):
    """A program is malformed, or has no plan at the requested precision (an accumulator would overflow, ...)."""
