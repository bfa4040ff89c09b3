"""The table of kernels, as `bitstrata bench --isa` prints it; needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence

from bitstrata.cli.common import CommandError, cpu_name, output

LIST = "list"  # as an instruction set: print the table


def fill_in(arguments: Sequence[str]) -> list[str]:
    """Arguments in which an `--isa` of bench without a value has the value LIST."""
    filled: list[str] = []
    for i, argument in enumerate(arguments):
        filled.append(argument)
        if arguments[0] == "bench" and argument == "--isa" and (arguments[i + 1 : i + 2] or ["-"])[0].startswith("-"):
            filled.append(LIST)
    return filled


def print_kernel_table() -> None:
    """Every row, whether it runs here, what it lacks if not, which one is used, and what BITSTRATA_ISA says."""
    from rich.table import Table

    from bitstrata_runtime import kernel_table

    rows = kernel_table()
    if not rows:
        raise CommandError("bench --isa: the engine is not built here, so there are no kernels")
    shown = Table(title=f"Instruction sets, slowest first, {cpu_name()}", title_justify="left")
    for column in ("isa", "runs here", "used", "lacks"):
        shown.add_column(column)
    for row in rows:
        runs = "no" if row.lacks else "yes, emulated: only where named" if row.emulated else "yes"
        shown.add_row(row.isa, runs, "yes" if row.chosen else "", row.lacks)
    output().print(shown)
    setting = os.environ.get("BITSTRATA_ISA", "")
    wrong = "" if not setting or any(row.chosen for row in rows) else ", which cannot run here: it is refused"
    output().print(
        f"BITSTRATA_ISA is {setting!r}{wrong}" if setting else "BITSTRATA_ISA is not set: the fastest is used"
    )
