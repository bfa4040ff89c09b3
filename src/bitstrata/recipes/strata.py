"""The flagship: one nested symmetric code for every width."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Objective, Part, Recipe, Schedule, register
from .widths import Widths, activation_widths, weight_widths

STRATA = "one nested symmetric weight code for every width, UniQ activations a precision, 8-bit edges"


@register("strata", STRATA)
def strata(
    w: Sequence[int] = (1, 2, 3, 4),
    a: Widths = "same",
    *,
    per_channel: bool = False,
    scales: str = "free",
    target_db: float | None = 25.0,
    edges: str = "int8",
    edge_bits: int = 8,
    distill: str | None = "cosine",
    sampling: str = "sandwich",
) -> Recipe:
    """Our flagship: train once, run at every width in `w`.

    Args:
        w: weight widths to serve, within 1..8; the widest is what is stored.
        a: activation widths: "same" as the weights', one width for all, a map from weight width, or None for float.
        per_channel: one weight step an output channel instead of one a tensor.
        scales: "free" learns a scale ratio a width, "tied" fixes the ratios to powers of two.
        target_db: signal-to-noise ratio in dB beyond which the initial step asks nothing more for a width, or None.
        edges: first and last layer: "int8", "inner" or "float".
        edge_bits: width of the first and last layer (weights and input) with edges="int8".
        distill: "cosine" or "kl" distillation from the next higher precision, or None.
        sampling: precisions of a step: "all", or a "sandwich" of both ends and a random one between, which trains as
            well as all in three quarters of the time (recipes/strata/joint-cost), or a "pair" of the widest and
            another.
    """
    precisions = weight_widths("strata", w)
    return Recipe(
        name="strata",
        description=STRATA,
        precisions=precisions,
        weight=Part("nested", "weight", {"scales": scales, "target_db": target_db}),
        activation=None if a is None else Part("uniq", "activation"),
        activation_bits=activation_widths(precisions, a),
        per_channel=per_channel,
        edges=edges,
        edge_bits=edge_bits,
        edge_per_channel=per_channel,
        objective=Objective(distill=distill, sampling=sampling),
        schedule=Schedule(lr=0.02, nesterov=True, weight_decay=5e-4),
    )
