"""Training losses between logits and class labels, by name."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of softmax(logits), one element.

    Args:
        logits: (N, K), floating.
        targets: (N,) class numbers of any integer dtype, or (N, K) probabilities.
        label_smoothing: probability mass in [0, 1) spread evenly over all classes.

    Raises:
        ValueError: label_smoothing out of range.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"cross_entropy: label_smoothing must be in [0, 1), got {label_smoothing!r}")
    labels = targets if targets.is_floating_point() else targets.long()
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def maqd(logits: Tensor, targets: Tensor, *, gamma: float = 0.05) -> Tensor:
    """(1 - gamma) CE(logits, y) + gamma MSE(logits, one-hot y), the second term a mean over all N K elements.

    Source: MaQD (Sawada et al.), eq. 9. Computed in float32 at least.

    Args:
        logits: (N, K), floating.
        targets: (N,) class numbers of any integer dtype.
        gamma: weight of the squared error, in [0, 1].

    Raises:
        ValueError: gamma out of range, or logits and targets of other shapes or kinds.
    """
    if not (isinstance(gamma, int | float) and 0 <= gamma <= 1):
        raise ValueError(f"maqd: gamma must be in [0, 1], got {gamma!r}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"maqd: targets must be integer class numbers, got dtype {targets.dtype}")
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"maqd: logits must be (N, K) and targets (N,), got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    z = logits.float() if logits.dtype.itemsize < 4 else logits
    labels = targets.long()
    entropy = F.cross_entropy(z, labels)  # first: it refuses labels beyond the number of classes
    return (1 - gamma) * entropy + gamma * F.mse_loss(z, F.one_hot(labels, z.shape[1]).to(z.dtype))


LOSSES: dict[str, Callable[..., Tensor]] = {"cross_entropy": cross_entropy, "maqd": maqd}


def make_loss(name: str, **options: Any) -> Loss:
    """The loss called `name` with its options bound, e.g. ``make_loss("maqd", gamma=0.05)``.

    Raises:
        ValueError: an unknown name, an option that the loss does not have, or a value that is not a finite number.
    """
    if name not in LOSSES:
        raise ValueError(f"make_loss: no loss named {name!r}; there are: {', '.join(sorted(LOSSES))}")
    known = [p.name for p in inspect.signature(LOSSES[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"make_loss: loss {name!r} has no option {option!r}; it has: {', '.join(known)}")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"make_loss: option {option} of loss {name!r} must be a finite number, got {value!r}")
    return functools.partial(LOSSES[name], **options) if options else LOSSES[name]
