"""What a table can measure of a trained network, by name. Each gives one number, or one a precision (`name@bits`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..data import Loader
from ..diagnostics import nonzero_activations, nonzero_weights
from ..prepare import precision, precisions
from ..train import evaluate

Batches = Iterable[tuple[Tensor, Tensor]] | Loader
Value = Callable[[nn.Module, Iterable[tuple[Tensor, Tensor]]], float]
METRICS = ("accuracy", "loss", "nonzero_weights", "nonzero_activations")


def measure(names: Sequence[str], model: nn.Module, loader: Batches) -> dict[str, float]:
    """The metrics `names` of a network in evaluation mode, in percent but for the loss.

    Args:
        names: some of "accuracy" (top-1), "loss" (mean cross entropy), "nonzero_weights", "nonzero_activations" (MaQD's
            R_w and R_a).
        loader: `bitstrata.data.Loader` or an iterable of (images, labels) that can be read several times.

    Returns:
        Metric -> value; for a quantized network "accuracy@2" and so on, one a precision.

    Raises:
        ValueError: an unknown name.
    """
    unknown = sorted(set(names) - set(METRICS))
    if unknown:
        raise ValueError(f"reproduce: metric {unknown[0]!r} is unknown; there are: {', '.join(METRICS)}")
    found: dict[str, float] = {}
    for name in names:
        if name == "accuracy":
            for level, value in evaluate(model, _batches(loader)).items():
                found[name if level == "float" else f"{name}@{level}"] = 100 * value
        else:
            found.update(_each(name, model, _OTHERS[name], loader))
    return found


def _each(name: str, model: nn.Module, value: Value, loader: Batches) -> dict[str, float]:
    known = precisions(model)
    if not known:
        return {name: value(model, _batches(loader))}
    found = {}
    for p in known:
        with precision(model, p):
            found[f"{name}@{p}"] = value(model, _batches(loader))
    return found


def _batches(loader: Batches) -> Iterable[tuple[Tensor, Tensor]]:
    return loader.epoch(0) if isinstance(loader, Loader) else loader


@torch.no_grad()
def _loss(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    total, count = 0.0, 0
    for images, labels in batches:
        total += float(nn.functional.cross_entropy(model(images), labels, reduction="sum"))
        count += len(labels)
    return total / max(count, 1)


_OTHERS: dict[str, Value] = {
    "loss": _loss,
    "nonzero_weights": lambda model, _: 100 * nonzero_weights(model).pooled,
    "nonzero_activations": lambda model, batches: 100 * nonzero_activations(model, (x for x, _ in batches)).pooled,
}
