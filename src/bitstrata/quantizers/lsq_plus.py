"""LSQ+: LSQ with a learned offset of activations, and other initial steps (Bhalgat et al., CVPR workshops 2020)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..functional.affine import affine_codes, affine_fake_quantize, best_affine
from ..functional.ranks import gather_rows
from ..functional.uniform import EPS
from .base import ActivationQuantizer, Grid
from .initial import Rule, check_rule
from .lsq import LSQWeight
from .registry import register

RULES = ("mse", "minmax")


@register("lsq_plus", "weight", "LSQ+: LSQ's symmetric weights with a step from mean and deviation (2 to 8 bits)")
class LSQPlusWeight(LSQWeight):
    """value = s * round(clamp(w/s, -2^(b-1), 2^(b-1)-1)), LSQ with another initial step.

    Gradients and levels: those of LSQ weights.
    Init: s = max(|mean - 3 std|, |mean + 3 std|) / 2^(b-1). Source: LSQ+ sections 3.1, 3.2 (eq. 9).

    Args:
        init: rule for the initial step, see `initial`.
    """

    def __init__(
        self, bits: Mapping[int, int], *, channels: int | None = None, signed: bool = True, init: Rule = "three_sigma"
    ) -> None:
        super().__init__(bits, channels=channels, signed=signed, init=init)


@register("lsq_plus", "activation", "LSQ+: learned step and offset, unsigned codes whatever the inputs' sign")
class LSQPlusActivation(ActivationQuantizer):
    """value = s * (code + beta/s), code = round(clip((x - beta)/s, 0, 2^b - 1)); step and offset a precision.

    Gradients (G = dL/dvalue, g = 1/sqrt(N (2^b - 1)), N = features a sample or elements a batch):
        in range (bounds included):  dx = G,  ds = g G (code - (x - beta)/s),  dbeta = 0
        below, above:                dx = 0,  ds = 0, g G (2^b - 1),           dbeta = g G
    Levels: 2^b, at any sign of the inputs, 1 bit included; 0 need not be among them.
    Init: the s and beta of least squared error on the first training batch. While calibration observes several, each is
    solved by itself and the solution with the widest range s (2^b - 1) stays. A batch of one value gets the grid from 0
    to it. Source: LSQ+ eqs. 5-8, section 3.2 (eq. 10).

    Args:
        numel: "sample" or "batch", what N counts.
        init: "mse" as above; "minmax", the range of the batch; or a number, that step with beta = 0, without data.
    """

    min_signed_bits = 1
    shifted = True

    def __init__(
        self,
        bits: Mapping[int, int],
        *,
        signed: bool = False,
        shared: bool = False,
        numel: str = "sample",
        init: Rule = "mse",
    ) -> None:
        check_rule("LSQPlusActivation", init, RULES)
        super().__init__(bits, signed=False, shared=shared, numel=numel, init=init)
        self.betas = nn.ParameterDict({key: nn.Parameter(torch.zeros(1)) for key in self.steps})

    @property
    def beta(self) -> nn.Parameter:
        """The offset of the current precision, in units of x."""
        return self.betas["shared" if self.shared else str(self.precision)]

    def grid(self, x: Tensor | None = None) -> Grid:
        self.require_initialized()
        step = self.step.detach().clamp_min(EPS)
        return Grid(step, self.beta.detach() / step, *self.limits())

    def codes(self, x: Tensor) -> Tensor:
        self.require_initialized()
        return affine_codes(x.detach(), self.step.detach(), self.beta.detach(), self.limits()[1]).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        self.prepare(x)
        hi = self.limits()[1]
        return affine_fake_quantize(x, self.step, self.beta, hi, grad_scale=(self.count(x) * hi) ** -0.5)

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        if isinstance(self.init, float):
            return
        if self.sync:
            x = gather_rows(x)  # no statistic smaller than the data gives the grid of least error
        if x.numel() == 0 or not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"{type(self).__name__}: cannot set the step from a batch of shape {tuple(x.shape)}: not finite"
            )
        slot, hi = self._slots[self.precision], self.limits()[1]
        step, beta = best_affine(x, hi) if self.init == "mse" else _covering(x, hi)
        span = step * hi
        if span > 0 and (not self.observing or span > self.statistic[slot]):  # an all-zero batch tells nothing
            self.step.fill_(step)
            self.beta.fill_(beta)
            self.statistic[slot] = span
            self.initialized[slot] = True

    def precision_parameters(self) -> dict[int, list[nn.Parameter]]:
        return {} if self.shared else {p: [self.steps[str(p)], self.betas[str(p)]] for p in self.bits}


def _covering(x: Tensor, hi: int) -> tuple[float, float]:
    """Step and offset of the grid from the smallest to the largest element; from 0 if they are all alike."""
    low, high = float(x.min()), float(x.max())
    if low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    return (high - low) / hi, low
