"""What `bitstrata inspect` measures at the widest precision: gradients by channel, norms, the loss surface."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bitstrata.cli.common import CommandError
from bitstrata.data import Dataset, Loader
from bitstrata.diagnostics import (
    Landscape,
    LayerRanges,
    NormReading,
    NormStatistics,
    gradient_ranges,
    loss_landscape,
    norm_statistics,
    plot_landscape,
    plot_norms,
    plot_ranges,
)
from bitstrata.fused import FuseError, fuse

DIGITS = 5  # significant ones, in the file
GROUPS = 4


def check(points: int) -> None:
    """CommandError unless a surface of so many points is possible, or 0."""
    if points and (points < 3 or points % 2 == 0):
        raise CommandError(f"--landscape {points}: expected an odd number of at least 3, or 0 for no surface")


def measure(model: nn.Module, data: Dataset, images: int, points: int) -> dict[str, Any]:
    """Parts of inspect.json, as JSON values: "gradients" and "normalizations" by layer, "landscape" or None.

    In training mode, by the statistics of the one batch; the model is left as it was.
    """
    batch = Loader(data, min(images, len(data)), train=False).batch(0, 0)
    gradients = gradient_ranges(model, _loss, batch, groups=GROUPS, training=True)
    norms = norm_statistics(model, batch[0], training=True)
    surface = None
    if points:
        surface = loss_landscape(_fastest(model), _loss, [batch], points=points, training=True)
    return {
        "gradients": {name: _plain(dataclasses.asdict(one)) for name, one in gradients.items()},
        "normalizations": {name: _plain(dataclasses.asdict(one)) for name, one in norms.items()},
        "landscape": surface and {"axis": _plain(surface.x.tolist()), "loss": _plain(surface.loss.tolist())},
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Tables of gradients and norms, and a line on the surface."""
    table = Table(title=f"gradients by channel; {GROUPS} groups", title_justify="left")
    for column in ("layer", "channels", "near zero", "range / own, tensor", "range / own, groups", "channels a group"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, layer in _ranges(found).items():
        sizes = " ".join(str(layer.groups.count(e)) for e in range(GROUPS))
        shown = (f"{layer.near_zero():.1%}", f"{layer.diversity:.2f}", f"{layer.grouped:.2f}", sizes)
        table.add_row(name, str(layer.channels), *shown)
    console.print(table)
    if found["normalizations"]:
        table = Table(title="norms of normalizations' inputs, in 8 bits", title_justify="left")
        for column in ("layer", "L1 norm", "L2 norm", "gap of 1/L1", "gap of 1/L2"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for name, one in _norms(found).items():
            cells = (f"{one.l1.norm:.4g}", f"{one.l2.norm:.4g}", f"{one.l1.relative:.2%}", f"{one.l2.relative:.2%}")
            table.add_row(name, *cells)
        console.print(table)
    if found["landscape"]:
        surface = _surface(found)
        console.print(
            f"Loss surface: {surface.center:.4g} at the weights; {surface.share_within(1.0):.0%} of the points within "
            f"1 above it; local minima: {surface.local_minima()}."
        )


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """inspect-gradients.png, inspect-norms.png and inspect-landscape.png, where there is something to draw."""
    written = [folder / "inspect-gradients.png"]
    plot_ranges(_ranges(found), written[0])
    if found["normalizations"]:
        written.append(folder / "inspect-norms.png")
        plot_norms(_norms(found), written[-1])
    if found["landscape"]:
        written.append(folder / "inspect-landscape.png")
        plot_landscape({"loss around the weights": _surface(found)}, written[-1])
    return written


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _fastest(model: nn.Module) -> nn.Module:
    """The fused form, which gives the same losses, where there is one."""
    try:
        return fuse(model)
    except FuseError:
        return model


def _ranges(found: dict[str, Any]) -> dict[str, LayerRanges]:
    return {name: LayerRanges(**values) for name, values in found["gradients"].items()}


def _norms(found: dict[str, Any]) -> dict[str, NormStatistics]:
    def read(values: dict[str, Any]) -> NormStatistics:
        parts = {norm: NormReading(**values[norm]) for norm in ("l1", "l2")}
        return NormStatistics(values["channels"], values["count"], **parts)

    return {name: read(values) for name, values in found["normalizations"].items()}


def _surface(found: dict[str, Any]) -> Landscape:
    import numpy as np

    axis = np.array(found["landscape"]["axis"])
    return Landscape(axis, axis, np.array(found["landscape"]["loss"], dtype=float))  # None becomes NaN


def _plain(value: Any) -> Any:
    """JSON values with few digits; None stands for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
