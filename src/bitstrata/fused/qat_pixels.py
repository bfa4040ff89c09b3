"""The unit of a fused quantization-aware step that reads the network's input as pixels.

Pixels' codes stand for (code - 255 mean) / 255, with a mean a channel. No code stands for 0, so a border of the codes
nearest to it is put around the map. What the offset adds to a convolution's sums is the same for all of a channel, so
batch normalization takes it off; the running mean and the weight's gradient have it put right.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..integer.convolution import Geometry
from ..integer.pool import Pool
from ..quantizers.pixels import PixelInput
from .qat_codes import PIXELS, IntegerWeight, Rule
from .qat_units import Batch, QatConvNorm
from .qat_values import MEMORY, Activation, as_real
from .torch_op import TorchOp
from .units import Step

RULE = Rule(1.0 / 255.0, *PIXELS, first=0.0, last=255.0, inner=0.0, scale=1.0, parameter=None)


class PixelCodes(Activation):
    """Codes (samples, height, width, channels) in uint8, of which nobody wants a gradient."""

    def __init__(self, codes: NDArray[np.uint8], pool: Pool, real: torch.dtype) -> None:
        n, h, w, c = codes.shape
        super().__init__(codes.reshape(-1, c), (n, h, w, c), pool, real, pooled=False)
        self.wanted = False

    def codes(self, rule: Rule) -> NDArray[Any]:
        return self.data.reshape(self.shape)

    def code_values(self, rule: Rule) -> NDArray[Any]:
        out = self.pool.take(self.rows, MEMORY[self.dtype])
        as_real(out).copy_(torch.from_numpy(self.data))
        return out


@dataclass
class QatPixelConvNorm(QatConvNorm):
    """The first convolution, with the normalization and the rectifier behind it.

    parts: the same in torch, which runs where somebody wants the gradient of the input.
    """

    parts: list[TorchOp] = field(default_factory=list)

    @property
    def pixels(self) -> PixelInput:
        """The input's grid."""
        return cast("PixelInput", self.conv.act_quant)

    def run(self, step: Step) -> None:
        if not self._input(step).wanted:
            super().run(step)
            return
        for part in self.parts:
            part.run(step)

    def _coded(self, step: Step, x: Activation) -> tuple[Activation, Rule]:
        return PixelCodes(pixel_codes(x, self.pixels, self._border()), step.pool, step.real), RULE

    def _border(self) -> tuple[int, int]:
        height, width = (int(p) for p in cast("tuple[int, ...]", self.conv.padding))
        return height, width

    def _geometry(self) -> Geometry:
        """Of the map with its border."""
        return replace(super()._geometry(), padding=(0, 0))

    def _offset(self) -> NDArray[np.float64]:
        """The code that stands for 0, of each input channel."""
        return np.broadcast_to(255.0 * np.array(self.pixels.mean), (self.conv.weight.shape[1],))

    def _seen(self, batch: Batch, weight: IntegerWeight) -> Batch:
        integers = weight.high.sum((2, 3), dtype=np.float64)
        if weight.low is not None:
            integers = 2 * integers + weight.low.sum((2, 3), dtype=np.float64)
        return replace(batch, mean=batch.mean - integers @ self._offset())

    def _products(self, step: Step, x: Activation, rule: Rule, weight: IntegerWeight, gradient: Tensor) -> None:
        if weight.quantized is None:
            return
        _, found = self._by_torch(x, rule, weight, gradient, (False, True))
        total = gradient.sum((0, 2, 3), dtype=torch.float32)
        offset = torch.from_numpy(self._offset().astype(np.float32))
        scale = torch.from_numpy((rule.step / weight.unit).astype(np.float32)).view(-1, 1, 1, 1)
        found = (found.float() - (total[:, None] * offset)[:, :, None, None]) * scale
        self._to_parameters(step, weight, found)


def pixel_codes(x: Activation, pixels: PixelInput, border: tuple[int, int]) -> NDArray[np.uint8]:
    """The codes of floats (samples, height, width, channels) as the quantizer makes them, within a border."""
    n, h, w, c = x.shape
    rows = torch.from_numpy(x.data).view(n * h, w * c)  # long enough for vectors

    def along(values: tuple[float, ...]) -> Tensor:
        return rows.new_tensor(values if len(values) > 1 else values * c).repeat(w)

    codes = (rows * along(pixels.std)).add_(along(pixels.mean)).mul_(255).round_().clamp_(*PIXELS)
    out = torch.empty((n, h + 2 * border[0], w + 2 * border[1], c), dtype=torch.uint8)
    if any(border):
        out[:] = torch.tensor(pixels.pad_codes, dtype=torch.uint8)
    out[:, border[0] : border[0] + h, border[1] : border[1] + w] = codes.view(n, h, w, c)
    return cast("NDArray[np.uint8]", out.numpy())
