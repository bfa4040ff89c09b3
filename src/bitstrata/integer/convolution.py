"""The three products of a convolution in training, on integer codes: reference by unfolding.

All taps of a channel share its exponent, so a convolution is the linear layer's products on unfolded codes (appendix D
of Guo, Liu et al.), a conv group at a time. One and two spatial dimensions; zero padding, which is code 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import WeightCodes, check_side, weight_grad_factors
from .products import plain_product, product, unit
from .shiftquant import ShiftQuantized

Sizes = int | tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Stride, zero padding, dilation (an integer or one for each spatial dimension) and groups of a convolution."""

    stride: Sizes = 1
    padding: Sizes = 0
    dilation: Sizes = 1
    groups: int = 1

    def __post_init__(self) -> None:
        for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name)
            sizes = (value,) if isinstance(value, int) else value
            if isinstance(sizes, str) or not sizes or min(sizes) < least:
                raise ValueError(f"Geometry: {name} must be integers of at least {least}, got {value!r}")
        if self.groups < 1:
            raise ValueError(f"Geometry: groups must be at least 1, got {self.groups}")

    def planar(self, dims: int) -> dict[str, tuple[int, int]]:
        """Arguments of F.unfold and F.fold for `dims` spatial dimensions, a single one counting as rows of height 1."""
        out = {}
        for name, neutral in (("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name)
            sizes = (value,) * dims if isinstance(value, int) else tuple(value)
            if len(sizes) != dims:
                raise ValueError(
                    f"Geometry: {name} {value!r} has {len(sizes)} sizes, the input {dims} spatial dimensions"
                )
            out[name] = (sizes[0], sizes[1]) if dims == 2 else (neutral, sizes[0])
        return out

    def output(self, size: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the result.

        Raises:
            ValueError: a kernel that is wider than the padded input.
        """
        planar = self.planar(len(size))
        stride, padding, dilation = (v[-len(size) :] for v in planar.values())
        spans = (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1 for i in range(len(size)))
        sizes = tuple(span // stride[i] + 1 for i, span in enumerate(spans))
        if min(sizes) < 1:
            raise ValueError(
                f"Geometry: kernel {tuple(kernel)} with dilation {self.dilation} does not fit an input of "
                f"{tuple(size)} with padding {self.padding}"
            )
        return sizes


def _image(x: ShiftQuantized, where: str) -> Tensor:
    """Codes as float64 (samples, channels, height, width)."""
    if x.axis != 1 or x.codes.dim() not in (3, 4):
        raise ValueError(
            f"{where}: codes must be (samples, channels, [height,] width) with groups along axis 1, "
            f"got {tuple(x.codes.shape)}, axis {x.axis}"
        )
    return x.codes.double() if x.codes.dim() == 4 else x.codes.double().unsqueeze(2)


def _pair(kernel: tuple[int, ...]) -> tuple[int, int]:
    return (kernel[0], kernel[1]) if len(kernel) == 2 else (1, kernel[0])


def _columns(x: ShiftQuantized, kernel: tuple[int, ...], geometry: Geometry, where: str) -> Tensor:
    """Codes unfolded: int64 (conv groups, samples * positions, channels of a group * taps)."""
    image = _image(x, where)
    samples, channels = image.shape[:2]
    if channels % geometry.groups:
        raise ValueError(f"{where}: groups={geometry.groups} must divide the {channels} channels")
    geometry.output(tuple(x.codes.shape[2:]), kernel)  # a clearer error than that of unfold
    columns = F.unfold(image, _pair(kernel), **geometry.planar(len(kernel)))
    columns = columns.reshape(samples, geometry.groups, -1, columns.shape[-1])
    return columns.permute(1, 0, 3, 2).flatten(1, 2).to(torch.int64)


def _positions(x: ShiftQuantized, groups: int) -> Tensor:
    """Codes as rows: int64 (conv groups, samples * positions, channels of a group)."""
    rows = x.codes.to(torch.int64).flatten(2)
    rows = rows.reshape(rows.shape[0], groups, -1, rows.shape[-1])
    return rows.permute(1, 0, 3, 2).flatten(1, 2)


def _operand(x: ShiftQuantized, codes: Tensor, exponents: Tensor) -> ShiftQuantized:
    return replace(x, codes=codes.to(x.codes.dtype), exponents=exponents, axis=1)


def _check_kernel(shape: tuple[int, ...], channels: int, geometry: Geometry, dims: int, where: str) -> None:
    if len(shape) != dims + 2 or shape[1] * geometry.groups != channels or shape[0] % geometry.groups:
        raise ValueError(
            f"{where}: a weight of shape {tuple(shape)} with groups={geometry.groups} does not fit {channels} input "
            f"channels and {dims} spatial dimensions"
        )


def conv_forward(
    x: ShiftQuantized,
    w: WeightCodes,
    geometry: Geometry | None = None,
    *,
    form: str = "shift",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Y = conv(X, W): left-shift accumulator times d_X 2^-(N_G-1) a_o. Factors in float64, rounded once to `dtype`.

    Args:
        x: (samples, in, [height,] width), groups along axis 1. w: (out, in / groups, ...), side "out". geometry: None
            for stride 1 without padding. form: of `product`.

    Returns:
        (samples, out, ...).

    Raises:
        ValueError: shapes, axis or side that do not fit; as the form.
    """
    geometry = geometry or Geometry()
    check_side(w, "out", "conv_forward")
    dims, shape = x.codes.dim() - 2, tuple(w.codes.shape)
    _check_kernel(shape, x.codes.shape[1], geometry, dims, "conv_forward")
    columns = _columns(x, shape[2:], geometry, "conv_forward")
    exponents = x.exponents.repeat_interleave(w.codes[0, 0].numel()).reshape(geometry.groups, -1)
    weights = w.codes.flatten(1).reshape(geometry.groups, -1, columns.shape[-1])
    acc = torch.cat(
        [product(form, _operand(x, columns[k], exponents[k]), weights[k].T, w.bits) for k in range(geometry.groups)],
        dim=1,
    )
    samples = x.codes.shape[0]
    out = (acc * (unit(x) * w.scale.double())).to(dtype).reshape(samples, -1, shape[0]).transpose(1, 2)
    return out.reshape(samples, shape[0], *geometry.output(tuple(x.codes.shape[2:]), shape[2:]))


def conv_input_grad(
    g: ShiftQuantized,
    w: WeightCodes,
    size: tuple[int, ...],
    geometry: Geometry | None = None,
    *,
    form: str = "shift",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """dL/dX of conv(X, W): products with the weight at each position, folded (summed) as integers, times d_G 2^-(N_G-1)
    b_c.

    Args:
        g: (samples, out, ...), groups along axis 1. w: (out, in / groups, ...), side "in", its conv_groups those of the
            geometry.
        size: spatial size of X. geometry, form, dtype: as conv_forward.

    Returns:
        (samples, in, *size).

    Raises:
        ValueError: shapes, axis or side that do not fit; as the form.
    """
    geometry = geometry or Geometry()
    check_side(w, "in", "conv_input_grad")
    shape, dims = tuple(w.codes.shape), len(size)
    _image(g, "conv_input_grad")
    _check_kernel(shape, w.scale.numel(), geometry, dims, "conv_input_grad")
    if tuple(g.codes.shape[1:]) != (shape[0], *geometry.output(size, shape[2:])):
        raise ValueError(
            f"conv_input_grad: g {tuple(g.codes.shape)} is not the result for size {tuple(size)} and weight {shape}, "
            f"(samples, {', '.join(map(str, (shape[0], *geometry.output(size, shape[2:]))))})"
        )
    rows = _positions(g, geometry.groups)
    exponents = g.exponents.reshape(geometry.groups, -1)
    weights = w.codes.reshape(geometry.groups, shape[0] // geometry.groups, -1)
    acc = torch.cat(
        [product(form, _operand(g, rows[k], exponents[k]), weights[k], w.bits) for k in range(geometry.groups)], dim=1
    )
    samples = g.codes.shape[0]
    columns = acc.reshape(samples, -1, acc.shape[1]).transpose(1, 2).double()  # sums of the taps stay far below 2^53
    folded = F.fold(columns, _pair(size), _pair(shape[2:]), **geometry.planar(dims)).reshape(samples, -1, *size)
    scale = (unit(g) * w.scale.double()).reshape(1, -1, *[1] * dims)
    return (folded * scale).to(dtype)


def conv_weight_grad(
    g: ShiftQuantized,
    x: ShiftQuantized,
    kernel: tuple[int, ...],
    geometry: Geometry | None = None,
    *,
    form: str = "shift",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """dL/dW of conv(X, W) from the same codes: integer sums over samples and positions, times d_G d_X 2^-(e_o + e_c).

    Args:
        g: (samples, out, ...); x: (samples, in, ...), both with groups along axis 1. kernel: spatial size of the
            weight.

    Returns:
        (out, in / groups, *kernel).

    Raises:
        ValueError: shapes or axes that do not fit; as the form.
    """
    geometry = geometry or Geometry()
    _image(g, "conv_weight_grad")
    columns = _columns(x, kernel, geometry, "conv_weight_grad")
    expected = (x.codes.shape[0], *geometry.output(tuple(x.codes.shape[2:]), kernel))
    if (g.codes.shape[0], *g.codes.shape[2:]) != expected or g.codes.shape[1] % geometry.groups:
        raise ValueError(
            f"conv_weight_grad: g {tuple(g.codes.shape)} is not a result for x {tuple(x.codes.shape)}, "
            f"kernel {tuple(kernel)} and groups={geometry.groups}"
        )
    acc = plain_product(form, g, x, _positions(g, geometry.groups).transpose(1, 2), columns)
    outs, ins = g.codes.shape[1] // geometry.groups, x.codes.shape[1] // geometry.groups
    acc = acc.reshape(geometry.groups, outs, ins, -1)
    factors = weight_grad_factors(g, x).reshape(geometry.groups, outs, geometry.groups, ins)
    own = torch.stack([factors[k, :, k] for k in range(geometry.groups)])
    return (acc * own[..., None]).to(dtype).reshape(g.codes.shape[1], ins, *kernel)
