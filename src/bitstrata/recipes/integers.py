"""ShiftQuant: training in integers, forward and backward."""

from __future__ import annotations

from .base import Part, Recipe, Schedule, register

SHIFTQUANT = "training in integers: ShiftQuant activations and gradients, weights a channel, quantized L1 norm"
NORMS = {"l1": "l1_quantized", "l2": "l2_quantized", "l1_float": "l1", "batch": "batch"}


@register("shiftquant", SHIFTQUANT)
def shiftquant(
    w: int = 4,
    a: int = 4,
    g: int = 4,
    groups: int = 4,
    norm: str = "l1",
    *,
    edge_bits: int = 8,
    act_rounding: str = "nearest",
    grad_rounding: str = "stochastic",
    unsigned_nonneg: bool = False,
    clip_ratio: float = 1.0,
    grad_grid: str = "uniform",
    on_nonfinite: str = "error",
    seed: int = 0,
) -> Recipe:
    """ShiftQuant (Guo, Liu et al.): the three products of a training step on integer codes; see `integer_`.

    Args:
        w, a, g: widths of weights, activations and gradients, 2..8.
        groups: N_G of activations and gradients, 1..8.
        norm: "l1", L1 batch normalization with every tensor in 8 bits; "l2", its twin by standard deviation;
            "l1_float", L1 in float; "batch", batch normalization as it is.
        edge_bits: all three widths in first and last layer.
        act_rounding: of activations in training, "nearest" or "stochastic".
        grad_rounding: of gradients in training, "stochastic" or "nearest".
        unsigned_nonneg: activations without negative elements get codes 0..2^a - 1.
        clip_ratio: of the inner layers' activations, above 0 and at most 1: multiplies their ranges.
        grad_grid: of the inner layers' gradients: "uniform", ShiftQuant's; "powers", 0 and powers of two with one scale
            a tensor, g up to 4, which is not the paper's.
        on_nonfinite: NaN or infinity in an activation or gradient is an "error" or its step is a "skip".
        seed: of all stochastic rounding of gradients.
    """
    if norm not in NORMS:
        raise ValueError(f"shiftquant: norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    forward = {"groups": groups, "act_rounding": act_rounding, "unsigned_nonneg": unsigned_nonneg}
    forward["clip_ratio"] = clip_ratio  # edge layers have 1 all the same, see `integer_`
    backward = {"g": g, "groups": groups, "edge_bits": edge_bits, "rounding": grad_rounding}
    backward |= {"grid": grad_grid} if grad_grid != "uniform" else {}  # records of recipes without it stay as they are
    return Recipe(
        name="shiftquant",
        description=SHIFTQUANT,
        precisions=(w,),
        weight=Part("shiftquant", "integer"),
        activation=Part("shiftquant", "integer", forward),
        activation_bits={w: a},
        gradient=Part("shiftquant", "gradient", {**backward, "on_nonfinite": on_nonfinite, "seed": seed}),
        per_channel=True,
        edge_weight=Part("shiftquant", "integer"),
        edge_activation=Part("shiftquant", "integer", forward),
        edge_bits=edge_bits,
        edge_per_channel=True,
        norm=NORMS[norm],
        schedule=Schedule(epochs=164, batch_size=128, lr=0.1, weight_decay=1e-4),
    )
