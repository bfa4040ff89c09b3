"""Peers of quantization-aware training: a hand-written LSQ, Brevitas, and torchao, each at one width.

All of them swap the convolutions and linear layers of the same float network in place (torchao rewrites its graph).
The first and the last layer have 8 bits. Steps of activations are set by the first batch that runs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from _common import version_of
from torch import Tensor, nn

EDGE_BITS = 8
Maker = Callable[[nn.Module, Tensor, int], nn.Module]  # float model, example input, bits -> what is trained


def missing() -> dict[str, str]:
    """Family of peers -> why it cannot run here."""
    packages = {"brevitas": "brevitas", "torchao": "torchao"}
    return {family: f"{package} is not installed" for family, package in packages.items() if not version_of(package)}


class _HandLSQ(nn.Module):
    """LSQ (Esser et al., eqs. 1-3) in a few eager operations with straight-through rounding by `detach`."""

    def __init__(self, bits: int, signed: bool, sample: Tensor | None = None) -> None:
        super().__init__()
        self.lo = -(2 ** (bits - 1)) if signed else 0
        self.hi = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.step = nn.Parameter(torch.tensor(1.0))
        self.ready = False
        if sample is not None:
            self.start(sample)

    def start(self, x: Tensor) -> None:
        with torch.no_grad():
            self.step.copy_(2 * x.abs().mean() / self.hi**0.5)
        self.ready = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.start(x)
        scale = (x.numel() * self.hi) ** -0.5
        step = (self.step - self.step * scale).detach() + self.step * scale
        code = torch.clamp(x / step, self.lo, self.hi)
        return ((code.round() - code).detach() + code) * step


class _HandLayer(nn.Module):
    """A convolution or linear layer with both of its operands quantized."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, bits: int, signed: bool) -> None:
        super().__init__()
        self.layer = layer
        self.weight_quant = _HandLSQ(bits, True, layer.weight)
        self.input_quant = _HandLSQ(bits, signed)

    def forward(self, x: Tensor) -> Tensor:
        weight, x = self.weight_quant(self.layer.weight), self.input_quant(x)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return F.conv2d(x, weight, self.layer.bias, self.layer.stride, self.layer.padding)


def hand_lsq(model: nn.Module, example: Tensor, bits: int) -> nn.Module:
    """The hand-written LSQ."""

    def swapped(layer: nn.Conv2d | nn.Linear, width: int, signed: bool) -> nn.Module:
        return _HandLayer(layer, width, signed)

    return _swap(model, bits, swapped)


def brevitas(model: nn.Module, example: Tensor, bits: int) -> nn.Module:
    """Brevitas' quantized layers: a learned scale a tensor, signed weights, activations by QuantIdentity.

    Its own scale statistics run for one batch, not for the 300 of its default, which are slower than what follows.
    """
    import brevitas.nn as qnn
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    weight_quant = Int8WeightPerTensorFloat.let(scaling_impl_type=ScalingImplType.PARAMETER_FROM_STATS)

    def swapped(layer: nn.Conv2d | nn.Linear, width: int, signed: bool) -> nn.Module:
        quantizer = Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat
        options: dict[str, Any] = {
            "bias": layer.bias is not None,
            "weight_quant": weight_quant.let(bit_width=width),
        }
        if isinstance(layer, nn.Linear):
            made = qnn.QuantLinear(layer.in_features, layer.out_features, **options)
        else:
            options |= {"stride": layer.stride, "padding": layer.padding}
            made = qnn.QuantConv2d(layer.in_channels, layer.out_channels, layer.kernel_size, **options)
        made.load_state_dict(layer.state_dict(), strict=False)
        identity = qnn.QuantIdentity(act_quant=quantizer.let(bit_width=width, collect_stats_steps=1))
        return nn.Sequential(identity, made)

    return _swap(model, bits, swapped)


def torchao(model: nn.Module, example: Tensor, bits: int) -> nn.Module:
    """torchao's quantization-aware training of exported graphs, by its x86 quantizer's own settings at fewer bits.

    Its other interface, `QATConfig`, takes linear and embedding layers alone. Here convolutions and batch
    normalizations are trained as if folded, ranges are moving averages (weights: one a channel), and activations that
    feed an addition are quantized too.
    """
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationConfig
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    own = get_default_x86_inductor_quantization_config(is_qat=True)

    def config(width: int) -> QuantizationConfig:
        activation = replace(own.input_activation, quant_min=0, quant_max=2**width - 1)
        feeds = replace(own.output_activation, quant_min=0, quant_max=2**bits - 1)
        weight = replace(own.weight, quant_min=-(2 ** (width - 1)), quant_max=2 ** (width - 1) - 1)
        return replace(own, input_activation=activation, output_activation=feeds, weight=weight)

    quantizer = X86InductorQuantizer().set_global(config(bits))
    for name in _edges(model):
        quantizer.set_module_name_qconfig(name, config(EDGE_BITS))
    batch = {0: torch.export.Dim("batch", min=2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecations
        graph = torch.export.export(model, (example,), dynamic_shapes=(batch,)).module()
        return prepare_qat_pt2e(graph, quantizer)


def quiet() -> None:
    """Keep what the packages say of their own optional parts off the output."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def _edges(model: nn.Module) -> tuple[str, str]:
    """Names of the first and the last layer; the zoo's networks hold them in this order."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return names[0], names[-1]


def _swap(model: nn.Module, bits: int, swapped: Callable[[nn.Conv2d | nn.Linear, int, bool], nn.Module]) -> nn.Module:
    """Put `swapped(layer, bits, input is signed)` where each layer is. Only the image may be below zero."""
    first, last = _edges(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parent, _, attribute = name.rpartition(".")
            width = EDGE_BITS if name in (first, last) else bits
            setattr(model.get_submodule(parent), attribute, swapped(layer, width, name == first))
    return model.train()
