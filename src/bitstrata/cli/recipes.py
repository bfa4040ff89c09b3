"""`bitstrata recipes`: what can be trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from bitstrata.cli.common import choose, need_training


@dataclass(frozen=True)
class Recipes:
    """List the quantization recipes, or print the parts of one."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Recipe whose parts to print."""

    def run(self) -> None:
        """Print a table of names and descriptions, or one recipe's parts."""
        need_training("recipes")
        from bitstrata import recipes

        if self.name is None:
            names = recipes.names()
            width = max(map(len, names))
            for name in names:
                print(f"{name:{width}}  {recipes.get(name).description}")
            return
        print(recipes.get(choose(self.name, recipes.names(), "recipe")))
