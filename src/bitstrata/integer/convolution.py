"""The three products of a convolution in training, on integer codes: reference by unfolding.

All taps of a channel share its exponent, so a convolution is the linear layer's products on unfolded codes (appendix D
of Guo, Liu et al.), a conv group at a time. One and two spatial dimensions; zero padding, which is code 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import engine_products as engine
from .linear import WeightCodes, check_side, weight_grad_factors, weight_grad_sides
from .products import check_form, plain_product, product, scaled, unit
from .shiftquant import ShiftQuantized, largest_code

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


def _check_image(x: ShiftQuantized, where: str) -> None:
    if x.axis != 1 or x.codes.dim() not in (3, 4):
        raise ValueError(
            f"{where}: codes must be (samples, channels, [height,] width) with groups along axis 1, "
            f"got {tuple(x.codes.shape)}, axis {x.axis}"
        )


def _image(x: ShiftQuantized, where: str) -> Tensor:
    """Codes as float64 (samples, channels, height, width)."""
    _check_image(x, where)
    return x.codes.double() if x.codes.dim() == 4 else x.codes.double().unsqueeze(2)


def _pair(kernel: tuple[int, ...]) -> tuple[int, int]:
    return (kernel[0], kernel[1]) if len(kernel) == 2 else (1, kernel[0])


def _check_columns(x: ShiftQuantized, kernel: tuple[int, ...], geometry: Geometry, where: str) -> None:
    _check_image(x, where)
    channels = x.codes.shape[1]
    if channels % geometry.groups:
        raise ValueError(f"{where}: groups={geometry.groups} must divide the {channels} channels")
    geometry.output(tuple(x.codes.shape[2:]), kernel)  # a clearer error than that of unfold


def _columns(x: ShiftQuantized, kernel: tuple[int, ...], geometry: Geometry, where: str) -> Tensor:
    """Codes unfolded: int64 (conv groups, samples * positions, channels of a group * taps)."""
    _check_columns(x, kernel, geometry, where)
    image = _image(x, where)
    samples = image.shape[0]
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


def _by_engine(
    compute: Callable[..., Tensor],
    x: ShiftQuantized,
    w: WeightCodes,
    *,
    size: tuple[int, ...],
    geometry: Geometry,
    factor: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The forward product or the input gradient, with channels last in memory."""
    dims = len(size)
    weight = w.codes if dims == 2 else w.codes.unsqueeze(2)
    layout = engine.Layout(**geometry.planar(dims), groups=geometry.groups)
    direct = factor.to(torch.float32) if dtype == torch.float32 else None
    out = compute(x, engine.maps(x.codes), weight, _pair(size), layout=layout, factor=direct)
    return engine.planes(out if direct is not None else scaled(out, factor, dtype), dims)


