"""Calls that torch.compile leaves to Python: the engine computes with numpy arrays, which it cannot trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def untraced(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), with a break of the graph around it where torch.compile traces the caller."""
    if torch.compiler.is_compiling():  # a decorator would import the compiler together with this package
        function = torch.compiler.disable(function)
    return function(*args)
