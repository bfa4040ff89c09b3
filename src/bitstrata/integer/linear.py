"""The three products of a linear layer in training, on integer codes.

The forward product and the input gradient have the groups' channels inside, the weight's scales outside: so weights
have codes with a scale for each output channel, and others with a scale for each input channel. The weight gradient
reuses the codes of the other two. Source: Guo, Liu et al., section 4.1 and appendix D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import engine_codes
from . import engine_products as engine
from .peers import Scaled, channel_quantize
from .products import check_form, plain_product, product, scaled, unit
from .rounding import CounterGenerator
from .shiftquant import ShiftQuantized, along, check_bits, largest_code


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
    check_bits(bits, "weight_codes")
    if conv_groups < 1 or weight.shape[0] % conv_groups:
        raise ValueError(f"weight_codes: conv_groups must divide the {weight.shape[0]} outputs, got {conv_groups}")
    if rounding == "nearest" and weight.dtype == torch.float32 and engine_codes.takes(weight):
        made = engine_codes.weight_codes(weight, bits, side == "out", conv_groups)
        if made is not None:
            return WeightCodes(*made, bits, side, conv_groups)
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


def _linear(form: str, x: ShiftQuantized, w: WeightCodes, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x (rows, inner) times the transpose of weight (columns, inner), scaled: (rows, columns)."""
    check_form(form)
    factor = unit(x) * w.scale.double()
    inner = x.codes.shape[1]
    if weight.shape[1] == inner and form == "engine" and engine.fits(x, inner, largest_code(w.bits)):
        direct = factor.to(torch.float32) if dtype == torch.float32 else None
        codes = engine.rows_as_maps(x.codes)
        if w.side == "out":
            out = engine.forward(x, codes, w.codes[:, :, None, None], (1, 1), factor=direct)
        else:
            out = engine.input_grad(x, codes, w.codes[:, :, None, None], (1, 1), factor=direct)
        out = out.reshape(len(codes), -1)
        return out if direct is not None else scaled(out, factor, dtype)
    return scaled(product(form, x, weight.T, w.bits), factor, dtype)


def linear_forward(
    x: ShiftQuantized, w: WeightCodes, *, form: str = "shift", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Y = X W^T: accumulator times d_X 2^-(N_G-1) a_o, as `scaled`.

    Args:
        x: (..., in), groups along the last axis. w: (out, in), side "out". form: of `product`, all give the same;
            "engine" is the fastest.

    Returns:
        (..., out).

    Raises:
        ValueError: shapes, axis or side that do not fit; as the form.
    """
    check_side(w, "out", "linear_forward")
    return _linear(form, _rows(x, "linear_forward"), w, w.codes, dtype).reshape(*x.codes.shape[:-1], -1)


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
    return _linear(form, _rows(g, "linear_input_grad"), w, w.codes.T, dtype).reshape(*g.codes.shape[:-1], -1)


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
    check_form(form)
    if form == "engine" and engine.weight_grad_fits(g, x, 1):
        maps = engine.rows_as_maps(rows.codes), engine.rows_as_maps(columns.codes)
        operands = engine.GradientOperands(g, x, *maps)
        if dtype == torch.float32:
            return engine.scaled_weight_grad(operands, (1, 1), weight_grad_sides(g, x))[:, :, 0, 0]
        acc = engine.weight_grad(operands, (1, 1))[:, :, 0, 0]
    else:
        acc = plain_product(form, g, x, rows.codes.T, columns.codes)
    return (acc * weight_grad_factors(g, x)).to(dtype)


def weight_grad_sides(g: ShiftQuantized, x: ShiftQuantized) -> tuple[Tensor, Tensor]:
    """d_G d_X 2^-e_o and 2^-e_c, whose product is exact: float64 (channels of g,) and (channels of x,)."""
    return g.scale.double() * x.scale.double() * g.factors(torch.float64), x.factors(torch.float64)


def weight_grad_factors(g: ShiftQuantized, x: ShiftQuantized) -> Tensor:
    """d_G d_X 2^-(e_o + e_c): float64 (channels of g, channels of x)."""
    outs, ins = weight_grad_sides(g, x)
    return outs[:, None] * ins


def bias_grad(g: ShiftQuantized, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum of the dequantized G over all but its channels: (channels,); one integer sum a channel, then its step."""
    if g.codes.device.type == "cpu" and g.codes.dtype == torch.int8 and g.codes.numel():
        total = engine_codes.code_sums(g.codes, g.axis)
    else:
        others = [d for d in range(g.codes.dim()) if d != g.axis]
        total = g.codes.to(torch.int64).sum(dim=others) if others else g.codes.to(torch.int64)
    return (total * (g.scale.double() * g.factors(torch.float64))).to(dtype)
