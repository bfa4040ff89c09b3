"""SAT's clamp of weights as a transform of its own (Jin et al., eqs. 5-7)."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional.sat import VARIANCES, clamped_weight
from .registry import register


@register("tanh", "transform", "tanh(w)/max|tanh(w)|: SAT's clamp of weights into [-1, 1], for any quantizer behind it")
class Tanh(nn.Module):
    """value = s tanh(w)/max|tanh(w)|, s = 1, or SAT's 1/sqrt(n_hat mean(value^2)) for a float network.

    Gradients: through tanh and through the maximum, whose gradient ties share equally; s is a constant. No parameters.
    As a parametrization (`torch.nn.utils.parametrize`) of a float layer's weight it trains the network that quantized
    training starts from; before a quantizer it compands the weights. Source: SAT eqs. 5-7.

    Args:
        rescale: multiply by SAT's constant; leave it out where a quantizer or a normalization follows.
        var_mode: "meansq" (the paper's text) or "std" (public code), the variance in s.
        detach_max: no gradient through the maximum.
    """

    def __init__(self, *, rescale: bool = False, var_mode: str = "meansq", detach_max: bool = False) -> None:
        super().__init__()
        if var_mode not in VARIANCES:
            raise ValueError(f"Tanh: var_mode must be one of {', '.join(VARIANCES)}, got {var_mode!r}")
        self.rescale = rescale
        self.var_mode = var_mode
        self.detach_max = detach_max

    def extra_repr(self) -> str:
        return f"rescale={self.rescale}, var_mode={self.var_mode!r}, detach_max={self.detach_max}"

    def forward(self, w: Tensor) -> Tensor:
        return clamped_weight(w, rescale=self.rescale, var_mode=self.var_mode, detach_max=self.detach_max)
