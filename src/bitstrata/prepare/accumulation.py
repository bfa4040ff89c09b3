"""Gradient accumulation: what quantizers must know of it."""

from __future__ import annotations

from torch import nn

from ..quantizers.base import ActivationQuantizer


def accumulate_(model: nn.Module, batches: int) -> nn.Module:
    """Tell the quantizers that one step of the optimizer sums the gradients of `batches` batches of one size, in place.

    The gradients of some activation steps (UniQ's, and so `strata`'s) have a scale 1/sqrt(N Q_P) that counts the
    elements N of the batch; it then counts those of all `batches`. With it, and with losses divided by `batches`, the
    sum of gradients is that of the joined batch, where no layer computes statistics of the batch.

    Args:
        model: quantized.
        batches: at least 1, which is what a quantized model starts with.

    Returns:
        The same model.

    Raises:
        ValueError: `batches` below 1, or a model without quantized activations.
    """
    if batches < 1:
        raise ValueError(f"accumulate_: batches must be at least 1, got {batches}")
    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    if not quantizers:
        raise ValueError("accumulate_: the model has no quantized activations; call quantize_ first")
    for quantizer in quantizers:
        quantizer.batches = batches
    return model
