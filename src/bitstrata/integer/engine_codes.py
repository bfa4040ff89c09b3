"""Quantization by the engine's kernels: the same codes as the definitions in this package, faster.

What the kernels take: tensors on the CPU, float32 or bfloat16, as rows of channels.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from bitstrata_runtime import _engine

from ..functional import engine_fake  # which also lets the engine use torch's own threads
from .rounding import CounterGenerator

FASTEST = engine_fake.FASTEST
Noise = tuple[int, int] | None  # seed and stream
MEMORY = {torch.float32: torch.float32, torch.bfloat16: torch.int16}  # how the kernels are handed a dtype


def takes(x: Tensor) -> bool:
    """Whether the kernels take x, not empty."""
    return x.device.type == "cpu" and x.dtype in MEMORY and x.numel() > 0 and not torch.jit.is_tracing()  # type: ignore[attr-defined]


def array(x: Tensor | None) -> NDArray[Any] | None:
    """x for the engine: as an array, which is handed over several times faster than a tensor."""
    return None if x is None else x.detach().numpy()


def rows_of(x: Tensor, axis: int) -> Tensor:
    """x with `axis` last, contiguous: without a copy for the channels of a channels-last tensor."""
    return x.detach().movedim(axis, -1).contiguous()


def noise_of(rounding: str, generator: CounterGenerator | None) -> Noise:
    """The next stream, or None for rounding to nearest."""
    return generator.take() if rounding == "stochastic" and generator is not None else None


def shift_codes(
    x: Tensor,
    bits: int,
    groups: int,
    axis: int,
    noise: Noise,
    *,
    signed: bool = True,
    clip_ratio: float = 1.0,
    powers: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, exponents and scale of `shift_quantize`, or of `power_quantize`.

    The scale is NaN if x is not finite, the codes are undefined then.
    """
    rows = rows_of(x, axis)
    flat = rows.reshape(-1, rows.shape[-1]).view(MEMORY[x.dtype])
    out = torch.empty(flat.shape, dtype=torch.uint8)
    scale, exponents = _engine.shift_codes(
        array(flat),
        bits,
        groups,
        signed,
        False,
        clip_ratio,
        noise,
        array(out),
        None,
        FASTEST,
        torch.get_num_threads(),
        powers,
    )
    codes = out.view(rows.shape).movedim(-1, axis)
    kept = codes if not signed and bits == 8 else codes.view(torch.int8)
    return kept, torch.from_numpy(exponents), torch.tensor(scale, dtype=torch.float32)


def code_sums(codes: Tensor, axis: int) -> Tensor:
    """Each channel's sum of int8 codes on the CPU, not empty: int64 (channels,)."""
    rows = rows_of(codes, axis)
    flat = rows.view(-1, rows.shape[-1])
    return torch.from_numpy(_engine.code_sums(array(flat), FASTEST, torch.get_num_threads()))


def weight_codes(weight: Tensor, bits: int, by_output: bool, conv_groups: int) -> tuple[Tensor, Tensor] | None:
    """Codes and scales of `weight_codes` to nearest, or None if the weight is not finite."""
    w = weight.detach().contiguous()
    codes = torch.empty(w.shape, dtype=torch.int8)
    scale = torch.empty(w.shape[0] if by_output else w.shape[1] * conv_groups, dtype=torch.float32)
    shape = (w.shape[0], w.shape[1], -1)
    finite = _engine.weight_codes(
        array(w.reshape(shape)),
        conv_groups,
        bits,
        by_output,
        array(codes.view(shape)),
        array(scale),
        FASTEST,
        torch.get_num_threads(),
    )
    return (codes, scale) if finite else None


def pack(codes: Tensor, bits: int) -> Tensor:
    """`pack_codes` of bytes on the CPU that hold codes of `bits` bits: uint8 (ceil(count * bits / 8),)."""
    flat = codes.detach().reshape(-1).view(torch.uint8)
    out = torch.empty((flat.numel() * bits + 7) // 8, dtype=torch.uint8)
    _engine.pack_codes(array(flat), bits, array(out), FASTEST, torch.get_num_threads())
    return out


def unpack(packed: Tensor, bits: int, count: int, *, signed: bool) -> Tensor:
    """The inverse of `pack`: uint8 (count,), two's complement if signed."""
    out = torch.empty(count, dtype=torch.uint8)
    _engine.unpack_codes(array(packed), bits, signed, array(out), FASTEST, torch.get_num_threads())
    return out
