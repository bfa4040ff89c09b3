"""Where and with what the runs were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..markup import Markup, details, el, table
from ..registry import Panel
from ..runs import INCIDENTAL, Run

FIELDS = ("cpu", "cores", "platform", "isa", "executor", "commit")


def needs(run: Run) -> str | None:
    """A description of the machine, or options."""
    return None if run.config or any(name in run.results for name in FIELDS) else "neither config.json nor results.json"


def render(runs: Sequence[Run]) -> Markup:
    """The machines and versions, the options in which runs differ, and behind a summary all options."""
    names = [run.name for run in runs]
    facts = [dict(_facts(run.results)) for run in runs]
    options = [{key: run.config[key] for key in sorted(run.config)} for run in runs]
    keys = dict.fromkeys(key for option in options for key in option)
    told = [key for key in keys if key == "seed" or key not in INCIDENTAL]
    unequal = [key for key in told if len({_shown(option.get(key)) for option in options}) > 1]
    differing = [{key: option[key] for key in unequal if key in option} for option in options]
    return el(
        "div",
        _side_by_side("Machine and versions", names, facts),
        _side_by_side("Options that differ", names, differing),
        details("All options", _side_by_side("Options", names, options)) if keys else Markup(),
    )


def _side_by_side(caption: str, names: Sequence[str], columns: Sequence[dict[str, Any]]) -> Markup:
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [[key.replace("_", " "), *(_shown(column.get(key)) for column in columns)] for key in keys]
    return table(caption, ["name", *names], rows, words=True) if rows else Markup()


def _facts(results: dict[str, Any]) -> list[tuple[str, Any]]:
    versions = results.get("versions")
    found = [(name, results[name]) for name in FIELDS if name in results]
    found = [(name, str(value)[:12] if name == "commit" and value else value) for name, value in found]
    return found + (sorted(versions.items()) if isinstance(versions, dict) else [])


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return ", ".join(map(str, value)) or "–" if isinstance(value, list) else str(value)


PANEL = Panel(
    "Environment and options", "What a result needs beside it to be compared with another.", 80, needs, render
)
