"""`bitstrata recipes`: what can be trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import tyro

from bitstrata.cli.common import choose, need_training


@dataclass(frozen=True)
class Recipes:
    """List the quantization recipes, or print the parts and fields of one."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Recipe whose parts and fields to print."""

    def run(self) -> None:
        """Print a table of names and descriptions, or one recipe's parts."""
        need_training("recipes")
        from bitstrata import recipes
        from bitstrata.recipes.base import describe

        if self.name is None:
            names = recipes.names()
            width = max(map(len, names))
            for name in names:
                print(f"{name:{width}}  {recipes.get(name).description}")
            return
        name = choose(self.name, recipes.names(), "recipe")
        print(recipes.get(name))
        make = describe(name).make
        fields = ", ".join(_fields(make))
        print(f"\nfields (--set NAME=VALUE): {fields}\n\n{inspect.getdoc(make)}")


def _fields(make: Callable[..., object]) -> list[str]:
    return [f"{name}={p.default!r}" for name, p in inspect.signature(make).parameters.items()]
