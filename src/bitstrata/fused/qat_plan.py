"""Which nodes of a quantization-aware network run as one unit."""

from __future__ import annotations

import torch
from torch import fx, nn

from ..nn.layers import QuantConv2d
from ..nn.norm import PrecisionBatchNorm
from ..quantizers.pixels import PixelInput
from .plan import Planner, plain
from .qat_codes import fusable_quantizer, fusable_weight, ready
from .qat_pixels import QatPixelConvNorm
from .qat_units import QatConvNorm, QatJoin, QatMaxPool
from .units import Unit


def _levels(norm: nn.Module) -> list[nn.Module]:
    return list(norm.levels.values()) if type(norm) is PrecisionBatchNorm else [norm]


def can_run(units: list[Unit]) -> bool:
    """Whether all is as the units take it: steps are set, and nobody calibrates."""
    for unit in units:
        if isinstance(unit, QatConvNorm):
            quantizer = unit.conv.act_quant
            if quantizer is None or not ready(quantizer):
                return False
    return True


class QatPlanner(Planner):
    """Planner of networks after `quantize_`."""

    wanted = (
        "convolution (QuantConv2d without bias, codes on both sides, code 0 for 0 in its input or pixels) that only a "
        "BatchNorm2d reads; make it one with quantize_(model, recipe, example), on the CPU"
    )

    def __init__(self, model: nn.Module, graph: fx.Graph, repeated: int = 0) -> None:
        super().__init__(model, graph)
        self.repeated = repeated  # sums of at most so many products are made again in the backward pass

    _max_pool_unit = QatMaxPool
    _join_unit = QatJoin

    @staticmethod
    def _fusable_conv(module: nn.Module) -> bool:
        if type(module) is not QuantConv2d or not plain(module):
            return False
        parts = (module.weight_quant, module.act_quant)
        return (
            module.bias is None
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
            and module.input_pool is None
            and module.grad_quant is None
            and module.weight.dtype == torch.float32
            and module.weight.device.type == "cpu"
            and all(part is not None and plain(part) for part in parts)
            and fusable_quantizer(module.act_quant)
            and (module.groups == 1 or not isinstance(module.act_quant, PixelInput))
            and fusable_weight(module)
        )

    @staticmethod
    def _fusable_norm(module: nn.Module) -> bool:
        return plain(module) and all(
            type(level) is nn.BatchNorm2d
            and plain(level)
            and all(t.dtype == torch.float32 for t in (*level.parameters(), level.running_mean) if t is not None)
            for level in _levels(module)
        )

    def _add_conv_norm(self, conv: fx.Node, norm: fx.Node, last: fx.Node | None) -> None:
        layer, normalization = self._module(conv), self._module(norm)
        assert isinstance(layer, QuantConv2d)
        assert normalization is not None
        source, result = conv.args[0], last or norm
        assert isinstance(source, fx.Node)
        self._done.update(n for n in (conv, norm, last) if n is not None)
        self.fused.append(str(conv.target))
        unit = QatConvNorm(
            (source.name,), result.name, layer, normalization, str(conv.target), last is not None, self.repeated
        )
        if isinstance(layer.act_quant, PixelInput):
            parts = [self._by_torch(n) for n in (conv, norm, last) if n is not None]
            unit = QatPixelConvNorm(**vars(unit), parts=parts)
        self.units.append(unit)
