"""What a model has that integers cannot do, gathered over one walk so that it is told at once."""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from .errors import LowerError, NoFormError, UnsupportedError
from .ops import as_map
from .trace import where

_MOST_NAMES = 20  # places named of one kind of problem


class Problems:
    """Problems by node, in the order of the walk."""

    def __init__(self) -> None:
        self._found: dict[fx.Node, str] = {}
        self._failed: set[fx.Node] = set()

    def add(self, node: fx.Node, error: LowerError) -> None:
        """Note a problem; one that may only follow from another, in front of it, is left out.

        Raises `error` itself where it is of another kind: a matter of the recipe, or of numbers.
        """
        follows = any(parent in self._failed for parent in node.all_input_nodes)
        if not isinstance(error, UnsupportedError) and not follows:
            raise error
        if isinstance(error, NoFormError) or (isinstance(error, UnsupportedError) and not follows):
            self._found[node] = error.problems[0]
        self._failed.add(node)

    def shape(self, node: fx.Node, value: Any) -> tuple[int, int, int]:
        """Shape of the value that the node would have, to go on with; raises what is known if there is none."""
        try:
            return as_map(value, where(node))
        except (LowerError, TypeError):
            self.raise_if_any()
            raise

    def raise_if_any(self) -> None:
        """UnsupportedError for what has been found, places with the same problem in one line."""
        places: dict[str, list[str]] = {}
        for text in self._found.values():
            place, problem = _split(text)
            places.setdefault(problem, []).append(place)
        if places:
            raise UnsupportedError([f"{_listed(names)}{problem}" for problem, names in places.items()])


def _split(text: str) -> tuple[str, str]:
    """("module 'a.b'", " of type SiLU has ..."): the place, and what is the same at every such place."""
    found = re.match(r"(?:module '[^']*'|'[^']*' in (?:module '[^']*'|the model's forward))", text)
    return (found.group(), text[found.end() :]) if found else ("", text)


def _listed(names: list[str]) -> str:
    shown = ", ".join(dict.fromkeys(names[:_MOST_NAMES]))
    return f"{shown} and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else shown
