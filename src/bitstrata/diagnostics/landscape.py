"""The loss along random directions through a model's parameters, each filter's part as long as the filter.

Source: Li, Xu, Taylor, Studer, Goldstein, "Visualizing the loss landscape of neural nets", NeurIPS 2018, section 4;
Guo, Liu et al., "Towards accurate and efficient sub-8-bit integer training", figure 4, compares such surfaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..nn.l1_layer_norm import L1LayerNorm
from ..nn.running_norm import RunningNorm
from .kept import kept

Loss = Callable[[nn.Module, Any], Tensor]
Moves = Callable[[str, nn.Parameter], bool]
NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, L1LayerNorm, RunningNorm)


@dataclass(frozen=True, eq=False)
class Landscape:
    """Losses on a line or a square grid around a model's parameters, which are its centre.

    Attributes:
        x: float64 (points,), multiples of the first direction. y: those of the second, None on a line.
        loss: float64, (points,) on a line, else (points, points): loss[i, j] is that at y[i], x[j]. NaN and infinity
            are what the model gave.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64] | None
    loss: NDArray[np.float64]

    @property
    def center(self) -> float:
        """The loss of the parameters themselves."""
        return float(self.loss[(self.x.size // 2,) * self.loss.ndim])

    def share_within(self, height: float) -> float:
        """The share of the points whose loss is at most the centre's plus `height`: 0..1, small where it is steep.

        Points of NaN are not within.
        """
        return float((self.loss <= self.center + height).mean())

    def local_minima(self) -> int:
        """The number of inner points whose loss is below that of all 2 or 8 neighbours: 1 for a bowl, more for a rough
        surface. NaN is below nothing and above nothing."""
        inner = self.loss[(slice(1, -1),) * self.loss.ndim]
        lowest = np.ones(inner.shape, dtype=bool)
        for offset in np.ndindex((3,) * self.loss.ndim):
            if any(o != 1 for o in offset):
                window = tuple(slice(o, o + n) for o, n in zip(offset, inner.shape, strict=True))
                lowest &= inner < self.loss[window]
        return int(lowest.sum())


def loss_landscape(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    points: int = 21,
    radius: float = 1.0,
    dimensions: int = 2,
    seed: int = 0,
    training: bool | None = False,
    moves: Moves | None = None,
) -> Landscape:
    """The loss at theta + a d1 + b d2, a and b in -radius..radius, for random directions normalized by filter.

    A direction is Gaussian; then each filter d_i, an index of a tensor's first dimension, becomes d_i |w_i| / |d_i|, so
    that networks whose weights differ by scales that normalizations cancel compare fairly. Biases and the parameters of
    normalizations do not move. Models with parameters of the same shapes in the same order draw the same Gaussians, so
    a float network and its integer form are seen along corresponding directions.

    All points see the same batches and the same random numbers of torch's default generator on the CPU (dropout,
    stochastic rounding of activations). No gradients are computed. The model is left as it was, also behind an error.

    Args:
        model: any; for quantized models the float masters move.
        loss: called with (model, batch), gives one number as a tensor.
        batches: what `loss` takes; read once and held in memory. Each counts the same in the mean, so make them equally
            large.
        points: an odd number of at least 3 in each direction; the middle one is the model itself.
        radius: in lengths of the filters; 1 replaces a weight by something as large.
        dimensions: 2 for a surface, 1 for a line along d1.
        seed: of the directions.
        training: False evaluates: normalizations use the running statistics that belong to the centre. True is the
            training mode: normalizations use the statistics of each batch, so the surface is the one that training
            descends, dropout is active, and nothing remains of the running statistics' updates. None leaves every
            module in the mode it has.
        moves: called with (qualified name, parameter), says which parameters move; None for all floating ones of two
            dimensions or more that are no "bias" and belong to no normalization.

    Raises:
        ValueError: an option out of range; no batches; no parameter moves, or one that does is not finite; a loss that
            is not one number.
    """
    _check(points, radius, dimensions)
    held = list(batches)
    if not held:
        raise ValueError("loss_landscape: batches is empty, so there is no loss")
    chosen = _moving(model, moves)
    generator = torch.Generator().manual_seed(seed)
    directions = [filter_direction(chosen, generator) for _ in range(dimensions)]
    axis = np.linspace(-radius, radius, points)
    axis[points // 2] = 0.0
    values = np.empty((points,) * dimensions)
    with kept(model, training=training), torch.no_grad():
        start = torch.get_rng_state()
        origin = [p.clone() for p in chosen]
        for index in np.ndindex(values.shape):
            steps = [float(axis[i]) for i in reversed(index)]  # the last dimension runs along the first direction
            for i, (parameter, center) in enumerate(zip(chosen, origin, strict=True)):
                moved = center
                for length, direction in zip(steps, directions, strict=True):
                    moved = moved + length * direction[i] if length else moved
                parameter.copy_(moved)
            torch.set_rng_state(start)
            values[index] = _mean(model, loss, held)
    return Landscape(axis, axis.copy() if dimensions == 2 else None, values)


def filter_direction(parameters: Iterable[Tensor], generator: torch.Generator) -> list[Tensor]:
    """A Gaussian direction whose filters have the lengths of the parameters' filters (Li et al., section 4).

    Args:
        parameters: floating, one dimension or more; a filter is an index of the first. generator: on the CPU.

    Returns:
        A tensor for each, of its shape, dtype and device. A filter of zeros has a direction of 0.
    """
    result = []
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).double()
        rows = noise.reshape(parameter.shape[0], -1)
        lengths = parameter.detach().double().cpu().reshape(rows.shape).norm(dim=1, keepdim=True)
        own = rows.norm(dim=1, keepdim=True)
        rows = rows * torch.where(own > 0, lengths / own, 0.0)
        result.append(rows.reshape(parameter.shape).to(parameter.device, parameter.dtype))
    return result


def _check(points: int, radius: float, dimensions: int) -> None:
    if isinstance(points, bool) or not isinstance(points, int) or points < 3 or points % 2 == 0:
        raise ValueError(f"loss_landscape: points must be an odd integer of at least 3, got {points!r}")
    if not 0 < radius < float("inf"):
        raise ValueError(f"loss_landscape: radius must be positive and finite, got {radius!r}")
    if dimensions not in (1, 2):
        raise ValueError(f"loss_landscape: dimensions must be 1 or 2, got {dimensions!r}")


def _moving(model: nn.Module, moves: Moves | None) -> list[nn.Parameter]:
    resting = {id(p) for m in model.modules() if isinstance(m, NORMALIZATIONS) for p in m.parameters(recurse=False)}

    def weights(name: str, parameter: nn.Parameter) -> bool:
        return parameter.dim() >= 2 and id(parameter) not in resting and name.rpartition(".")[2] != "bias"

    choose = moves or weights
    found = [(name, p) for name, p in model.named_parameters() if p.is_floating_point() and choose(name, p)]
    if not any(p.numel() for _, p in found):
        raise ValueError(f"loss_landscape: no parameter of {type(model).__name__} moves")
    for name, parameter in found:
        if parameter.dim() == 0:
            raise ValueError(f"loss_landscape: parameter {name!r} has no dimensions, so no filters, and cannot move")
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"loss_landscape: parameter {name!r} contains NaN or infinity, so it has no length")
    return [p for _, p in found]


def _mean(model: nn.Module, loss: Loss, batches: list[Any]) -> float:
    total = 0.0
    for batch in batches:
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss_landscape: loss must give one number as a tensor, got {shown}")
        total += float(value)
    return total / len(batches)
