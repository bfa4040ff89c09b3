"""MaQD: multi-state quantizers without learned parameters (Sawada, Saiin and Suetake, 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..functional.clipping import clipping_fake_quantize
from ..functional.dorefa import widened
from ..functional.multi_state import Scaled, scaled_fake_quantize, sigmoids_fake_quantize
from .base import Grid, Quantizer, WeightQuantizer
from .registry import register

States = int | Mapping[int, int] | None
DELTA_MODES = ("(M-1)/2", "M/2")
WEIGHT_STES = ("chain", "literal")
SURROGATES = ("normalised", "literal", "ste")


def _choice(owner: str, option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{owner}: {option} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _largest_code(states: int, delta_mode: str) -> int:
    return (states - 1) // 2 if delta_mode == "(M-1)/2" else states


def _check_weight_states(owner: str, states: object) -> int:
    if not isinstance(states, int) or isinstance(states, bool) or states < 3 or states % 2 == 0:
        raise ValueError(f"{owner}: states must be an odd integer of at least 3, got {states!r}")
    return states


def width_of(states: int, delta_mode: str = "(M-1)/2") -> int:
    """Bits of the signed integers that hold the weight codes, at most 8.

    3, 15 and 255 states take 2, 4 and 8 bits. Codes that need more than 8 bits (511 states, or 255 with "M/2") can be
    trained, not lowered; for them this is 8.

    Raises:
        ValueError: even states, fewer than 3, or an unknown delta_mode.
    """
    _choice("width_of", "delta_mode", delta_mode, DELTA_MODES)
    return min(_largest_code(_check_weight_states("width_of", states), delta_mode).bit_length() + 1, 8)


def _states_by_precision(owner: str, states: int | Mapping[int, int], bits: Mapping[int, int]) -> dict[int, int]:
    """States at every precision of `bits`."""
    if not isinstance(states, Mapping):
        return dict.fromkeys(bits, states)
    if set(states) != set(bits):
        raise ValueError(f"{owner}: states must have the precisions {sorted(bits)} as keys, got {sorted(states)}")
    return dict(states)


@register("maqd", "weight", "MaQD: scaled round and clip to M states, a fixed grid for standardized weights")
class MaQDWeight(WeightQuantizer):
    """value = clip(round(D z) / D, -1, 1), z = s w, ties to even; codes D value in {-D..D}, scale 1/D, offset 0.

    Gradients (G = dL/dvalue):  |z| < 1:  dw = s G;   else:  dw = 0.   Decided on z before rounding; no parameters.
    Levels: M with D = (M-1)/2. With D = M/2, a half-integer, the clip adds -1 and 1 to the M multiples of 1/D: M + 2
    levels, with codes 2 D value at scale 1/M, of which `Grid.valid` lists those that occur.
    Init: nothing; weights are to be standardized before. Several widths are allowed and do not nest.
    Source: MaQD section 3.1, eqs. 6, 7 and 10; D is (M-1)/2 or M/2 by the paper's footnote 1, and only (M-1)/2 gives
    its shares of nonzero weights. Eq. 10 has a gradient of 1 where the chain rule has s: see weight_ste.

    Args:
        bits: precision -> width, at least `width_of(states, delta_mode)`.
        states: M, odd and at least 3, or precision -> M; None takes the most that the width holds.
        s: positive, scale of the weights before rounding; 1/3 keeps three deviations.
        delta_mode: "(M-1)/2" or "M/2".
        weight_ste: gradient inside the range, "chain" (s) or "literal" (1).
    """

    needs_transform = "standardize"

    def __init__(
        self,
        bits: Mapping[int, int],
        *,
        channels: int | None = None,
        signed: bool = True,
        states: States = None,
        s: float = 1 / 3,
        delta_mode: str = "(M-1)/2",
        weight_ste: str = "chain",
    ) -> None:
        super().__init__(bits, channels=channels, signed=signed)
        self.delta_mode = _choice("MaQDWeight", "delta_mode", delta_mode, DELTA_MODES)
        self.weight_ste = _choice("MaQDWeight", "weight_ste", weight_ste, WEIGHT_STES)
        if not 0 < s < math.inf:
            raise ValueError(f"MaQDWeight: s must be positive and finite, got {s!r}")
        self.s = float(s)
        if states is None:
            states = {p: self._most_states(width) for p, width in self.bits.items()}
        self.states = _states_by_precision("MaQDWeight", states, self.bits)
        for p, count in self.states.items():
            needed = width_of(_check_weight_states("MaQDWeight", count), delta_mode)
            if needed > self.bits[p]:
                raise ValueError(
                    f"MaQDWeight: {count} states with delta_mode={delta_mode!r} need {needed} bits, got "
                    f"{self.bits[p]} at precision {p}"
                )

    def _most_states(self, width: int) -> int:
        most = 2**width - 1 if self.delta_mode == "(M-1)/2" else 2 ** (width - 1) - 1
        if most < 3:
            raise ValueError(
                f"MaQDWeight: {width} bits hold no grid of 3 states with delta_mode={self.delta_mode!r}, which needs "
                f"{width_of(3, self.delta_mode)} bits"
            )
        return most

    def grid(self, x: Tensor | None = None) -> Grid:
        """Scale in float64 without x; with it in x's dtype, float32 for half precision."""
        count = self.states[self.precision]
        top = _largest_code(count, self.delta_mode)
        like = torch.zeros((), dtype=torch.float64) if x is None else widened(x.detach())
        scale = like.new_full(self._step_shape(), 1.0 / top)
        if self.delta_mode == "(M-1)/2":
            return Grid(scale, self.offset, -top, top)
        return Grid(scale, self.offset, -top, top, valid=(-top, *range(1 - top, top, 2), top))

    def _formula(self) -> Scaled:
        count = self.states[self.precision]
        top = _largest_code(count, self.delta_mode)
        rounded = float(top) if self.delta_mode == "(M-1)/2" else count / 2
        return Scaled(top, rounded, self.s, self.s if self.weight_ste == "chain" else 1.0)

    def codes(self, x: Tensor) -> Tensor:
        return self._formula().levels(x.detach()).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        return scaled_fake_quantize(x, self._formula())

    def init_(self, x: Tensor) -> None:
        """Nothing to set: the grid is fixed."""

    def extra_repr(self) -> str:
        states = sorted(set(self.states.values()))
        return f"{super().extra_repr()}, states={states}, s={self.s:g}, delta_mode={self.delta_mode!r}"


