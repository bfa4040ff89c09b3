"""Weight standardization, a transform of the weight before its quantizer (MaQD, Sawada, Saiin and Suetake, 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .registry import register

SCALES = ("unit", "fan_in")


@register("standardize", "transform", "standardization of each output channel: mean 0 and standard deviation 1")
class Standardize(nn.Module):
    """w' = (w - mean) sqrt(F) / sqrt(F var + eps_ws) an output channel, of F weights each; var is biased (over F).

    Differentiated through mean and var, so (eps_ws = 0) a channel's gradient is orthogonal to 1 and to w. Constant
    channels become 0 if eps_ws > 0. Computed in float32 at least. Source: MaQD section 3.1, eq. 4.

    The equation as printed lacks the factor sqrt(F), while its text and its results need unit deviation: with
    "fan_in" the factor is left out, and w' has deviation 1/sqrt(F).

    Args:
        eps_ws: at least 0, added under the root to F var.
        ws_scale: "unit" or "fan_in".
    """

    def __init__(self, *, eps_ws: float = 1e-4, ws_scale: str = "unit") -> None:
        super().__init__()
        if not 0 <= eps_ws < math.inf:
            raise ValueError(f"Standardize: eps_ws must be finite and at least 0, got {eps_ws!r}")
        if ws_scale not in SCALES:
            raise ValueError(f"Standardize: ws_scale must be 'unit' or 'fan_in', got {ws_scale!r}")
        self.eps_ws = float(eps_ws)
        self.ws_scale = ws_scale

    def forward(self, w: Tensor) -> Tensor:
        """(out, ...) to the same shape and dtype. ValueError for channels of fewer than two weights."""
        if w.dim() < 2 or w[0].numel() < 2:
            raise ValueError(
                f"Standardize: a weight of shape {tuple(w.shape)} has fewer than two elements an output channel, so "
                "its channels have no deviation"
            )
        wide = w.float() if w.dtype in (torch.float16, torch.bfloat16) else w
        axes = tuple(range(1, w.dim()))
        fan_in = w[0].numel()
        centered = wide - wide.mean(dim=axes, keepdim=True)
        variance = centered.square().mean(dim=axes, keepdim=True)
        gain = (fan_in if self.ws_scale == "unit" else 1.0) ** 0.5
        return (centered * (gain / (fan_in * variance + self.eps_ws).sqrt())).to(w.dtype)

    def extra_repr(self) -> str:
        return f"eps_ws={self.eps_ws:g}, ws_scale={self.ws_scale!r}"
