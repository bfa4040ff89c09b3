"""The recipes that come with bitstrata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .base import Part, Recipe, register

STRATA = "one nested symmetric weight code for every width, UniQ activations a precision, 8-bit edges"
LSQ = "LSQ weights and activations at one width, 8-bit edges"


@register("strata", STRATA)
def strata(
    w: Sequence[int] = (1, 2, 3, 4),
    a: str | int | Mapping[int, int] | None = "same",
    *,
    per_channel: bool = False,
    scales: str = "free",
    edge_bits: int | None = 8,
    distill: str | None = "cosine",
) -> Recipe:
    """Our flagship: train once, run at every width in `w`.

    Args:
        w: weight widths to serve, within 1..8; the widest is what is stored.
        a: activation widths: "same" as the weights', one width for all, a map from weight width, or None for float.
        per_channel: one weight step an output channel instead of one a tensor.
        scales: "free" learns a scale ratio a width, "tied" fixes the ratios to powers of two.
        edge_bits: width of the first and last layer (weights and input), or None to leave them in float.
        distill: "cosine" distillation from the next higher precision, or None.
    """
    if not all(isinstance(b, int) and not isinstance(b, bool) for b in w):
        raise ValueError(f"strata: w must be whole numbers of bits, got {tuple(w)}")
    precisions = tuple(sorted(set(w)))
    return Recipe(
        name="strata",
        description=STRATA,
        precisions=precisions,
        weight=Part("nested", "weight", {"scales": scales}),
        activation=None if a is None else Part("uniq", "activation"),
        activation_bits=activation_widths(precisions, a),
        per_channel=per_channel,
        edge_bits=edge_bits,
        distill=distill,
    )


@register("lsq", LSQ)
def lsq(bits: int = 4, a: str | int | None = "same", *, per_channel: bool = False, edge_bits: int | None = 8) -> Recipe:
    """LSQ (Esser et al., ICLR 2020) at one width, 2 to 8 bits.

    Args:
        bits: weight width.
        a: activation width: "same", a width, or None for float.
        per_channel: one weight step an output channel instead of one a tensor.
        edge_bits: width of the first and last layer, or None to leave them in float.
    """
    return Recipe(
        name="lsq",
        description=LSQ,
        precisions=(bits,),
        weight=Part("lsq", "weight"),
        activation=None if a is None else Part("lsq", "activation"),
        activation_bits=activation_widths((bits,), a),
        per_channel=per_channel,
        edge_bits=edge_bits,
        distill=None,
    )


def activation_widths(precisions: tuple[int, ...], a: str | int | Mapping[int, int] | None) -> dict[int, int]:
    """Activation width at each precision from the short forms that recipes take. ValueError on anything else."""
    if a is None:
        return {}
    if isinstance(a, Mapping):
        return dict(a)
    if a == "same":
        return {p: p for p in precisions}
    if isinstance(a, int) and not isinstance(a, bool):
        return dict.fromkeys(precisions, a)
    raise ValueError(f"recipe: a must be 'same', a width, a map from precision to width, or None, got {a!r}")