@register("maqd", "activation", "MaQD: M states on [0, 1] for normalized inputs, sigmoid surrogate gradient")
class MaQDActivation(Quantizer):
    """value = clip(round((M-1) x) / (M-1), 0, 1), ties to even; codes 0..M-1, scale 1/(M-1), offset 0.

    Gradients (G = dL/dvalue, b_m = (m - 1/2)/(M-1), S_m = sigmoid((x - b_m)/alpha)):
        normalised:  dx = G sum_m S_m (1 - S_m) / alpha / (M-1),  over all x, nothing masked
        literal:     the same without 1/(M-1);   ste:  dx = G inside 0 < x < 1, else 0
    Levels: M. Init: nothing; no parameters, no calibration, the same grid whatever the sign of the inputs.
    Source: MaQD section 3.2, eqs. 8, 11 and 15. Eq. 11 prints the literal form; the value is the mean of M-1 step
    functions, and only the normalised one has its total rise, 1.

    Args:
        bits: precision -> width, enough for codes up to M-1.
        states: M in 2..256, or precision -> M; None takes the most that the width holds, 2^width.
        act_surrogate: "normalised", "literal" or "ste".
        alpha: positive, width of the sigmoids.
    """

    stands_for_relu = True

    def __init__(
        self,
        bits: Mapping[int, int],
        *,
        signed: bool = False,
        shared: bool = False,
        states: States = None,
        act_surrogate: str = "normalised",
        alpha: float = 0.25,
    ) -> None:
        super().__init__(bits, signed=False)
        self.act_surrogate = _choice("MaQDActivation", "act_surrogate", act_surrogate, SURROGATES)
        if not 0 < alpha < math.inf:
            raise ValueError(f"MaQDActivation: alpha must be positive and finite, got {alpha!r}")
        self.alpha = float(alpha)
        if states is None:
            states = {p: 2**width for p, width in self.bits.items()}
        self.states = _states_by_precision("MaQDActivation", states, self.bits)
        for p, count in self.states.items():
            if not isinstance(count, int) or isinstance(count, bool) or not 2 <= count <= 256:
                raise ValueError(f"MaQDActivation: states must be an integer in 2..256, got {count!r}")
            if count > 2 ** self.bits[p]:
                raise ValueError(
                    f"MaQDActivation: {count} states need {(count - 1).bit_length()} bits, got {self.bits[p]} at "
                    f"precision {p}"
                )

    def grid(self, x: Tensor | None = None) -> Grid:
        """Scale in float64 without x; with it in x's dtype, float32 for half precision."""
        top = self.states[self.precision] - 1
        like = torch.zeros((), dtype=torch.float64) if x is None else widened(x.detach())
        return Grid(like.new_full((1,), 1.0 / top), self.offset, 0, top)

    def _levels(self, x: Tensor) -> Tensor:
        """The codes as floating-point numbers; NaN stays NaN."""
        top = self.states[self.precision] - 1
        return (widened(x.detach()) * top).round_().clamp_(0, top)

    def codes(self, x: Tensor) -> Tensor:
        return self._levels(x).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        top = self.states[self.precision] - 1
        if self.act_surrogate == "ste":
            return clipping_fake_quantize(x, widened(x.new_ones(1)), top)
        return sigmoids_fake_quantize(x, top, self.alpha, 1.0 / top if self.act_surrogate == "normalised" else 1.0)

    def init_(self, x: Tensor) -> None:
        """Nothing to set: the grid is fixed."""

    def extra_repr(self) -> str:
        states = sorted(set(self.states.values()))
        return f"{super().extra_repr()}, states={states}, act_surrogate={self.act_surrogate!r}, alpha={self.alpha:g}"
