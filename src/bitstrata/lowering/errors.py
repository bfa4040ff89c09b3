"""The errors that lowering raises."""

from __future__ import annotations

from collections.abc import Sequence


class LowerError(ValueError):
    """A model that has no integer program; the message names the module or operation and what to do about it."""


class UnsupportedError(LowerError):
    """Operations of a model that have no integer form, all of them.

    problems: one line each, naming the operation, the module, and what to put in its place.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(f"lower: {self.problems[0]}")
        else:
            lines = "".join(f"\n  ({i}) {problem}" for i, problem in enumerate(self.problems, 1))
            super().__init__(f"lower: {len(self.problems)} operations of the model have no integer form:{lines}")

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple[tuple[str, ...]]]:
        return UnsupportedError, (self.problems,)


class NoFormError(UnsupportedError):
    """One operation that has no integer form, whatever its inputs are."""

    def __init__(self, problem: str) -> None:
        super().__init__([problem])

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple[tuple[str, ...]]]:
        return UnsupportedError, (self.problems,)
