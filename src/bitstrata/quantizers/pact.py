"""PACT (Choi et al., 2018) and CG-PACT (Jin et al., 2019): activations with a learned clipping level."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..functional.clipping import clipping_codes, clipping_fake_quantize, clipping_scale
from ..functional.steps import optimal_step
from .base import ActivationQuantizer, Grid, LayerFacts
from .initial import Rule, activation_step
from .registry import register

CONV_ALPHA, LINEAR_ALPHA = 8.0, 10.0


@register("pact", "activation", "PACT: learned clipping level alpha, its gradient from clipped inputs alone")
class PactActivation(ActivationQuantizer):
    """value = (alpha/a) round(a clip(x, 0, alpha)/alpha), a = 2^b - 1; |alpha| is used.

    Gradients (G = dL/dvalue):
        0 < x < alpha:  dx = G,  dalpha = 0 for "pact", G (value/alpha - x/alpha) for "cg"
        x >= alpha:     dx = 0,  dalpha = G;   x <= 0: both 0
    dalpha is the sum over elements, unscaled. Init: alpha = 8 before convolutions, 10 before linear layers, no data
    needed. Negative inputs are cut, as public code does, or, with `double_side` and inputs that may be negative,
    value = alpha (2k/a - 1), k in 0..a: no zero among the levels, dalpha = -G for x <= -alpha, dx = G for |x| < alpha.
    Source: PACT eqs. 1-3; SAT eqs. 11-13.

    Args:
        init: None for 8 and 10; a positive alpha; or a rule for the initial step, see `initial`, times the top code.
        gradient: "pact", or "cg", the calibrated gradient of SAT.
        double_side: clip signed inputs to [-alpha, alpha] instead of [0, alpha].
    """

    min_signed_bits = 1  # both grids have a level above zero at one bit

    def __init__(
        self,
        bits: Mapping[int, int],
        *,
        signed: bool = False,
        shared: bool = False,
        init: Rule | None = None,
        gradient: str = "pact",
        double_side: bool = False,
    ) -> None:
        super().__init__(bits, signed=signed and double_side, shared=shared, init=CONV_ALPHA if init is None else init)
        if gradient not in ("pact", "cg"):
            raise ValueError(f"{type(self).__name__}: gradient must be 'pact' or 'cg', got {gradient!r}")
        self.gradient = gradient
        self.by_kind = init is None
        if self.signed:
            self.offset = 0.5
            self.shifted = True

    def adapt_(self, facts: LayerFacts) -> None:
        if self.by_kind:
            self.init = LINEAR_ALPHA if facts.kind == "linear" else CONV_ALPHA
            self.fix_steps_()

    def step_from(self, statistic: Tensor) -> Tensor:
        """The initial alpha for a statistic, at the current precision: step times the top level."""
        lo, hi = self.limits()
        if isinstance(self.init, float):
            return statistic.new_full((), self.init)
        if self.init == "minmax":
            return statistic
        if not self.signed:
            return activation_step(self.init, statistic, lo, hi) * hi
        top = hi + self.offset
        if self.init == "mse":
            return optimal_step(tuple(c + self.offset for c in range(lo, hi + 1))) * statistic * top
        return 2 * statistic * top**0.5 if self.init == "lsq" else statistic * top / (2 * top + 1)

    def init_(self, x: Tensor) -> None:
        """Set alpha from data if the rule needs any; of signed inputs that will be cut, from the positive part.

        Raises:
            ValueError: a batch that is not finite, also where alpha needs no data.
        """
        if isinstance(self.init, float) and not bool(torch.isfinite(x).all()):
            raise ValueError(f"{type(self).__name__}: calibration met a batch of shape {tuple(x.shape)}: not finite")
        super().init_(
            x if self.signed else torch.where(x > 0, x, x * 0)
        )  # 0 times -inf or NaN is NaN: the base sees it

    def is_initialized(self) -> bool:
        return isinstance(self.init, float) or super().is_initialized()

    def _grid(self) -> Grid:
        lo, hi = self.limits()
        return Grid(clipping_scale(self.step, hi - lo, self.signed), self.offset, lo, hi)

    def grid(self, x: Tensor | None = None) -> Grid:
        self.require_initialized()
        return self._grid()

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        self.require_initialized()
        lo, hi = self.limits()
        return clipping_codes(x, self.step, hi - lo, self.signed).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        self.prepare(x)
        lo, hi = self.limits()
        calibrated = self.gradient == "cg"
        return clipping_fake_quantize(x, self.step, hi - lo, signed=self.signed, calibrated=calibrated)


@register("cg_pact", "activation", "CG-PACT: PACT with the calibrated gradient of alpha, from every input in range")
class CGPactActivation(PactActivation):
    """PACT with gradient="cg": value = (alpha/a) round(a clip(x, 0, alpha)/alpha), a = 2^b - 1.

    Gradients: dalpha = G (value/alpha - x/alpha) in range and G above it; the rest as for PACT. Source: SAT eqs. 11-13.

    Args:
        init, double_side: as for PACT.
    """

    def __init__(
        self,
        bits: Mapping[int, int],
        *,
        signed: bool = False,
        shared: bool = False,
        init: Rule | None = None,
        double_side: bool = False,
    ) -> None:
        super().__init__(bits, signed=signed, shared=shared, init=init, gradient="cg", double_side=double_side)
