"""L1 and L2 norms of what batch normalizations read, and how well eight bits hold the reciprocal of each.

Source: Guo, Liu et al., "Towards accurate and efficient sub-8-bit integer training", appendix C, eqs. 39 to 42, figures
11 and 12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional.l1norm import symmetric_dynamic
from ..fused import FusedNetwork
from ..nn.l1_norm import L1BatchNorm
from ..nn.norm import PrecisionBatchNorm
from .kept import kept


@dataclass(frozen=True)
class NormReading:
    """A norm sigma of x - mean, a channel, and its code: sigma^q = step * code, code = 1..2^(bits-1) - 1.

    norm: mean of sigma over channels. gap: mean of |1/sigma^q - 1/sigma|, in the units of 1/sigma (figure 12).
    relative: mean of |sigma / sigma^q - 1|, which a factor common to all channels does not change. Channels whose
    sigma is 0 do not count in the last two, which are 0 if none is left.
    """

    norm: float
    gap: float
    relative: float


@dataclass(frozen=True)
class NormStatistics:
    """One normalization's input. l1: by |x - mean|_1, l2: by |x - mean|_2, sums over the elements of a channel as eq.
    39 prints them. channels; count: elements a channel."""

    channels: int
    count: int
    l1: NormReading
    l2: NormReading

    @property
    def ratio(self) -> float:
        """Mean absolute deviation by standard deviation, of the channels' means: the norms' ratio that is left when
        both are divided by their counts, sqrt(2/pi) = 0.798 for Gaussian channels; 1 for constant ones."""
        return self.l1.norm / (self.l2.norm * self.count**0.5) if self.l2.norm else 1.0


def norm_statistics(
    model: nn.Module, inputs: Any, *, bits: int = 8, training: bool | None = None
) -> dict[str, NormStatistics]:
    """Both norms of the input of every batch normalization, whichever of them it divides by itself.

    The code of a norm is that of a fully quantized normalization: one step a layer, from the largest channel, rounded
    to nearest, at least 1. Mean and norms are those of the unquantized input, in float64.

    Normalizations: torch's BatchNorm and the L1 batch normalizations, float or quantized, in the order they run; of one
    that runs several times, the first run. One forward pass; the model is left as it was.

    Args:
        inputs: a tensor, or a tuple of positional arguments, as the model's forward takes them.
        bits: of the norms' codes, 2..8.
        training: True or False for that mode of the model in the pass; None leaves every module in the mode it has.

    Returns:
        Qualified name -> its norms; a normalization with a form for every precision is one name. Empty where none runs.

    Raises:
        ValueError: bits out of range; a fused network; an input that is not finite or has no elements, with the name of
            the normalization.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"norm_statistics: bits must be an integer in 2..8, got {bits!r}")
    if any(isinstance(module, FusedNetwork) for module in model.modules()):
        raise ValueError(
            "norm_statistics: the layers of a fused network do not run one by one; give the network it was made of, "
            "its attribute `model`"
        )
    found: dict[str, NormStatistics] = {}
    handles = [norm.register_forward_pre_hook(_note(name, bits, found)) for name, norm in _norms(model)]
    try:
        with kept(model, training=training), torch.no_grad():
            model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module; the forms that a normalization has for precisions by its name."""
    modules = list(model.named_modules())
    owners = {
        id(level): name for name, m in modules if isinstance(m, PrecisionBatchNorm) for level in m.levels.values()
    }
    return [(owners.get(id(m), name), m) for name, m in modules if isinstance(m, _BatchNorm | L1BatchNorm)]


def _note(name: str, bits: int, found: dict[str, NormStatistics]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(_norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        if name in found:
            return
        x = args[0].detach()
        if x.dim() < 2 or x.numel() == 0 or not bool(x.isfinite().all()):
            raise ValueError(
                f"norm_statistics: the input of {name!r} must be (N, C, ...), finite and not empty, got shape "
                f"{tuple(x.shape)}"
            )
        found[name] = channel_norms(x, bits)

    return note


def channel_norms(x: Tensor, bits: int = 8) -> NormStatistics:
    """The norms of x (N, C, ...), a channel; bits as for `norm_statistics`."""
    rows = x.double().movedim(1, 0).reshape(x.shape[1], -1)
    centered = rows - rows.mean(1, keepdim=True)
    l1, l2 = centered.abs().sum(1), centered.square().sum(1).sqrt()
    return NormStatistics(rows.shape[0], rows.shape[1], _read(l1, bits), _read(l2, bits))


def _read(sigma: Tensor, bits: int) -> NormReading:
    used = sigma[sigma > 0]
    if not used.numel():
        return NormReading(0.0, 0.0, 0.0)
    codes = symmetric_dynamic(used, bits)
    quantized = codes.step * codes.codes.clamp(min=1)
    gap, relative = (1 / quantized - 1 / used).abs(), (used / quantized - 1).abs()
    return NormReading(float(sigma.mean()), float(gap.mean()), float(relative.mean()))
