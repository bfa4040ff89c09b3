"""The integer products by the compiled kernels of the engine: form "engine".

Codes are taken as they are, channels last in memory, int8 or uint8. The kernels put the shifts of the groups into the
codes and, where 8 bits are too few for them, into the weights; what is left after that (8-bit codes in several groups)
is one product for each shift, on the channels that have it. Sums are int32; `fits` is the bound that proves that they
hold. Each result is written where it stays, in one pass: sums are scaled while they are in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .engine_codes import array
from .shiftquant import ShiftQuantized

_engine: Any
try:
    from bitstrata_runtime import _engine
except ImportError:  # built without the extension
    _engine = None

INT32_MAX = 2**31 - 1
LARGEST_INT8 = 127
WIDEST_OUTPUT = INT32_MAX // (255 * 128)  # positions of a row whose products int32 sums hold, for any codes
Pair = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """A convolution of planes: stride, zero padding (on both sides alike) and dilation of (rows, columns); groups."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def arguments(self) -> dict[str, Any]:
        """What the engine's functions take."""
        return {
            "stride": self.stride,
            "dilation": self.dilation,
            "padding": (*self.padding, *self.padding),
            "groups": self.groups,
            "isa": "",
            "threads": torch.get_num_threads(),
        }


MATRICES = Layout()


def fits(x: ShiftQuantized, inner: int, largest: int) -> bool:
    """Whether the engine computes a product of x: it is built, x is on the CPU, and int32 holds any sum.

    The bound is that of the format: inner * (x's largest code << (N_G - 1)) * `largest` of the other operand, which is
    int8.
    """
    if _engine is None or x.codes.device.type != "cpu" or x.codes.numel() == 0 or largest > LARGEST_INT8:
        return False
    return inner * (x.largest << (x.groups - 1)) * largest <= INT32_MAX


def weight_grad_fits(g: ShiftQuantized, x: ShiftQuantized, width: int) -> bool:
    """Whether the engine computes a weight gradient: it is built, both are on the CPU, g's codes are int8, and rows of
    the result are no longer than `WIDEST_OUTPUT`. Sums are int64, so there is no bound on their number.
    """
    on_cpu = g.codes.device.type == x.codes.device.type == "cpu" and g.codes.numel() > 0 and x.codes.numel() > 0
    return _engine is not None and on_cpu and g.codes.dtype == torch.int8 and width <= WIDEST_OUTPUT


def rows_as_maps(x: Tensor) -> Tensor:
    """(..., channels) -> (rows, 1, 1, channels): a linear layer is a convolution of maps of one position."""
    return x.reshape(-1, 1, 1, x.shape[-1]).contiguous()


def maps(x: Tensor) -> Tensor:
    """(samples, channels, [height,] width) -> (samples, height, width, channels), contiguous; a view if it is so."""
    planes = x if x.dim() == 4 else x.unsqueeze(2)
    return planes.permute(0, 2, 3, 1).contiguous()


def planes(x: Tensor, dims: int) -> Tensor:
    """The inverse of `maps`, a view: channels last in memory."""
    back = x.permute(0, 3, 1, 2)
    return back if dims == 2 else back.squeeze(2)


def _range(x: ShiftQuantized) -> Pair:
    """Of its codes."""
    return (-x.largest if x.signed else 0), x.largest


def _codes(x: ShiftQuantized, codes: Tensor) -> tuple[Tensor, Pair]:
    """Codes as the engine takes them, unsigned ones as uint8, and their range."""
    return codes if x.signed else codes.view(torch.uint8), _range(x)


def _product(
    name: str,
    x: ShiftQuantized,
    codes: Tensor,
    weight: Tensor,
    shape: tuple[int, ...],
    *,
    layout: Layout,
    factor: Tensor | None,
) -> Tensor:
    operand, bounds = _codes(x, codes)
    out = torch.empty(shape, dtype=torch.int32 if factor is None else torch.float32)
    results: dict[str, Tensor] = {"acc": out} if factor is None else {"values": out, "factor": factor}
    if x.groups > 1:
        results["shift"] = x.shifts().to(torch.uint8)
    arrays = {key: array(result) for key, result in results.items()}
    getattr(_engine, name)(array(operand), bounds, array(weight.contiguous()), **layout.arguments(), **arrays)
    return out


def forward(
    x: ShiftQuantized,
    codes: Tensor,
    weight: Tensor,
    size: Pair,
    *,
    layout: Layout = MATRICES,
    factor: Tensor | None = None,
) -> Tensor:
    """The left-shift accumulator of conv(X, W).

    Args:
        x: what `codes` (samples, height, width, in) are of. weight: int8 (out, in / groups, rows, columns). size: of
            the result. factor: float32 (out,), contiguous, on the CPU.

    Returns:
        (samples, *size, out): int32, or with a factor float32(sum) * factor.
    """
    shape = (codes.shape[0], *size, weight.shape[0])
    return _product("conv_forward", x, codes, weight, shape, layout=layout, factor=factor)


def input_grad(
    g: ShiftQuantized,
    codes: Tensor,
    weight: Tensor,
    size: Pair,
    *,
    layout: Layout = MATRICES,
    factor: Tensor | None = None,
) -> Tensor:
    """The left-shift accumulator of dL/dX of conv(X, W); arguments and result as `forward`, `size` that of X."""
    shape = (codes.shape[0], *size, weight.shape[1] * layout.groups)
    return _product("conv_input_grad", g, codes, weight, shape, layout=layout, factor=factor)


@dataclass(frozen=True)
class GradientOperands:
    """Of a weight gradient: g and x, and their codes as maps, (samples, height, width, channels)."""

    g: ShiftQuantized
    x: ShiftQuantized
    g_codes: Tensor
    x_codes: Tensor

    def arguments(self) -> tuple[Any, ...]:
        """As the engine takes them."""
        return array(self.g_codes), _range(self.g), array(self.x_codes), _range(self.x)


def weight_grad(operands: GradientOperands, kernel: Pair, layout: Layout = MATRICES) -> Tensor:
    """Sums over samples and positions of gradient codes times input codes: int64 (out, in / groups, *kernel)."""
    out = torch.empty(operands.g_codes.shape[3], operands.x_codes.shape[3] // layout.groups, *kernel, dtype=torch.int64)
    _engine.conv_weight_grad(*operands.arguments(), **layout.arguments(), gw=array(out))
    return out


def scaled_weight_grad(
    operands: GradientOperands, kernel: Pair, factors: tuple[Tensor, Tensor], layout: Layout = MATRICES
) -> Tensor:
    """The same times the factors of the output and the input channel (float64 (out,) and (in,), the products of which
    are exact): rounded once, to float32.
    """
    shape = (operands.g_codes.shape[3], operands.x_codes.shape[3] // layout.groups, *kernel)
    out = torch.empty(shape, dtype=torch.float32)
    _engine.conv_weight_grad(
        *operands.arguments(),
        **layout.arguments(),
        values=array(out),
        out_factor=array(factors[0].contiguous()),
        in_factor=array(factors[1].contiguous()),
    )
    return out


def matmul(x: ShiftQuantized, other: Tensor) -> Tensor:
    """The left-shift accumulator of x (rows, inner) and integer codes (inner, columns), as int64 (rows, columns)."""
    weight = other.to(torch.int8).T.contiguous().reshape(other.shape[1], other.shape[0], 1, 1)
    return forward(x, rows_as_maps(x.codes), weight, (1, 1)).reshape(-1, other.shape[1]).to(torch.int64)
