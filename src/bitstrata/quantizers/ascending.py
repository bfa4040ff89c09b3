"""Ascending layers: a base code and bit-planes with real-valued parameters of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.ste import grad_scale, with_value
from ..functional.uniform import EPS, uniform_codes, uniform_fake_quantize
from .base import Grid, WeightQuantizer
from .initial import WEIGHT_RULES, Rule, check_rule, weight_step
from .registry import register


@register("ascending", "weight", "an LSQ code at the narrowest width and learned bit-planes above it (2 to 8 bits)")
class AscendingWeight(WeightQuantizer):
    """value_i = s_i c_i, c_i = 2 c_(i-1) + b_i, s_i = s_0 / 2^i; c_0 is the LSQ code of w at s_0, b_i = 1 if r_i > 0.

    Level i has K_0 + i bits, K_0 the narrowest width; r_i is a parameter of the weight's shape, one a plane.
    Gradients (G = dL/dvalue_i, g = 1/sqrt(N Q_P), N = weights a step, Q_P = 2^(K_0-1) - 1):
        -Q_N <= w/s_0 <= Q_P:  dw = G,  ds_0 = g G (c_0 - w/s_0 + sum_j b_j / 2^j)
        below, above:          dw = 0,  ds_0 = g G (c_0 + sum_j b_j / 2^j)
        dr_j = G s_j for j <= i, else 0 (straight through, identity)
    Levels: 2^(K_0+i), no compensation: values above zero reach (2^(K_0+i-1) - 1) s_i. Codes nest by shift.
    Source: vertical layering (Wu et al.), eqs. 1, 3, 4 and section 3.3.

    What the paper leaves open: s_i = s_0 / 2^i, so that a plane refines the values below it; r_i starts as
    w - s_i (2 c_(i-1) + 1/2), the distance of the weight from the middle between the two values that b_i chooses from,
    so that planes start at the nearest code and parameters have the weights' magnitude. Planes are weights that the
    widths above share, so `precision_parameters` does not list them; `objectives.ascending_stages` trains them in turn.

    Args:
        init: rule for the initial base step, see `initial`.
    """

    nested = True

    def __init__(
        self, bits: Mapping[int, int], *, channels: int | None = None, signed: bool = True, init: Rule = "lsq"
    ) -> None:
        super().__init__(bits, channels=channels, signed=signed)
        self.init = check_rule("AscendingWeight", init, WEIGHT_RULES)
        self.base_bits, top = min(self.bits.values()), max(self.bits.values())
        if self.base_bits < 2:
            raise ValueError("AscendingWeight: the narrowest width must be 2 or more (an LSQ code has a zero), got 1")
        self.step = nn.Parameter(torch.ones(self._step_shape()))
        self.planes = nn.ParameterDict(
            {str(k): nn.Parameter(torch.empty(0)) for k in range(self.base_bits + 1, top + 1)}
        )

    def _limits(self, width: int) -> tuple[int, int]:
        return -(2 ** (width - 1)), 2 ** (width - 1) - 1

    def _planes(self, x: Tensor, width: int) -> list[nn.Parameter]:
        """r_1, r_2, ... up to `width` bits."""
        found = [self.planes[str(k)] for k in range(self.base_bits + 1, width + 1)]
        for plane in found:
            if plane.shape != x.shape:
                raise ValueError(
                    f"AscendingWeight: planes are for a weight of shape {tuple(plane.shape)}, got {tuple(x.shape)}; "
                    "init_ sets them up"
                )
        return found

    def grid(self, x: Tensor | None = None) -> Grid:
        scale = self.step.detach().clamp_min(EPS) * 2.0 ** (self.base_bits - self.width)
        return Grid(scale, self.offset, *self._limits(self.width))

    def codes(self, x: Tensor) -> Tensor:
        return self._codes(x.detach(), self.width)

    def _codes(self, x: Tensor, width: int) -> Tensor:
        base = uniform_codes(x, self._broadcast(self.step.detach(), x), *self._limits(self.base_bits))
        result = base.to(torch.int32)
        for plane in self._planes(x, width):
            result = 2 * result + (plane.detach() > 0).to(torch.int32)
        return result

    def surrogate(self, x: Tensor) -> Tensor:
        lo, hi = self._limits(self.base_bits)
        scale = (x.numel() // self.step.numel() * hi) ** -0.5
        step = self._broadcast(self.step, x)
        value = uniform_fake_quantize(x, step, lo, hi, grad_scale=scale)
        positive = with_value(step, step.detach().clamp_min(EPS))
        for j, plane in enumerate(self._planes(x, self.width), start=1):
            bit = with_value(plane, (plane.detach() > 0).to(plane.dtype))
            value = value + grad_scale(positive, scale) * bit * 2.0**-j
        return value.to(x.dtype)

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        rows = x.detach().reshape(self.step.numel(), -1)
        self.step.copy_(weight_step(self.init, rows, *self._limits(self.base_bits)))
        self._start(x, self.base_bits, max(self.bits.values()))

    def enhancement_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Precision -> the planes that it adds to the next narrower precision."""
        result: dict[int, list[nn.Parameter]] = {}
        done = self.base_bits
        for p, width in sorted(self.bits.items(), key=lambda item: item[1]):
            result[p] = [self.planes[str(k)] for k in range(done + 1, width + 1)]
            done = max(done, width)
        return result

    def start_planes_(self, x: Tensor, precision: int) -> None:
        """Set the planes that `precision` adds so that its codes are the nearest to the weight x, in place.

        Raises:
            ValueError: a precision that the quantizer does not have.
        """
        if precision not in self.bits:
            raise ValueError(f"AscendingWeight: {precision} is not among the precisions {tuple(self.bits)}")
        below = max((w for w in self.bits.values() if w < self.bits[precision]), default=self.base_bits)
        self._start(x, below, self.bits[precision])

    @torch.no_grad()
    def _start(self, x: Tensor, below: int, width: int) -> None:
        """Planes above `below` bits, up to `width` bits, from the weight."""
        w = x.detach()
        step = self._broadcast(self.step.detach().clamp_min(EPS), w)
        for k in range(below + 1, width + 1):
            fine = step * 2.0 ** (self.base_bits - k)
            residual = (w - fine * (2 * self._codes(w, k - 1) + 0.5)).to(self.step.dtype)
            plane = self.planes[str(k)]
            if plane.shape == residual.shape:
                plane.copy_(residual)
            else:
                plane.data = residual.clone()  # in place, so that whoever holds the parameter keeps holding it

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, plane in self.planes.items():
            saved = state_dict.get(f"{prefix}planes.{name}")
            if saved is not None and not plane.numel():  # made without a weight yet, so any shape is right
                plane.data = plane.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