def conv_forward(
    x: ShiftQuantized,
    w: WeightCodes,
    geometry: Geometry | None = None,
    *,
    form: str = "shift",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Y = conv(X, W): left-shift accumulator times d_X 2^-(N_G-1) a_o, as `scaled`.

    Args:
        x: (samples, in, [height,] width), groups along axis 1. w: (out, in / groups, ...), side "out". geometry: None
            for stride 1 without padding. form: of `product`, all give the same; "engine" is the fastest.

    Returns:
        (samples, out, ...).

    Raises:
        ValueError: shapes, axis or side that do not fit; as the form.
    """
    geometry = geometry or Geometry()
    check_side(w, "out", "conv_forward")
    dims, shape = x.codes.dim() - 2, tuple(w.codes.shape)
    _check_kernel(shape, x.codes.shape[1], geometry, dims, "conv_forward")
    check_form(form)
    _check_image(x, "conv_forward")
    size, factor = geometry.output(tuple(x.codes.shape[2:]), shape[2:]), unit(x) * w.scale.double()
    if form == "engine" and engine.fits(x, w.codes[0].numel(), largest_code(w.bits)):
        return _by_engine(engine.forward, x, w, size=size, geometry=geometry, factor=factor, dtype=dtype)
    columns = _columns(x, shape[2:], geometry, "conv_forward")
    exponents = x.exponents.repeat_interleave(w.codes[0, 0].numel()).reshape(geometry.groups, -1)
    weights = w.codes.flatten(1).reshape(geometry.groups, -1, columns.shape[-1])
    acc = torch.cat(
        [product(form, _operand(x, columns[k], exponents[k]), weights[k].T, w.bits) for k in range(geometry.groups)],
        dim=1,
    )
    samples = x.codes.shape[0]
    out = scaled(acc, factor, dtype).reshape(samples, -1, shape[0]).transpose(1, 2)
    return out.reshape(samples, shape[0], *size)


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
    check_form(form)
    _check_image(g, "conv_input_grad")
    _check_kernel(shape, w.scale.numel(), geometry, dims, "conv_input_grad")
    if tuple(g.codes.shape[1:]) != (shape[0], *geometry.output(size, shape[2:])):
        raise ValueError(
            f"conv_input_grad: g {tuple(g.codes.shape)} is not the result for size {tuple(size)} and weight {shape}, "
            f"(samples, {', '.join(map(str, (shape[0], *geometry.output(size, shape[2:]))))})"
        )
    factor = unit(g) * w.scale.double()
    if form == "engine" and engine.fits(g, w.codes[:, 0].numel() // geometry.groups, largest_code(w.bits)):
        return _by_engine(engine.input_grad, g, w, size=size, geometry=geometry, factor=factor, dtype=dtype)
    rows = _positions(g, geometry.groups)
    exponents = g.exponents.reshape(geometry.groups, -1)
    weights = w.codes.reshape(geometry.groups, shape[0] // geometry.groups, -1)
    acc = torch.cat(
        [product(form, _operand(g, rows[k], exponents[k]), weights[k], w.bits) for k in range(geometry.groups)], dim=1
    )
    samples = g.codes.shape[0]
    columns = acc.reshape(samples, -1, acc.shape[1]).transpose(1, 2).double()  # sums of the taps stay far below 2^53
    folded = F.fold(columns, _pair(size), _pair(shape[2:]), **geometry.planar(dims)).reshape(samples, -1, *size)
    return scaled(folded.to(torch.int64), factor.reshape(1, -1, *[1] * dims), dtype)


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
    check_form(form)
    _check_image(g, "conv_weight_grad")
    _check_columns(x, kernel, geometry, "conv_weight_grad")
    expected = (x.codes.shape[0], *geometry.output(tuple(x.codes.shape[2:]), kernel))
    if (g.codes.shape[0], *g.codes.shape[2:]) != expected or g.codes.shape[1] % geometry.groups:
        raise ValueError(
            f"conv_weight_grad: g {tuple(g.codes.shape)} is not a result for x {tuple(x.codes.shape)}, "
            f"kernel {tuple(kernel)} and groups={geometry.groups}"
        )
    if form == "engine" and engine.weight_grad_fits(g, x, g.codes.shape[-1]):
        return _weight_grad_by_engine(g, x, kernel, geometry, dtype)
    columns = _columns(x, kernel, geometry, "conv_weight_grad")
    acc = plain_product(form, g, x, _positions(g, geometry.groups).transpose(1, 2), columns)
    outs, ins = g.codes.shape[1] // geometry.groups, x.codes.shape[1] // geometry.groups
    acc = acc.reshape(geometry.groups, outs, ins, -1)
    return (acc * _own_factors(g, x, geometry.groups)[..., None]).to(dtype).reshape(g.codes.shape[1], ins, *kernel)


def _own_factors(g: ShiftQuantized, x: ShiftQuantized, groups: int) -> Tensor:
    """The weight gradient's factors of channels that meet: float64 (conv groups, outs of a group, ins of a group)."""
    factors = weight_grad_factors(g, x).reshape(groups, g.codes.shape[1] // groups, groups, x.codes.shape[1] // groups)
    return torch.stack([factors[k, :, k] for k in range(groups)])


def _weight_grad_by_engine(
    g: ShiftQuantized, x: ShiftQuantized, kernel: tuple[int, ...], geometry: Geometry, dtype: torch.dtype
) -> Tensor:
    layout = engine.Layout(**geometry.planar(len(kernel)), groups=geometry.groups)
    operands = engine.GradientOperands(g, x, engine.maps(g.codes), engine.maps(x.codes))
    if dtype == torch.float32:
        out = engine.scaled_weight_grad(operands, _pair(kernel), weight_grad_sides(g, x), layout)
    else:
        acc = engine.weight_grad(operands, _pair(kernel), layout)
        factors = _own_factors(g, x, geometry.groups).flatten(0, 1)
        out = (acc * factors[:, :, None, None]).to(dtype)
    return out.reshape(*out.shape[:2], *kernel)
