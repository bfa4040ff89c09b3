"""MaQD, SAT, UniQ and Vertical Layering as recipes, and the joint schemes that Vertical Layering compares with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .base import Objective, Part, Recipe, Schedule, register
from .baselines import SAT_SCHEDULE, step_schedule
from .widths import Widths, activation_widths, weight_widths

MAQD = "MaQD: standardized weights in m_w states, layer-batch norm, activations in m_a states, surrogate gradients"
SAT = "SAT: clamped, rescaled DoReFa weights and CG-PACT activations at one width, 8-bit edges"
UNIQ = "UniQ: symmetric weights without zero, MSE-optimal initial steps, at one width from 1 bit, 8-bit edges"
VERTICAL = "Vertical Layering: one LSQ code whose upper bits serve every width, with positive compensation"
ADABITS = "AdaBits: float weights quantized for each width by itself, clipping levels and norms a width"
ASCENDING = "Ascending layers: a narrow LSQ code, then one learned bit-plane at a time"


@register("maqd", MAQD)
def maqd(
    m_w: int = 3,
    m_a: int | None = 2,
    *,
    s: float = 1 / 3,
    delta_mode: str = "(M-1)/2",
    weight_ste: str = "chain",
    ws_scale: str = "unit",
    act_surrogate: str = "normalised",
    alpha: float = 0.25,
    gamma: float = 0.05,
    norm: str = "layer_batch",
    edges: str = "inner",
) -> Recipe:
    """MaQD (Sawada et al., 2024): multi-state weights and activations.

    Args:
        m_w: weight states, odd, 3..255; the paper's 3, 15, 255.
        m_a: activation states, 2..256; the paper's 2, 4, 8; None for float activations.
        s: factor on standardized weights before they are cut to [-1, 1].
        delta_mode: "(M-1)/2" gives m_w states, "M/2" (the paper's settings section) m_w + 2.
        weight_ste: gradient through the scaling by the chain rule ("chain") or as printed ("literal").
        ws_scale: standardize to "unit" deviation or to 1/sqrt("fan_in") as printed in eq. 4.
        act_surrogate: "normalised" sigmoid derivatives, the "literal" sum of eq. 11, or the "ste".
        alpha: width of the sigmoid surrogate.
        gamma: share of the squared error in the loss.
        norm: "layer_batch" or "batch".
        edges: "inner" quantizes first and last layer alike, as the paper does; "int8" or "float".
    """
    from ..quantizers.maqd import width_of

    width = width_of(m_w, delta_mode)
    if m_a is not None and (not isinstance(m_a, int) or isinstance(m_a, bool) or not 2 <= m_a <= 256):
        raise ValueError(f"maqd: m_a must be a whole number of states, 2..256, or None, got {m_a!r}")
    activation = {"states": m_a, "act_surrogate": act_surrogate, "alpha": alpha}
    return Recipe(
        name="maqd",
        description=MAQD,
        precisions=(width,),
        weight=Part("maqd", "weight", {"states": m_w, "s": s, "delta_mode": delta_mode, "weight_ste": weight_ste}),
        activation=None if m_a is None else Part("maqd", "activation", activation),
        activation_bits={} if m_a is None else {width: max((m_a - 1).bit_length(), 1)},
        transform=Part("standardize", "transform", {"ws_scale": ws_scale}),
        placement="input" if m_a is None else "activation",
        edges=edges,
        norm=norm,
        objective=Objective(loss="maqd", gamma=gamma),
        schedule=Schedule(
            epochs=300, batch_size=100, lr=0.01, weight_decay=5e-4, decay="weights", schedule="cosine_epoch"
        ),
    )


@register("sat", SAT)
def sat(
    bits: int = 4,
    a: Widths = "same",
    *,
    rescale: str | None = "constant",
    convs: str = "auto",
    var_mode: str = "meansq",
    scheme: str = "original",
    detach_max: bool = False,
    alpha: float | None = None,
    double_side: bool = False,
    gradient: str = "cg",
    edges: str = "int8",
    edge_bits: int = 8,
) -> Recipe:
    """SAT (Jin et al., 2019): scale-adjusted training.

    Args:
        bits: weight width, 1..8.
        a: activation width: "same", a width, or None for float.
        rescale: "constant" (eqs. 7, 10), "stddev" (eq. S23), or None.
        convs: rescale convolutions too: "all", "none", or "auto", where no normalization follows.
        var_mode: variance as mean square ("meansq", the paper) or about the mean ("std", public code).
        scheme: rounding of the weights: "original", or AdaBits' floors "modified" and "centered".
        detach_max: no gradient through the largest |tanh w|.
        alpha: initial clipping level; None takes 8 for convolutions and 10 for linear layers.
        double_side: clip inputs that may be negative to [-alpha, alpha] instead of cutting them at 0.
        gradient: of the clipping level: "cg" (eq. 13) or "pact".
        edges: first and last layer: "int8", "inner" or "float".
        edge_bits: width of the first and last layer's weights with edges="int8".
    """
    weight = Part("dorefa", "weight", {"scheme": scheme, "detach_max": detach_max})
    pact = Part("pact", "activation", {"gradient": gradient, "init": alpha, "double_side": double_side})
    options = {"var_mode": var_mode, "convs": convs} if rescale == "constant" else {"convs": convs}
    return Recipe(
        name="sat",
        description=SAT,
        precisions=(bits,),
        weight=weight,
        activation=None if a is None else pact,
        activation_bits=activation_widths((bits,), a),
        rescale=None if rescale is None else Part(rescale, "rescale", options),
        edges=edges,
        edge_weight=weight,
        edge_bits=edge_bits,
        last_input="inner",
        schedule=SAT_SCHEDULE,
    )


@register("uniq", UNIQ)
def uniq(
    bits: int = 2,
    a: Widths = "same",
    *,
    per_channel: bool = False,
    init: str | float = "mse",
    signed_input: str = "signed",
    numel: str = "batch",
    edges: str = "int8",
    edge_bits: int = 8,
    downsample: str = "inner",
    warmup: bool = True,
) -> Recipe:
    """UniQ (Pham et al., 2021) at one width, 1 to 8 bits.

    At 1 bit the paper keeps first, last and downsampling layers in float (edges="float", downsample="float"), has a
    step an output channel on ResNets (per_channel=True), and starts from the 2-bit model (`warm_start_`).

    Args:
        bits: weight width.
        a: activation width: "same", a width, or None for float.
        per_channel: one weight step an output channel instead of one a tensor.
        init: rule for the initial steps, or a number (table 5: "mse", "lsq", .1, .2).
        signed_input: inputs that may be negative get a "signed" grid, or are "cut" at 0 as in the authors' code.
        numel: "batch" or "sample", the elements that the gradient scale of activation steps counts.
        edges: first and last layer: "int8", "inner" or "float".
        edge_bits: width of the first and last layer with edges="int8".
        downsample: "inner", or "float" for the 1x1 convolutions of shortcuts.
        warmup: at 1 bit, train with Adam, five epochs at a constant .001 before the cosine from .004.
    """
    schedule = step_schedule(bits, "cosine_epoch")
    if bits == 1 and warmup:
        schedule = replace(schedule, optimizer="adam", lr=0.004, warmup=5.0, warmup_lr=0.001)
    activation = Part("uniq", "activation", {"init": init, "signed_input": signed_input, "numel": numel})
    return Recipe(
        name="uniq",
        description=UNIQ,
        precisions=(bits,),
        weight=Part("uniq", "weight", {"init": init}),
        activation=None if a is None else activation,
        activation_bits=activation_widths((bits,), a),
        per_channel=per_channel,
        edges=edges,
        edge_bits=edge_bits,
        downsample=downsample,
        schedule=schedule,
    )


@register("vertical", VERTICAL)
def vertical(
    bits: Sequence[int] = (2, 3, 4),
    a: Widths = "same",
    *,
    compensation: bool = True,
    ste_include_z: bool = True,
    act_init: str | float = "paper_bits",
    numel: str = "sample",
    distill: str | None = "cosine",
    combine: str = "scalarization",
    norm_levels: str = "individual",
    own_edges: bool = False,
    edges: str = "int8",
    edge_bits: int = 8,
) -> Recipe:
    """Vertical Layering (Wu et al., TPAMI 2023): one model for every width from 2 bits.

    The paper keeps first and last layer in float (edges="float"), which trains but cannot be lowered.

    Args:
        bits: weight widths, within 2..8.
        a: activation widths: "same" as the weights', one for all, a map from weight width, or None for float.
        compensation: shift each narrower grid by the mean of the bits that it drops.
        ste_include_z: count the shift in the step's gradient, the true derivative; eq. 8 as printed leaves it out.
        act_init: rule for the initial activation steps: "paper_bits", "minmax", "lsq", "mse", or a number.
        numel: "sample" or "batch", the features that the gradient scale of activation steps counts.
        distill: "cosine" or "kl" distillation from the next higher precision, or None.
        combine: "scalarization" (the paper's default) or "mgd".
        norm_levels: batch normalization "individual", "statistics" or "shared" (table 4).
        own_edges: first and last layer of its own at every precision (table 8).
        edges: first and last layer: "int8", "inner" or "float".
        edge_bits: width of the first and last layer with edges="int8".
    """
    precisions = weight_widths("vertical", bits)
    return Recipe(
        name="vertical",
        description=VERTICAL,
        precisions=precisions,
        weight=Part("vertical", "weight", {"compensation": compensation, "ste_include_z": ste_include_z}),
        activation=None if a is None else Part("lsq", "activation", {"numel": numel, "init": act_init}),
        activation_bits=activation_widths(precisions, a),
        edges=edges,
        edge_bits=edge_bits,
        own_edges=own_edges,
        norm_levels=norm_levels,
        objective=Objective(distill=distill, combine=combine),
        schedule=Schedule(epochs=90, batch_size=256, lr=0.01, weight_decay=1e-4),
    )


@register("adabits", ADABITS)
def adabits(
    bits: Sequence[int] = (2, 3, 4),
    a: Widths = "same",
    *,
    scheme: str = "modified",
    alpha: float | str | None = None,
    edges: str = "int8",
) -> Recipe:
    """AdaBits (Jin et al., 2020), which Vertical Layering compares with.

    Args:
        bits: weight widths, within 1..8.
        a: activation widths, as for `vertical`.
        scheme: "modified" or "centered" floors, whose codes nest; "original" rounding does not, so that a program holds
            one precision only (`lower(..., precisions=(b,))`).
        alpha: initial clipping level: None for 8 and, before linear layers, 10; a number; or a rule for the initial
            step, "mse", "lsq" or "minmax". With 8 few codes of 2 bits are not 0 behind a batch normalization.
        edges: first and last layer: "int8", "inner" or "float".
    """
    precisions = weight_widths("adabits", bits)
    weight = Part("dorefa", "weight", {"scheme": scheme})
    clipping = {"gradient": "cg"} | ({} if alpha is None else {"init": alpha})
    return Recipe(
        name="adabits",
        description=ADABITS,
        precisions=precisions,
        weight=weight,
        activation=None if a is None else Part("pact", "activation", clipping),
        activation_bits=activation_widths(precisions, a),
        rescale=Part("constant", "rescale"),
        edges=edges,
        edge_weight=weight,
        last_input="inner",
        objective=Objective(reduction="sum"),
        schedule=SAT_SCHEDULE,
    )


@register("ascending", ASCENDING)
def ascending(bits: Sequence[int] = (2, 3, 4), a: Widths = "same", *, edges: str = "int8") -> Recipe:
    """Vertical Layering's baseline: train the narrowest width, freeze it, add one plane after the other.

    Args:
        bits: weight widths, within 2..8, without gaps.
        a: activation widths, as for `vertical`.
        edges: first and last layer: "int8", "inner" or "float".
    """
    precisions = weight_widths("ascending", bits)
    return Recipe(
        name="ascending",
        description=ASCENDING,
        precisions=precisions,
        weight=Part("ascending", "weight"),
        activation=None if a is None else Part("lsq", "activation", {"init": "paper_bits"}),
        activation_bits=activation_widths(precisions, a),
        edges=edges,
        schedule=Schedule(epochs=90, batch_size=256, lr=0.01, weight_decay=1e-4),
    )
