"""How many weights and activations are not zero (MaQD's R_w and R_a)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.layers import QuantizedLayer
from ..prepare.precision import quantized_layers


@dataclass(frozen=True)
class NonzeroRatios:
    """Shares that are not zero, 0 to 1.

    layers: of each layer, by name. pooled: of all layers together (R_w), or the mean over samples of all layers
    together (R_a).
    """

    layers: dict[str, float]
    pooled: float


@torch.no_grad()
def nonzero_weights(model: nn.Module) -> NonzeroRatios:
    """R_w at the present precision: fake-quantized weights that are not zero, of all weights (MaQD, figure 4).

    Of a float model, the weights of its Linear, Conv1d and Conv2d layers.

    Raises:
        ValueError: a model without such layers.
    """
    weights = {name: layer.quantized_weight() for name, layer in quantized_layers(model).items()}
    if not weights:
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
        weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, kinds)}
    if not weights:
        raise ValueError("nonzero_weights: the model has no Linear, Conv1d or Conv2d layer")
    counts = {name: (int(torch.count_nonzero(w)), w.numel()) for name, w in weights.items()}
    total = sum(size for _, size in counts.values())
    return NonzeroRatios(
        {name: n / size for name, (n, size) in counts.items()}, sum(n for n, _ in counts.values()) / total
    )


@torch.no_grad()
def nonzero_activations(model: nn.Module, batches: Iterable[Tensor]) -> NonzeroRatios:
    """R_a at the present precision: of what layers read of hidden values, the share that is not zero (MaQD, figure 4).

    What counts is the fake-quantized input of each quantized layer, or the input of each layer of a float model; the
    first layer, which reads the network's input, is left out. A value that two layers read counts twice.

    Args:
        model: quantized or float; runs in evaluation mode, and has its modes back afterwards.
        batches: inputs, (N, ...) each; read once.

    Raises:
        ValueError: no batches, or a network of one layer only.
    """
    layers: dict[str, nn.Module] = dict(quantized_layers(model))
    if not layers:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)}
    seen: dict[str, list[int]] = {}
    order: list[str] = []
    of_samples: list[Tensor] = []
    rows: list[tuple[str, Tensor, int]] = []

    def hook(name: str):  # type: ignore[no-untyped-def]
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            quantizer = module.act_quant if isinstance(module, QuantizedLayer) else None
            value = x if quantizer is None else quantizer(x)
            if name not in order:
                order.append(name)
            rows.append((name, value.flatten(1).count_nonzero(1), value[0].numel()))

        return note

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for x in batches:
            rows.clear()
            model(x)
            hidden = [row for row in rows if row[0] != order[0]]
            if not hidden:
                raise ValueError("nonzero_activations: the network has no layer behind its first")
            for name, count, size in hidden:
                total = seen.setdefault(name, [0, 0])
                total[0] += int(count.sum())
                total[1] += size * len(count)
            counts = torch.stack([count for _, count, _ in hidden]).sum(0)
            of_samples.append(counts / sum(size for _, _, size in hidden))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if not of_samples:
        raise ValueError("nonzero_activations: no batches")
    return NonzeroRatios(
        {name: n / size for name, (n, size) in seen.items()}, float(torch.cat(of_samples).double().mean())
    )
