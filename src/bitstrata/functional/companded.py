"""DoReFa's weights, tanh(w)/max|tanh(w)| on a fixed grid, in one node.

Source: Zhou et al., "DoReFa-Net", eq. 9; Jin et al., "Rethinking neural network quantization" (SAT), eqs. 5, 6, 8, 9.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dorefa import dorefa_codes, widened
from .fake_quantize import fake_quantize
from .formula import Formula, Gradients, Needs, Rule, register_formula


@register_formula
@dataclass(frozen=True)
class Companded(Formula):
    """value = unit (code + offset), code that of `dorefa_codes` for x = t/M, t = tanh(w), M = max|t|.

    dw = (1 - t^2)/M (G - the sum of G x, shared among the elements of largest |t|, with their sign); with `detach_max`
    without that sum. unit is 2/(2^b - 1), with `floors` 2^(1-b). tanh and the maximum are torch's, so that codes are
    those of `tanh_normalize`; from there on kernels take one pass each way. All-zero tensors stay zero: M counts as 1.
    """

    bits: int
    floors: bool
    offset: float
    per_channel: bool
    detach_max: bool

    name = "companded"

    def prepared(self, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """t and M, float32 at least; M as one element, or one a channel, (C, 1, ...)."""
        t = torch.tanh(widened(x))
        if self.per_channel:
            within = tuple(range(1, t.dim()))
            low, high = (f(t, within, keepdim=True) if within else t for f in (torch.amin, torch.amax))
        else:
            low, high = (bound.reshape(1) for bound in torch.aminmax(t))
        peak = torch.maximum(high, -low)
        return t, torch.where(peak < torch.finfo(t.dtype).tiny, 1.0, peak)

    def value(self, x: Tensor, step: Tensor, extra: Tensor | None) -> Tensor:
        peak = step.reshape(()) if step.numel() == 1 else step
        codes = dorefa_codes(x / peak, self.bits, "modified" if self.floors else "original")
        return codes.add_(self.offset).mul_(self._unit())

    def _unit(self) -> float:
        return 2.0 ** (1 - self.bits) if self.floors else 2 / (2**self.bits - 1)

    def gradients(
        self, grad: Tensor, x: Tensor, step: Tensor, extra: Tensor | None, *, needs: Needs, factor: float
    ) -> Gradients:
        if not needs[0]:
            return None, None, None
        peak = step.reshape(()) if step.numel() == 1 else step
        g = grad.to(x.dtype)
        through = None if self.detach_max else -_sum_as(g * (x / peak), step) / step
        return self.completed(((g / peak).mul_(1 - x * x), through, None), x, step)

    def kernel_needs(self, needs: Needs) -> Needs:
        return needs[0], needs[0] and not self.detach_max, False

    def completed(self, found: Gradients, x: Tensor, step: Tensor) -> Gradients:
        """With the maximum's gradient given to the elements that are the maximum, in equal shares."""
        d_x, through, _ = found
        if d_x is None or through is None:
            return d_x, None, None
        largest = x.div(step.reshape(()) if step.numel() == 1 else step).trunc_()  # their signs, 0 for all others
        share = through * (1 - step * step) / _sum_as(largest.abs(), step).clamp_min_(1)
        return d_x.addcmul_(largest, share.reshape(()) if share.numel() == 1 else share), None, None

    def rule(self) -> Rule:
        half = 2 ** (self.bits - 1)
        return Rule("tanh_floor" if self.floors else "tanh", -half, half - 1, add=self.offset)


def _sum_as(x: Tensor, like: Tensor) -> Tensor:
    """Sums over what `like`, one element or one a channel, is constant over; in its shape."""
    return x.sum().reshape(like.shape) if like.numel() == 1 else x.flatten(1).sum(1).view(like.shape)


def companded_fake_quantize(
    w: Tensor, bits: int, scheme: str = "original", *, per_channel: bool = False, detach_max: bool = False
) -> Tensor:
    """Fake-quantize weights through tanh onto a fixed grid on [-1, 1]; gradients as in `Companded`.

    Args:
        w: any shape, floating; the result has its shape and dtype.
        bits: b in 1..8.
        scheme: "original", "modified" or "centered", see `dorefa_codes`.
        per_channel: one maximum for each entry of the first dimension, instead of one for the tensor.
        detach_max: no gradient through the maximum.
    """
    formula = Companded(bits, scheme != "original", 0.0 if scheme == "modified" else 0.5, per_channel, detach_max)
    return fake_quantize(w, w.new_ones(1), None, formula)
