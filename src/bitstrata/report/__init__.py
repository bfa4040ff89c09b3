"""One page that shows runs: `write` makes it from run directories, with no need of torch.

A run directory is what `bitstrata train` and `quantize` write, or a Trainer's `out_dir`. Reading order: runs (what is
read), registry and panels/ (what is shown), page; markup, chart, curves and look are what panels draw with.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .chart import require
from .page import document
from .registry import Panel, all_panels
from .runs import Run, read, read_all

__all__ = ["Panel", "Run", "all_panels", "read", "write"]


def write(
    runs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    path: str | os.PathLike[str],
    title: str | None = None,
) -> Path:
    """Write a self-contained HTML page about run directories, whole or not at all; returns its path.

    runs: one directory or several; those that differ in nothing but the seed are shown together, with their spread.
    What is missing or damaged in a run is said on the page. title: by default the run's name, or how many there are.

    Raises:
        OSError: a directory that does not exist or cannot be read, or a page that cannot be written.
        ValueError: no directory given. ModuleNotFoundError: without matplotlib.
    """
    require()
    found = read_all([runs] if isinstance(runs, str | os.PathLike) else runs)
    heading = title or (found[0].name if len(found) == 1 else f"Report on {len(found)} runs")
    target = Path(path)
    text = document(found, heading)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)
    return target
