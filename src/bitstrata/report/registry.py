"""Panels: one file each under `panels/`, found by themselves."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .markup import Markup
from .runs import Run


@dataclass(frozen=True)
class Panel:
    """A part of the page; a module of `bitstrata.report.panels` defines one as PANEL.

    title: the heading. description: one or two sentences under it, plain text. order: where on the page, ascending.
    needs: given a run, why it has nothing for this panel, in one line, or None if it has something.
    render: given the runs that have something (at least one), HTML; other text is to be escaped (`markup.el` does).
    """

    title: str
    description: str
    order: int
    needs: Callable[[Run], str | None]
    render: Callable[[Sequence[Run]], Markup]


def all_panels() -> list[Panel]:
    """Every panel, in the order of the page. TypeError for a module without one."""
    from . import panels as package

    found = []
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        panel = getattr(importlib.import_module(f"{package.__name__}.{module}"), "PANEL", None)
        if not isinstance(panel, Panel):
            raise TypeError(f"report: module {module} of bitstrata.report.panels defines no PANEL")
        found.append(panel)
    return sorted(found, key=lambda panel: (panel.order, panel.title))
