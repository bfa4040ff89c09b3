"""The input grid: uint8 pixels, as the camera or the file gives them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Grid, Quantizer
from .registry import register


@register("pixels", "input", "uint8 pixel codes; the first layer's weights absorb 1/std")
class PixelInput(Quantizer):
    """code = round(255 (x std + mean)) in 0..255; value = (code - 255 mean)/255 = x std on the pixel grid.

    x is the normalised input (pixel/255 - mean)/std that the float model takes; the layer behind this quantizer
    multiplies its weights by 1/std. Gradient: straight through, dx = std G. No parameters, the same at every precision.

    Args:
        mean, std: of pixel/255, one number, or one an input channel of the layer.
    """

    shifted = True

    def __init__(
        self,
        bits: Mapping[int, int],
        *,
        signed: bool = False,
        shared: bool = True,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
    ) -> None:
        super().__init__(dict.fromkeys(bits, 8), signed=False)
        self.mean = tuple(float(m) for m in mean)  # python numbers: exact in whatever dtype the model is evaluated
        self.std = tuple(float(s) for s in std)
        self.dims = 1  # spatial dimensions after the channel; set by the layer

    def channel(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        """One number a channel, shaped to broadcast over an input batch of like's dtype."""
        return like.new_tensor(values).view(-1, *[1] * self.dims) if len(values) > 1 else like.new_tensor(values)

    @property
    def pad_codes(self) -> tuple[int, ...]:
        """The code nearest the mean of each channel: what the layer pads with."""
        return tuple(min(max(round(255 * m), 0), 255) for m in self.mean)

    def grid(self, x: Tensor | None = None) -> Grid:
        like = torch.zeros((), dtype=torch.float64) if x is None else x
        return Grid(like.new_tensor(1.0 / 255.0), self.channel(tuple(-255.0 * m for m in self.mean), like), 0, 255)

    def _codes(self, x: Tensor) -> Tensor:
        pixels = x * self.channel(self.std, x) + self.channel(self.mean, x)
        return pixels.mul_(255).round_().clamp_(0, 255)

    def init_(self, x: Tensor) -> None:
        """Nothing to set: the grid is that of uint8 pixels."""

    def codes(self, x: Tensor) -> Tensor:
        return self._codes(x.detach()).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        value = self.grid(x).dequantize(self._codes(x.detach()))
        if x.requires_grad and torch.is_grad_enabled():
            smooth = x * self.channel(self.std, x)
            value = value + (smooth - smooth.detach())
        return value
