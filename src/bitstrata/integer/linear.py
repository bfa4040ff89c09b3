"""The three products of a linear layer in training, on integer codes.

The forward product and the input gradient have the groups' channels inside, the weight's scales outside: so weights
have codes with a scale for each output channel, and others with a scale for each input channel. The weight gradient
reuses the codes of the other two. Source: Guo, Liu et al., section 4.1 and appendix D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .peers import Scaled, channel_quantize
from .products import plain_product, product, unit
from .rounding import CounterGenerator
from .shiftquant import ShiftQuantized, along


@dataclass(frozen=True)
class WeightCodes:
    """A weight's codes for one product.

    Attributes:
        codes: int8 (out, in / conv_groups, ...), the weight's shape.
        scale: float32 (out,) for side "out", (in,) for side "in".
        bits: width. side: the channels that have scales of their own. conv_groups: groups of the convolution.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    side: str
    conv_groups: int = 1

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code * scale of its channel, the weight's shape."""
        out = self.codes.shape[0]
        if self.side == "out":
            scale = along(self.scale, 0, self.codes.dim())
        else:
            rows = self.scale.reshape(self.conv_groups, -1).repeat_interleave(out // self.conv_groups, dim=0)
            scale = rows.reshape(out, -1, *[1] * (self.codes.dim() - 2))
        return Scaled(self.codes, scale, self.bits).dequantize(dtype)


def weight_codes(
    weight: Tensor,
    bits: int,
    side: str = "out",
    conv_groups: int = 1,
    *,
    rounding: str = "nearest",
    generator: CounterGenerator | None = None,
) -> WeightCodes:
    """Symmetric codes with a scale for each output channel (forward product) or each input channel (input gradient).

    Each side's scales factor out of its product. Source: Guo, Liu et al., appendix D.

    Args:
        weight: floating (out, in / conv_groups, ...). bits: 2..8. side: "out" or "in".

    Raises:
        ValueError: as shift_quantize; fewer than two dimensions; unknown side; conv_groups that do not divide out.
    """
    if weight.dim() < 2:
        raise ValueError(f"weight_codes: weight must be (out, in, ...), got shape {tuple(weight.shape)}")
    if side not in ("out", "in"):
        raise ValueError(f"weight_codes: side must be 'out' or 'in', got {side!r}")
    if conv_groups < 1 or weight.shape[0] % conv_groups:
        raise ValueError(f"weight_codes: conv_groups must divide the {weight.shape[0]} outputs, got {conv_groups}")
    if side == "out":
        coded = channel_quantize(weight, bits, 0, rounding=rounding, generator=generator)
        return WeightCodes(coded.codes, coded.scale.reshape(-1), bits, side, conv_groups)
    # (group, out, in, taps) -> (group * in, out, taps): a row for each input channel
    split = weight.detach().reshape(conv_groups, -1, *weight.shape[1:])
    rows = split.transpose(1, 2).reshape(conv_groups * weight.shape[1], split.shape[1], -1)
    coded = channel_quantize(rows, bits, 0, rounding=rounding, generator=generator)
    back = coded.codes.reshape(conv_groups, weight.shape[1], split.shape[1], *weight.shape[2:]).transpose(1, 2)
    return WeightCodes(back.reshape(weight.shape).contiguous(), coded.scale.reshape(-1), bits, side, conv_groups)


def _rows(x: ShiftQuantized, where: str) -> ShiftQuantized:
    if x.axis != x.codes.dim() - 1:
        raise ValueError(f"{where}: groups must lie along the last axis, got axis {x.axis} of {tuple(x.codes.shape)}")
    return replace(x, codes=x.codes.reshape(-1, x.codes.shape[-1]), axis=1)


def check_side(w: WeightCodes, side: str, where: str) -> None:
    """ValueError, naming `where`, unless the weight's scales belong to `side`."""
    if w.side != side:
        raise ValueError(f"{where}: weight codes must have scales of side {side!r}, got {w.side!r}")


def linear_forward(
    x: ShiftQuantized, w: WeightCodes, *, form: str = "shift", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Y = X W^T: accumulator times d_X 2^-(N_G-1) a_o. Factors in float64, rounded once to `dtype`.

    Args:
        x: (..., in), groups along the last axis. w: (out, in), side "out". form: of `product`.

    Returns:
        (..., out).

    Raises:
        ValueError: shapes, axis or side that do not fit; as the form.
    """
    check_side(w, "out", "linear_forward")
    acc = product(form, _rows(x, "linear_forward"), w.codes.T, w.bits)
    return (acc * (unit(x) * w.scale.double())).to(dtype).reshape(*x.codes.shape[:-1], -1)


def linear_input_grad(
    g: ShiftQuantized, w: WeightCodes, *, form: str = "shift", dtype: torch.dtype = torch.float32
) -> Tensor:
    """dL/dX = G W: accumulator times d_G 2^-(N_G-1) b_c.

    Args:
        g: (..., out), groups along the last axis. w: (out, in), side "in". form, dtype: as linear_forward.

    Returns:
        (..., in).

    Raises:
        ValueError: as linear_forward.
    """
    check_side(w, "in", "linear_input_grad")
    acc = product(form, _rows(g, "linear_input_grad"), w.codes, w.bits)
    return (acc * (unit(g) * w.scale.double())).to(dtype).reshape(*g.codes.shape[:-1], -1)


def linear_weight_grad(
    g: ShiftQuantized, x: ShiftQuantized, *, form: str = "shift", dtype: torch.dtype = torch.float32
) -> Tensor:
    """dL/dW = G^T X of the same codes: channels are outer dimensions here, so the exponents scale rows and columns.

    Args:
        g: (..., out); x: (..., in), both with groups along the last axis. form: of `plain_product`.

    Returns:
        (out, in).

    Raises:
        ValueError: leading shapes that differ; groups along another axis; as the form.
    """
    rows, columns = _rows(g, "linear_weight_grad"), _rows(x, "linear_weight_grad")
    if g.codes.shape[:-1] != x.codes.shape[:-1]:
        raise ValueError(
            f"linear_weight_grad: g {tuple(g.codes.shape)} and x {tuple(x.codes.shape)} must agree "
            "but for the last axis"
        )
    acc = plain_product(form, g, x, rows.codes.T, columns.codes)
    return (acc * weight_grad_factors(g, x)).to(dtype)


def weight_grad_factors(g: ShiftQuantized, x: ShiftQuantized) -> Tensor:
    """d_G d_X 2^-(e_o + e_c): float64 (channels of g, channels of x)."""
    return g.scale.double() * x.scale.double() * g.factors(torch.float64)[:, None] * x.factors(torch.float64)


def bias_grad(g: ShiftQuantized, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum of the dequantized G over all but its channels: (channels,); one integer sum a channel, then its step."""
    others = [d for d in range(g.codes.dim()) if d != g.axis]
    total = g.codes.to(torch.int64).sum(dim=others) if others else g.codes.to(torch.int64)
    return (total * (g.scale.double() * g.factors(torch.float64))).to(dtype)
