"""The recipes that the papers compare with: LSQ, LSQ+, DoReFa, PACT, 8-bit per tensor."""

from __future__ import annotations

from .base import Part, Recipe, Schedule, register
from .widths import Widths, activation_widths

LSQ = "LSQ weights and activations at one width, 8-bit edges"
LSQ_PLUS = "LSQ weights, LSQ+ activations with a learned offset, at one width, 8-bit edges"
DOREFA = "DoReFa weights and activations at one width, 8-bit edges"
PACT = "DoReFa weights, PACT activations at one width, 8-bit edges"
CG_PACT = "DoReFa weights, CG-PACT activations at one width, 8-bit edges"
INT8 = "8-bit weights and activations per tensor by their largest magnitude, activation ranges frozen by calibration"

_LSQ_DECAY = {1: 0.0, 2: 2.5e-5, 3: 5e-5}  # half the decay for every bit less, LSQ section 2.3 and UniQ section 5


def step_schedule(bits: int, course: str = "cosine") -> Schedule:
    """LSQ's and UniQ's training on ImageNet: 90 epochs from lr .01 by a cosine, decay by width."""
    return Schedule(epochs=90, batch_size=256, lr=0.01, weight_decay=_LSQ_DECAY.get(bits, 1e-4), schedule=course)


@register("lsq", LSQ)
def lsq(
    bits: int = 4,
    a: Widths = "same",
    *,
    per_channel: bool = False,
    numel: str = "sample",
    init: str | float = "lsq",
    edges: str = "int8",
    edge_bits: int = 8,
) -> Recipe:
    """LSQ (Esser et al., ICLR 2020) at one width, 2 to 8 bits.

    Args:
        bits: weight width.
        a: activation width: "same", a width, or None for float.
        per_channel: one weight step an output channel instead of one a tensor.
        numel: "sample" or "batch", the features that the gradient scale of activation steps counts.
        init: rule for the initial steps of weights and activations, or a number.
        edges: first and last layer: "int8", "inner" or "float".
        edge_bits: width of the first and last layer with edges="int8".
    """
    activation = Part("lsq", "activation", {"numel": numel, "init": init})
    return Recipe(
        name="lsq",
        description=LSQ,
        precisions=(bits,),
        weight=Part("lsq", "weight", {"init": init}),
        activation=None if a is None else activation,
        activation_bits=activation_widths((bits,), a),
        per_channel=per_channel,
        edges=edges,
        edge_activation=activation,
        edge_bits=edge_bits,
        edge_per_channel=per_channel,
        schedule=step_schedule(bits),
    )


@register("lsq_plus", LSQ_PLUS)
def lsq_plus(
    bits: int = 4,
    a: Widths = "same",
    *,
    per_channel: bool = False,
    numel: str = "sample",
    act_init: str | float = "mse",
    edges: str = "int8",
    edge_bits: int = 8,
) -> Recipe:
    """LSQ+ (Bhalgat et al., 2020): activations with a learned step and offset, weights symmetric; 2 to 8 bits.

    Args:
        bits, a, per_channel, numel, edges, edge_bits: as for `lsq`.
        act_init: initial steps and offsets of activations: least squared error on the batch ("mse", the paper's), its
            range ("minmax"), or a number for the step.
    """
    return Recipe(
        name="lsq_plus",
        description=LSQ_PLUS,
        precisions=(bits,),
        weight=Part("lsq_plus", "weight"),
        activation=None if a is None else Part("lsq_plus", "activation", {"numel": numel, "init": act_init}),
        activation_bits=activation_widths((bits,), a),
        per_channel=per_channel,
        edges=edges,
        edge_bits=edge_bits,
        edge_per_channel=per_channel,
        schedule=step_schedule(bits),
    )


