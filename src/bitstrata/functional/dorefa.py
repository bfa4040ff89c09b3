"""DoReFa: weights through tanh, activations in [0, 1], stochastic gradients.

Source: Zhou et al., "DoReFa-Net", eqs. 5-12; Jin et al., "Rethinking neural network quantization" (SAT),
eqs. 5, 6, 8, 9.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMES = ("original", "modified", "centered")


def widened(x: Tensor) -> Tensor:
    """x itself in float32 or float64; narrower floats as float32, so that only the result is rounded to them."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def tanh_normalize(w: Tensor, *, per_channel: bool = False, detach_max: bool = False) -> Tensor:
    """tanh(w) / max|tanh(w)|, in [-1, 1] (DoReFa eq. 9, SAT eqs. 5, 6).

    Differentiable: d/dw = (1 - t^2)/M (G - the part that reaches M through the element of largest |t|, which ties share
    equally). All-zero tensors, or channels, stay zero with gradient G.

    Args:
        w: any shape, floating; the result has its shape and dtype.
        per_channel: one maximum for each entry of the first dimension, instead of one for the tensor.
        detach_max: no gradient through the maximum M.
    """
    t = torch.tanh(w)
    size = t.abs()
    peak = size.flatten(1).amax(dim=1).view(-1, *[1] * (w.dim() - 1)) if per_channel else size.amax()
    if detach_max:
        peak = peak.detach()
    return t / torch.where(peak < torch.finfo(w.dtype).tiny, 1.0, peak)


def dorefa_codes(normalized: Tensor, bits: int, scheme: str = "original") -> Tensor:
    """Codes of weights in [-1, 1]: integers in [-2^(b-1), 2^(b-1) - 1], in the input's floating dtype.

    "original" rounds (2^b - 1)(x + 1)/2, ties to even, and stands for (2 code + 1)/(2^b - 1) (DoReFa eq. 9); the others
    take the floor of 2^(b-1) x, so narrower codes are the upper bits of wider ones, and stand for 2^(1-b) code
    ("modified") or 2^(1-b) (code + 1/2) ("centered").
    """
    half = 2 ** (bits - 1)
    if scheme == "original":
        return unit_codes((normalized + 1) / 2, bits) - half
    return (normalized * half).floor_().clamp_(-half, half - 1)


def unit_codes(x: Tensor, bits: int) -> Tensor:
    """round((2^b - 1) clip(x, 0, 1)), ties to even: the code of DoReFa's q_k (eq. 5), in x's floating dtype."""
    return x.clamp(0, 1).mul_(2**bits - 1).round_()


def dorefa_gradient(grad: Tensor, bits: int, noise: Tensor | None = None) -> Tensor:
    """DoReFa's quantized gradient, 2m (q_k(clip(g/(2m) + 1/2 + noise/(2^k - 1), 0, 1)) - 1/2) (eq. 12).

    m is the largest magnitude of each sample. Quantize the gradient of an activation y in training with
    ``y.register_hook(lambda g: dorefa_gradient(g, 6))``.

    Args:
        grad: (samples, ...), floating; the result has its shape and dtype.
        bits: k, at least 1.
        noise: broadcastable to `grad`, in units of the quantization step; None draws it uniformly from [-1/2, 1/2).

    Raises:
        ValueError: bits below 1, or a `grad` without a sample dimension.
    """
    if bits < 1:
        raise ValueError(f"dorefa_gradient: bits must be at least 1, got {bits}")
    if grad.dim() < 2:
        raise ValueError(f"dorefa_gradient: grad must be (samples, ...), got shape {tuple(grad.shape)}")
    g = widened(grad)
    if noise is None:
        noise = torch.rand_like(g) - 0.5
    peak = g.abs().flatten(1).amax(dim=1).view(-1, *[1] * (g.dim() - 1))
    spread = 2 * torch.where(peak == 0, 1.0, peak)
    top = 2**bits - 1
    shifted = g / spread + 0.5 + noise.to(g.dtype) / top
    value = 2 * peak * (unit_codes(shifted, bits) / top - 0.5)
    return value.to(grad.dtype)
