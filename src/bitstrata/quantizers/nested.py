"""The nested symmetric weight grid: one code, every width. The flagship."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..functional.nested import nested_codes, nested_fake_quantize, nested_scale
from ..functional.ste import grad_scale
from ..functional.steps import nested_step
from .base import Grid, WeightQuantizer
from .initial import SMALLEST, deviation
from .registry import register

BALANCED = 4  # bits up to which LSQ's factor fits a grid that clips: see NestedSymmetric


@register("nested", "weight", "nested symmetric grid: UniQ's grid whose upper bit-planes are UniQ's grid again")
class NestedSymmetric(WeightQuantizer):
    """value_b = r_b D 2^(n-b) (c_b + 1/2), c_n = clamp(floor(w/D), -2^(n-1), 2^(n-1)-1), c_b = c_n >> (n-b).

    Gradients (G = dL/dvalue, u = w/D, m = min(b, 4), g_m = 1/sqrt(n_w max(2^(m-1)-1, 1)), n_w = weights a step):
        |u| < 2^(n-1):  dw = r_b G,  dD = 4^(m-n) g_m r_b G (2^(n-b)(c_b + 1/2) - u)
        else:           dw = 0,      dD = 4^(m-n) g_m r_b G 2^(n-b)(c_b + 1/2)
        dr_b = g_n G D 2^(n-b)(c_b + 1/2)
    g_m is LSQ's factor for a grid of m bits. Of the narrow width's step S_b = 2^(n-b) D a gradient is 2^(n-b) times as
    large with respect to D, and D is 2^(n-b) times as small, hence 4^(b-n). Beyond 4 bits LSQ's factor does not fit a
    grid that clips: a clipped weight adds 2^(b-1) to the gradient of a step that is 2^(1-b) of the range, so the
    range's relative change grows as 4^b, which LSQ's square root does not hold. Widths of more than 4 bits change the
    range as 4 bits do. Without these factors a step of 1 to 8 bits changes by a tenth in every iteration, and explodes.
    Levels: 2^b, symmetric, without zero. Source: UniQ (Pham et al., eqs. 3-6) arranged as vertical layers (Wu et al.).

    Args:
        bits: precision -> width; the source width n is the largest.
        channels: one source step an output channel, or None for one a tensor.
        scales: "free" learns r_b for every width below n; "tied" fixes r_b = 1.
        target_db: signal-to-noise ratio in dB beyond which the initial step asks nothing more for a width.
    """

    width_decides = True
    nested = True
    offset = 0.5

    def __init__(
        self,
        bits: Mapping[int, int],
        *,
        channels: int | None = None,
        signed: bool = True,
        scales: str = "free",
        target_db: float | None = 25.0,
    ) -> None:
        super().__init__(bits, channels=channels, signed=signed)
        if scales not in ("free", "tied"):
            raise ValueError(f"NestedSymmetric: scales must be 'free' or 'tied', got {scales!r}")
        self.scales = scales
        self.target_db = target_db
        self.source_bits = max(self.bits.values())
        self.step = nn.Parameter(torch.ones(self._step_shape()))
        narrower = [p for p, width in self.bits.items() if width < self.source_bits] if scales == "free" else []
        self.ratios = nn.ParameterDict({str(p): nn.Parameter(torch.ones(self._step_shape())) for p in narrower})

    def _ratio(self) -> Tensor:
        key = str(self.precision)
        return self.ratios[key] if key in self.ratios else torch.ones_like(self.step)

    def grid(self, x: Tensor | None = None) -> Grid:
        scale = nested_scale(self.step.detach(), self._ratio().detach(), self.source_bits, self.width)
        return Grid(scale, self.offset, -(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1)

    def codes(self, x: Tensor) -> Tensor:
        return nested_codes(x, self._broadcast(self.step.detach(), x), self.source_bits, self.width).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // self.step.numel()
        width = min(self.width, BALANCED)
        factor, own = ((count * max(2 ** (bits - 1) - 1, 1)) ** -0.5 for bits in (self.source_bits, width))
        own *= 4.0 ** (width - self.source_bits)
        step = self.step if own == factor else grad_scale(self.step, own / factor)
        return nested_fake_quantize(
            x,
            self._broadcast(step, x),
            self._broadcast(self._ratio(), x),
            self.source_bits,
            self.width,
            grad_scale=factor,
        )

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        """D = k(B) * std(w); r_b minimises the squared error of the codes on this very weight.

        Weights that are (nearly) all alike, a fixed averaging filter for one, have no deviation: their root mean square
        takes its place.
        """
        rows = x.detach().reshape(self.step.numel(), -1)
        widths = tuple(sorted(set(self.bits.values())))
        constant = nested_step(widths, free=self.scales == "free", target_db=self.target_db)
        self.step.copy_((constant * deviation(rows)).clamp_min(SMALLEST))
        for key, ratio in self.ratios.items():
            width = self.bits[int(key)]
            level = nested_codes(rows, self.step.unsqueeze(1), self.source_bits, width) + 0.5
            best = (rows * level).sum(1) / (level * level).sum(1)
            ratio.copy_((best / (self.step * 2.0 ** (self.source_bits - width))).clamp_min(1e-3))

    def precision_parameters(self) -> dict[int, list[nn.Parameter]]:
        return {int(key): [ratio] for key, ratio in self.ratios.items()}