@register("dorefa", DOREFA)
def dorefa(
    bits: int = 4,
    a: Widths = "same",
    *,
    scheme: str = "original",
    one_bit: str = "mean",
    detach_max: bool = False,
    edges: str = "int8",
    edge_bits: int = 8,
) -> Recipe:
    """DoReFa-Net (Zhou et al., 2016): weights clamped by tanh, activations cut to [0, 1].

    Args:
        bits, a, edges, edge_bits: as for `lsq`, from 1 bit on.
        scheme: "original" rounding, or the floors "modified" and "centered" of AdaBits.
        one_bit: weights at 1 bit: "mean" is mean|w| times the sign, "sat" the clamp's -1 and 1.
        detach_max: no gradient through the largest |tanh w|.
    """
    weight = Part("dorefa", "weight", {"scheme": scheme, "one_bit": one_bit, "detach_max": detach_max})
    return Recipe(
        name="dorefa",
        description=DOREFA,
        precisions=(bits,),
        weight=weight,
        activation=None if a is None else Part("dorefa", "activation"),
        activation_bits=activation_widths((bits,), a),
        edges=edges,
        edge_bits=edge_bits,
        schedule=step_schedule(bits),
    )


@register("pact", PACT)
def pact(
    bits: int = 4,
    a: Widths = "same",
    *,
    alpha: float | None = None,
    double_side: bool = False,
    edges: str = "int8",
    edge_bits: int = 8,
) -> Recipe:
    """PACT (Choi et al., 2018) on DoReFa weights: the baseline of SAT's tables.

    Args:
        bits, a, edges, edge_bits: as for `dorefa`.
        alpha: initial clipping level; None takes 8 for convolutions and 10 for linear layers (SAT).
        double_side: clip inputs that may be negative to [-alpha, alpha] instead of cutting them at 0.
    """
    return _pact("pact", PACT, bits, a, alpha, double_side, edges, edge_bits)


@register("cg_pact", CG_PACT)
def cg_pact(
    bits: int = 4,
    a: Widths = "same",
    *,
    alpha: float | None = None,
    double_side: bool = False,
    edges: str = "int8",
    edge_bits: int = 8,
) -> Recipe:
    """PACT with SAT's calibrated gradient (eq. 13) and without its rescaling: an ablation of SAT's table 4.

    Args:
        bits, a, alpha, double_side, edges, edge_bits: as for `pact`.
    """
    return _pact("cg_pact", CG_PACT, bits, a, alpha, double_side, edges, edge_bits)


def _pact(  # noqa: PLR0917
    name: str,
    description: str,
    bits: int,
    a: Widths,
    alpha: float | None,
    double_side: bool,
    edges: str,
    edge_bits: int,
) -> Recipe:
    return Recipe(
        name=name,
        description=description,
        precisions=(bits,),
        weight=Part("dorefa", "weight"),
        activation=None if a is None else Part(name, "activation", {"init": alpha, "double_side": double_side}),
        activation_bits=activation_widths((bits,), a),
        edges=edges,
        edge_weight=Part("dorefa", "weight"),
        edge_bits=edge_bits,
        last_input="inner",
        schedule=SAT_SCHEDULE,
    )


SAT_SCHEDULE = Schedule(
    epochs=150,
    batch_size=256,
    lr=0.05,
    nesterov=True,
    weight_decay=4e-5,
    decay="weights_no_depthwise",
    warmup=5.0,
    warmup_start=1.0,
)


@register("int8", INT8)
def int8(a: int | None = 8, *, per_channel: bool = False, range: str = "symmetric", edges: str = "inner") -> Recipe:
    """8-bit weights and activations per tensor; what deployment tools do, and the reference for lower widths.

    Args:
        a: 8, or None for float activations.
        per_channel: one weight scale an output channel instead of one a tensor.
        range: "symmetric" codes -127..127 for every activation, or "full" 0..255 for non-negative ones.
        edges: first and last layer: "inner", "int8" (LSQ steps, learned) or "float".
    """
    return Recipe(
        name="int8",
        description=INT8,
        precisions=(8,),
        weight=Part("int8", "weight"),
        activation=None if a is None else Part("int8", "activation", {"range": range}),
        activation_bits=activation_widths((8,), a),
        per_channel=per_channel,
        edges=edges,
        edge_per_channel=per_channel,
        edge_activation=Part("int8", "activation", {"range": range}),
        schedule=Schedule(lr=0.001, nesterov=True),
    )
