"""Recipes: frozen, named compositions of parts.

`strata(...)` is the flagship; `names()` lists all, `get()` makes one.
"""

from .base import Objective, Part, Recipe, Schedule, get, names, register
from .baselines import cg_pact, dorefa, int8, lsq, lsq_plus, pact
from .integers import shiftquant
from .papers import adabits, ascending, maqd, sat, uniq, vertical
from .strata import strata

__all__ = [
    "Objective",
    "Part",
    "Recipe",
    "Schedule",
    "adabits",
    "ascending",
    "cg_pact",
    "dorefa",
    "get",
    "int8",
    "lsq",
    "lsq_plus",
    "maqd",
    "names",
    "pact",
    "register",
    "sat",
    "shiftquant",
    "strata",
    "uniq",
    "vertical",
]
