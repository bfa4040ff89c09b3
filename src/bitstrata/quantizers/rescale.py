"""SAT's rescaling of weight grids, around any weight quantizer (Jin et al., eqs. 7, 10, S23)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..functional.sat import VARIANCES, deviation_scale, sat_scale
from ..functional.ste import with_value
from .base import Grid, LayerFacts, WeightQuantizer
from .registry import register

CONVS = ("auto", "all", "none")


class Rescaled(WeightQuantizer):
    """Base of rescalings: the inner quantizer's codes on its grid times a constant s that follows the layer's weight.

    Codes, widths, parameters and their initialisation are the inner quantizer's. One s a layer, also where the inner
    grid has a scale a channel.
    """

    def __init__(self, inner: WeightQuantizer, *, var_mode: str = "meansq", convs: str = "auto") -> None:
        super().__init__(inner.bits, channels=inner.channels, signed=inner.signed)
        if var_mode not in VARIANCES:
            raise ValueError(f"{type(self).__name__}: var_mode must be one of {', '.join(VARIANCES)}, got {var_mode!r}")
        if convs not in CONVS:
            raise ValueError(f"{type(self).__name__}: convs must be one of {', '.join(CONVS)}, got {convs!r}")
        self.inner = inner
        self.bits = inner.bits
        self.nested = inner.nested
        self.width_decides = inner.width_decides
        self.offset = inner.offset
        self.var_mode = var_mode
        self.convs = convs
        self.normalized = False

    @property
    def precision(self) -> int:
        """The inner quantizer's precision, which it runs at."""
        return self.inner.precision

    @precision.setter
    def precision(self, value: int) -> None:
        if "inner" in self._modules:  # the base's constructor, which comes before, sets the largest
            self.inner.precision = value

    def adapt_(self, facts: LayerFacts) -> None:
        self.normalized = facts.normalized
        self.inner.adapt_(facts)

    def applies(self, x: Tensor) -> bool:
        """Whether a layer with the weight x is rescaled: linear layers are, convolutions by the option `convs`."""
        return x.dim() == 2 or self.convs == "all" or (self.convs == "auto" and not self.normalized)

    @abstractmethod
    def factor(self, x: Tensor, quantized: Tensor) -> Tensor:
        """s, 0-d, from the weight and the inner grid's values for its codes."""

    @torch.no_grad()
    def scale_of(self, x: Tensor) -> Tensor:
        """s for the weight x at the current precision: 0-d, 1 where the layer is not rescaled."""
        grid = self.inner.grid(x)
        if not self.applies(x):
            return torch.ones_like(grid.scale.reshape(-1)[0])
        return self.factor(x, grid.dequantize(self.inner.codes(x))).to(grid.scale.dtype)

    @torch.no_grad()
    def grid(self, x: Tensor | None = None) -> Grid:
        if x is None:
            raise ValueError(f"{type(self).__name__}: grid needs the tensor x: its scale follows the weight")
        inner = self.inner.grid(x)
        return replace(inner, scale=inner.scale * self.scale_of(x))

    def codes(self, x: Tensor) -> Tensor:
        return self.inner.codes(x)

    def forward(self, x: Tensor) -> Tensor:
        """The rescaled grid's values for the codes; every gradient is s times the inner quantizer's."""
        if not self.applies(x):
            return self.inner(x)
        with torch.no_grad():
            grid, codes = self.inner.grid(x), self.inner.codes(x)
            s = self.factor(x, grid.dequantize(codes)).to(grid.scale.dtype)
            value = replace(grid, scale=grid.scale * s).dequantize(codes).to(x.dtype)
        return with_value(self.inner(x) * s, value)

    def init_(self, x: Tensor) -> None:
        self.inner.init_(x)

    def precision_parameters(self) -> dict[int, list[nn.Parameter]]:
        return self.inner.precision_parameters()

    def extra_repr(self) -> str:
        return f"var_mode={self.var_mode}, convs={self.convs}"


@register(
    "constant", "rescale", "SAT: scale weights to n_hat VAR = 1, so gradients keep their size from layer to layer"
)
class ConstantRescale(Rescaled):
    """value = s Q, s = 1/sqrt(n_hat VAR[Q]), Q the inner quantizer's value.

    Gradients: s times the inner quantizer's; none through VAR. n_hat = output channels times kernel positions (groups
    ignored), or output features. s = 1 where all Q are 0. Source: SAT eqs. 7, 10.

    Args:
        var_mode: "meansq", mean(Q^2) (the paper's text), or "std", the squared standard deviation (public code).
        convs: "auto" rescales convolutions whose output no normalization reads; "all"; "none". Linear layers always.
    """

    def factor(self, x: Tensor, quantized: Tensor) -> Tensor:
        return sat_scale(quantized, self.var_mode)


@register("stddev", "rescale", "SAT's alternative: give the quantized weights the standard deviation of the weight")
class DeviationRescale(Rescaled):
    """value = s Q, s = sqrt(VAR[W] / VAR[Q]), W the weight and Q the inner quantizer's value.

    Gradients: s times the inner quantizer's; none through the variances. s = 1 where all Q are 0; at least 1e-8.
    Source: SAT eq. S23.

    Args:
        var_mode, convs: as for "constant".
    """

    def factor(self, x: Tensor, quantized: Tensor) -> Tensor:
        return deviation_scale(x, quantized, self.var_mode)
