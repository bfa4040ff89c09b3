"""Recipes: frozen, named compositions of parts.

`strata(...)` is the flagship; `names()` lists all, `get()` makes one.
"""

from .base import Part, Recipe, get, names, register
from .builtin import lsq, strata

__all__ = ["Part", "Recipe", "get", "lsq", "names", "register", "strata"]
