"""The integer program: what a trained network becomes, at every precision it was trained for.

A `Program` is a graph of integer operations plus, per precision, the float64 factors from which the integer
constants of a *plan* (see `plan.py`) are derived. It is what `bitstrata.lower` returns, what an artifact stores and
what a session holds. spec/numerics.md gives every operation's exact meaning.

Values (the results of nodes) are of three kinds:

- ``code``: integer codes of the activation grid of the layer that will read them (uint8 or int8);
- ``acc``: int32 accumulators of a convolution, one real-valued affine a channel away from their meaning;
- ``fixed``: int32 fixed point, real value = scale * integer, one scale a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Node:
    """One operation of the graph; `name` is also the name of the value it produces.

    op and its attributes (all JSON values); shapes are (C, H, W), a batch dimension is implied:

    ========  ==============  ======================================================================
    op        inputs          attrs
    ========  ==============  ======================================================================
    input     none            (shape and range come from `Program.input_shape` and the reading layer)
    conv      code            layer, stride [h, w], padding [top, bottom, left, right],
                              dilation [h, w], groups; linear layers are 1x1 convolutions of 1x1 maps
    requant   acc | fixed     to (layer whose input grid the codes belong to), affine [names], clip [lo, hi]
    rescale   acc | fixed     affine [names], clip [lo, hi]
    add       fixed, fixed    none
    clip      fixed           clip [lo, hi]
    maxpool   fixed | code    kernel [h, w], stride [h, w], padding [top, bottom, left, right]
    avgpool   fixed | code    kernel, stride, padding (padded zeros count into the divisor kh*kw); of codes the
                              sum, whose divisor is in the reading layer's affine
    slice     fixed | code    c, h, w: each [start, stop, step], 0 <= start < stop <= size, step >= 1
    pad       fixed           c, h, w: each [before, after], padded with the value 0
    flatten   fixed | code    none; (C, H, W) -> (C*H*W, 1, 1) in C, H, W order
    ========  ==============  ======================================================================

    ``clip`` bounds are real numbers or None. ``affine`` names entries of `Program.affines`, applied left to right;
    for an ``acc`` input the first one is the affine of the layer that produced it.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One weighted layer: shapes, weight codes' form and input grid. Bits and ranges are keyed by precision.

    integer weight = mul * code + add with (mul, add) = integer_form[precision], so that grids centred between codes
    (the nested symmetric grid: 2c + 1) stay integer; the real scale is folded into the layer's affine.

    An input_offset is one number; where the layer reads the network's input, it may be one a channel of that.
    """

    name: str
    kind: str  # "conv" | "linear"; for people, the arithmetic is the same
    shape: tuple[int, int, int, int]  # (out channels, in channels / groups, kernel height, kernel width)
    source_bits: int  # width of the full code, 1..8
    planes: bool  # True: the codes are bit-planes spread over the strata; False: resident 8-bit codes
    weight_bits: Mapping[int, int]  # precision -> width of the code in use, <= source_bits
    integer_form: Mapping[int, tuple[int, int]]  # precision -> (mul, add)
    input_range: Mapping[int, tuple[int, int]]  # precision -> smallest, largest input code; within uint8 or int8
    pad_code: Mapping[int, tuple[int, ...]]  # precision -> code where a convolution pads: one, or one an input channel
    input_offset: Mapping[int, tuple[float, ...]]  # precision -> z in input value = step * (code + z): see below
    grid: str = ""  # name of the weight grid, for people


@dataclass(frozen=True)
class AffineInfo:
    """A per-channel real affine y = mul*x + add; its factors are those of the precision `owner` runs at."""

    owner: str  # layer name
    channels: int


@dataclass(frozen=True)
class Weights:
    """Codes of a layer as far as they are held: the first `bits` bit-planes, int8 of `Layer.shape`.

    Codes are signed, in [-2^(bits-1), 2^(bits-1) - 1]; at b <= bits they are ``codes >> (bits - b)``.
    """

    codes: NDArray[np.int8]
    bits: int


@dataclass
class Factors:
    """The float64 factors of one precision (or of one plan).

    affine: name -> array (2, channels) of float64: row 0 multiplies, row 1 adds.
    step:   layer -> step of the layer's input grid, value = step * (code + input_offset).
    A plan's factors hold only the affines that were re-estimated.
    """

    affine: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    step: dict[str, float] = field(default_factory=dict)


@dataclass
class Program:
    """A network in integers at several precisions. See the module docstring and spec/numerics.md.

    `plans` names per-layer precision maps (layer -> precision, complete) whose re-estimated affines are in
    ``factors[name]``; ordinary precisions are keyed by their decimal string ("1", "2", ...).
    """

    input_shape: tuple[int, int, int]  # (C, H, W)
    input_kind: str  # "pixels": uint8 NCHW, the code is the pixel; "codes": floats enter through step and range
    nodes: tuple[Node, ...]
    output: str  # a `fixed` value: the logits, (classes, 1, 1) or any map
    layers: dict[str, Layer]
    affines: dict[str, AffineInfo]
    precisions: tuple[int, ...]  # ascending
    weights: dict[str, Weights]
    factors: dict[str, Factors]
    plans: dict[str, dict[str, int]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)  # JSON values; never a clock time
