"""SAT's scale-adjusted weights: constants that give a layer's weights the variance efficient training asks for.

Source: Jin et al., "Rethinking neural network quantization", eqs. 7, 10, S23.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dorefa import tanh_normalize, widened
from .uniform import EPS

VARIANCES = ("meansq", "std")


def spread(w: Tensor, var_mode: str = "meansq") -> Tensor:
    """A tensor's deviation, 0-d: the root of mean(w^2) ("meansq", the paper's text), or torch.std ("std", public code).

    Scaled by the largest magnitude before squaring, so that nothing under- or overflows. One element alone has no
    deviation: "std" is 0 for it.
    """
    if var_mode not in VARIANCES:
        raise ValueError(f"spread: var_mode must be one of {', '.join(VARIANCES)}, got {var_mode!r}")
    peak = w.abs().amax()
    unit = w / torch.where(peak < torch.finfo(w.dtype).tiny, 1.0, peak)
    if var_mode == "meansq":
        return peak * unit.square().mean().sqrt()
    return peak * unit.std() if w.numel() > 1 else torch.zeros_like(peak)


@torch.no_grad()
def sat_scale(w: Tensor, var_mode: str = "meansq") -> Tensor:
    """s = 1/sqrt(n_hat V), V the variance of w, so that n_hat times the variance of s w is 1 (SAT eqs. 7, 10).

    A constant: no gradient passes through V. 1 where V is 0.

    Args:
        w: (out, in/groups, ...): quantized weights, or tanh(W)/max|tanh(W)| of a float network. n_hat is out times the
            kernel's positions; groups are ignored.
        var_mode: see `spread`.

    Returns:
        0-d, in w's dtype, at least float32.

    Raises:
        ValueError: an unknown var_mode, or a w of fewer than two dimensions.
    """
    if w.dim() < 2:
        raise ValueError(f"sat_scale: w must be (out, in/groups, ...), got shape {tuple(w.shape)}")
    wide = widened(w)
    positions = w.numel() // max(w.shape[0] * w.shape[1], 1)
    deviation = spread(wide, var_mode) * (w.shape[0] * positions) ** 0.5
    return torch.where(deviation < torch.finfo(wide.dtype).tiny, 1.0, 1 / deviation)


@torch.no_grad()
def sat_gain(w: Tensor, var_mode: str = "meansq") -> float:
    """What rescaling multiplies the gradient of small weights by: s / max|tanh(w)|, with s of `clamped_weight`.

    The clamp takes the size out of w, and s gives it the one that n_hat asks for, so w itself may have any. A step of
    gradient descent moves the rescaled weight by the square of this times the learning rate: for weights that are much
    smaller than 1/sqrt(n_hat), far too much. No number of the paper's: follows from eqs. 5-7.
    """
    largest = float(w.detach().abs().amax().tanh())
    if largest == 0:
        return 1.0
    return float(sat_scale(widened(w.detach()).tanh() / largest, var_mode)) / largest


@torch.no_grad()
def deviation_scale(w: Tensor, quantized: Tensor, var_mode: str = "meansq") -> Tensor:
    """s = sqrt(VAR[w] / VAR[quantized]), which gives the quantized weights the spread of w (SAT eq. S23).

    A constant, at least 1e-8; 1 where VAR[quantized] is 0.

    Returns:
        0-d, in w's dtype, at least float32.
    """
    wide = widened(w)
    below = spread(widened(quantized).to(wide.dtype), var_mode)
    ratio = (spread(wide, var_mode) / below).clamp_min(EPS)
    return torch.where(below < torch.finfo(wide.dtype).tiny, 1.0, ratio)


def clamped_weight(w: Tensor, *, rescale: bool = True, var_mode: str = "meansq", detach_max: bool = False) -> Tensor:
    """The weight of SAT's float network: s tanh(w)/max|tanh(w)|, with s = `sat_scale` of that quotient (SAT eqs. 5-7).

    Args:
        w: (out, in/groups, ...), floating; the result has its shape and dtype.
        rescale: False leaves s = 1, for convolutions that a normalization follows.
        var_mode: see `spread`. detach_max: see `tanh_normalize`.
    """
    normalized = tanh_normalize(widened(w), detach_max=detach_max)
    if rescale:
        normalized = normalized * sat_scale(normalized, var_mode)
    return normalized.to(w.dtype)
