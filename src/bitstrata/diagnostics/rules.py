"""SAT's two rules of efficient training, measured (Jin, Yang and Liao, section 3 and appendices S1, S2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.layers import FORMS, QuantizedLayer
from .kept import kept
from .landscape import Loss

FIRST_RULE = 0.1  # kappa_0 should be well below 1; the paper asks for less than this
ORDER = 10.0  # kappa_1 within this factor of 1 counts as of order one


@dataclass(frozen=True)
class LayerRule:
    """One layer. Variances are mean squares (the paper's convention), of the weight that the product uses.

    inputs: n_l, input channels (of a group) times kernel positions. outputs: n^_l, output channels times positions.
    pool: k^2, positions of this layer's output for each position that the next layer reads. variance: of the weight.
    gradient: of the loss's gradient to it. ratio: variance of the quantized weight over that of the weight which is
    quantized, 1 in float. kappa1: of this and the next layer (eq. S17b); None for the last.
    """

    inputs: int
    outputs: int
    pool: float
    variance: float
    gradient: float
    ratio: float
    kappa1: float | None


@dataclass(frozen=True)
class TrainingRules:
    """kappa0: of the last layer, n_L VAR / k^2 (eq. S7). layers: name -> its part, in the order they run."""

    kappa0: float
    layers: dict[str, LayerRule]

    @property
    def first(self) -> bool:
        """Rule I: logits small enough that the softmax does not saturate: kappa0 below 0.1."""
        return self.kappa0 < FIRST_RULE

    @property
    def second(self) -> bool:
        """Rule II: gradients neither grow nor vanish from layer to layer: every kappa1 within 1/10 to 10."""
        found = [r.kappa1 for r in self.layers.values() if r.kappa1 is not None]
        return all(math.isfinite(k) and 1 / ORDER <= k <= ORDER for k in found)

    def explain(self) -> str:
        """Both rules in words."""
        last = next(reversed(self.layers))
        lines = [
            f"Rule I {'holds' if self.first else 'is broken'}: kappa_0 = {self.kappa0:.3g} at {last}, "
            + (
                f"below {FIRST_RULE}: the logits start small, and the softmax passes gradients."
                if self.first
                else f"not below {FIRST_RULE}: large weights of the last layer saturate the softmax; rescale them "
                "(recipe sat does) or train them from smaller values."
            )
        ]
        odd = {
            name: r.kappa1
            for name, r in self.layers.items()
            if r.kappa1 is not None and not (math.isfinite(r.kappa1) and 1 / ORDER <= r.kappa1 <= ORDER)
        }
        if odd:
            worst = max(odd, key=lambda name: abs(math.log(odd[name])) if odd[name] and odd[name] > 0 else math.inf)
            lines.append(
                f"Rule II is broken at {len(odd)} of {len(self.layers) - 1} layers, most at {worst} (kappa_1 = "
                f"{odd[worst]:.3g}): gradients of neighbouring layers differ in size by more than the weights explain; "
                "normalize after that layer or rescale it."
            )
        else:
            lines.append("Rule II holds: every kappa_1 is of order one, gradients keep their size through the layers.")
        return "\n".join(lines)


def training_rules(model: nn.Module, loss: Loss, batch: Any, *, training: bool | None = None) -> TrainingRules:
    """kappa_0 and kappa_1 of a model on one batch; the model is left as it was.

    Layers are Linear, Conv1d and Conv2d, float or quantized, in the order of their first run; 1x1 convolutions of
    shortcuts take part like the others, though the paper's derivation has no branches.

    Args:
        loss: called with (model, batch), gives one number as a tensor. batch: what `loss` takes.
        training: as for `gradient_variance`.

    Raises:
        ValueError: no layer, or a layer that the loss does not depend on.
    """
    layers = {n: m for n, m in model.named_modules() if type(m) in FORMS or isinstance(m, QuantizedLayer)}
    seen: dict[str, tuple[int, int]] = {}  # positions read and written
    weights: dict[str, Tensor] = {}
    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(_positions(name, seen)))
        if isinstance(layer, QuantizedLayer):
            handles.append(layer.weight_quant.register_forward_hook(_keeper(name, weights)))
    try:
        with kept(model, training=training), torch.enable_grad():
            value = loss(model, batch)
            order = list(seen)
            for name in order:
                weights.setdefault(name, layers[name].weight)
            if not order:
                raise ValueError(
                    f"training_rules: {type(model).__name__} has no Linear, Conv1d or Conv2d layer that runs"
                )
            found = torch.autograd.grad(value, [weights[name] for name in order], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name, g in zip(order, found, strict=True) if g is None]
    if missing:
        raise ValueError(f"training_rules: the loss does not depend on the weight of {missing[0]!r}")
    gradients = {name: _mean_square(g) for name, g in zip(order, found, strict=True) if g is not None}
    return _assembled(layers, order, seen, weights, gradients)


def _assembled(
    layers: dict[str, nn.Module],
    order: list[str],
    seen: dict[str, tuple[int, int]],
    weights: dict[str, Tensor],
    gradients: dict[str, float],
) -> TrainingRules:
    rules: dict[str, LayerRule] = {}
    for name, following in zip(order, [*order[1:], None], strict=True):
        w, layer = weights[name].detach(), layers[name]
        variance = _mean_square(w)
        pool = 1.0 if following is None else seen[name][1] / seen[following][0]
        kappa1 = None
        if following is not None:
            after = weights[following].detach()
            size = _inputs(w) * variance / (_outputs(after) * _mean_square(after))
            kappa1 = pool * size * gradients[name] / gradients[following] if gradients[following] else math.inf
        whole = _mean_square(layer.effective_weight().detach()) if isinstance(layer, QuantizedLayer) else variance
        ratio = variance / whole if whole else math.nan
        rules[name] = LayerRule(_inputs(w), _outputs(w), pool, variance, gradients[name], ratio, kappa1)
    last = rules[order[-1]]
    before = rules[order[-2]].pool if len(order) > 1 else 1.0
    return TrainingRules(last.inputs * last.variance / before, rules)


def _inputs(w: Tensor) -> int:
    return w[0].numel()


def _outputs(w: Tensor) -> int:
    return w.numel() // w.shape[1]


def _mean_square(x: Tensor) -> float:
    return float(x.double().square().mean())


def _positions(name: str, seen: dict[str, tuple[int, int]]):  # type: ignore[no-untyped-def]
    """Notes positions a sample of what a layer reads and writes: elements divided by features."""

    def note(layer: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        if name not in seen:
            x, batch = args[0], max(args[0].shape[0], 1)
            if isinstance(layer, nn.Conv1d | nn.Conv2d):
                features, made = layer.in_channels, layer.out_channels
            else:
                features, made = x.shape[-1], result.shape[-1]
            seen[name] = (x.numel() // (batch * features), result.numel() // (batch * made))

    return note


def _keeper(name: str, weights: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    def keep(_module: nn.Module, _args: Any, result: Tensor) -> None:
        if result.requires_grad:
            weights.setdefault(name, result)

    return keep
