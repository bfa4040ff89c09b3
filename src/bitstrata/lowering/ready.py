"""Whether a model's numbers can be lowered at all: everything finite, every input step set."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn.layers import QuantizedLayer
from ..nn.norm import PrecisionBatchNorm
from ..prepare.finite import not_finite
from ..prepare.parameters import precision_parameters
from ..prepare.precision import precision, quantized_layers
from .errors import LowerError
from .factors import input_grid


def refuse_unready(model: nn.Module, served: tuple[int, ...]) -> None:
    """Name what is wrong with the numbers of quantized layers and their normalizations at the served precisions.

    Args:
        model: quantized; changed only in passing.
        served: precisions, ascending. What other precisions alone use is not looked at.

    Raises:
        LowerError: a parameter or statistic with values that are not finite, or an input step that was never set.
    """
    unused = {id(q) for p, own in precision_parameters(model).items() if p not in served for q in own}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer | PrecisionBatchNorm):
            tensors = {key: q.detach() for key, q in module.named_parameters() if id(q) not in unused}
            problem = not_finite({**tensors, **_statistics(module, served)})
            if problem:
                raise LowerError(f"lower: module {name!r}: {problem}; training diverged")
    layers = quantized_layers(model)
    for p in reversed(served):
        with precision(model, p):
            for name, layer in layers.items():
                if layer.act_quant is not None:
                    input_grid(layer, name)


def _statistics(module: nn.Module, served: tuple[int, ...]) -> dict[str, Tensor]:
    """Running statistics of a normalization at the served precisions; other modules have none that matter."""
    if not isinstance(module, PrecisionBatchNorm):
        return {}
    levels = tuple(f"levels.{p}." for p in served)
    return {key: value for key, value in module.named_buffers() if key.startswith(levels)}
