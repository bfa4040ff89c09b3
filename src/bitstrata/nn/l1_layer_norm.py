"""L1 layer normalization, in float and fully quantized (Guo, Liu et al., section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional.l1norm import Rounding, l1_factor, l1_normalize, quantized_norm
from ..integer.engine_layer_norm import layer_norm
from ..integer.engine_norm import NormRule, norm_applies
from .l1_norm import check_quantized, wide


class L1LayerNorm(nn.Module):
    """Layer normalization by the mean absolute deviation of the last dimensions.

    y = weight (x - mean) / (deviation + eps) + bias with mean and deviation = c mean|x - mean| of each sample, both
    differentiated: `L1BatchNorm` over features. Half-precision input is computed in float32.

    Args:
        normalized_shape: sizes of the last dimensions, or the size of the last; at least two elements.
        eps: at least 0, added to the deviation.
        elementwise_affine: weight and, if `bias`, bias of `normalized_shape`, initially 1 and 0; else there are none.
        l1_scale: c, "1" or "sqrt(pi/2)"; see `L1BatchNorm`.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        l1_scale: str = "1",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if math.prod(shape) < 2 or min(shape, default=0) < 1:
            raise ValueError(f"{name}: normalized_shape must hold at least two elements, got {shape}")
        if not eps >= 0:
            raise ValueError(f"{name}: eps must be at least 0, got {eps}")
        l1_factor(l1_scale, name)
        self.normalized_shape = shape
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.l1_scale = l1_scale
        for parameter, value, wanted in (("weight", 1.0, True), ("bias", 0.0, bias)):
            made = torch.full(shape, value, device=device, dtype=dtype) if elementwise_affine and wanted else None
            self.register_parameter(parameter, None if made is None else nn.Parameter(made))

    def reset_parameters(self) -> None:
        """Initial affine."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., *normalized_shape), with at least one element, to the same shape and dtype.

        Raises:
            ValueError: other last dimensions, or no elements.
        """
        dims = len(self.normalized_shape)
        if tuple(x.shape[-dims:]) != self.normalized_shape:
            raise ValueError(
                f"{type(self).__name__}: input must end in {self.normalized_shape}, got shape {tuple(x.shape)}"
            )
        return self._normalized(wide(x)).to(x.dtype)

    def _normalized(self, x: Tensor) -> Tensor:
        """The result for x in float32 or float64."""
        lead = x.dim() - len(self.normalized_shape)
        y, _, _ = l1_normalize(x, tuple(range(lead, x.dim())), eps=self.eps, l1_scale=self.l1_scale)
        y = y if self.weight is None else y * self.weight.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps:g}, elementwise_affine={self.elementwise_affine}, "
            f"l1_scale={self.l1_scale!r}"
        )


class QuantizedL1LayerNorm(L1LayerNorm):
    """L1 layer normalization with everything in it quantized, as in `QuantizedL1BatchNorm`.

    Means and deviations of all samples share one grid each. There are no running statistics: evaluation computes what
    training does. Rounding sees the gradient as rows, (samples, elements normalized together).

    Args:
        normalized_shape, eps, elementwise_affine, bias, l1_scale: as for `L1LayerNorm`.
        bits, l2, rounding: as for `QuantizedL1BatchNorm`.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        l1_scale: str = "1",
        bits: int = 8,
        l2: bool = False,
        rounding: str | Rounding = "stochastic",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, l1_scale=l1_scale, device=device, dtype=dtype)
        self.rounding = check_quantized(type(self).__name__, bits, rounding, l1_scale, l2)
        self.bits = bits
        self.l2 = l2

    def engine_rule(self) -> NormRule | None:
        """What the engine's kernels compute, or None if they do not know how the gradient is rounded."""
        factor = l1_factor(self.l1_scale, type(self).__name__)
        return NormRule.of(self.rounding, bits=self.bits, l2=self.l2, eps=self.eps, factor=factor)

    def _normalized(self, x: Tensor) -> Tensor:
        features, rule = math.prod(self.normalized_shape), self.engine_rule()
        if rule is not None and norm_applies(x, self.weight):
            return layer_norm(x, self.weight, self.bias, features, rule)
        weight, bias = (None if t is None else t.reshape(1, features) for t in (self.weight, self.bias))
        y, _, _ = quantized_norm(
            x.reshape(-1, features),
            weight,
            bias,
            (1,),
            bits=self.bits,
            eps=self.eps,
            l1_scale=self.l1_scale,
            l2=self.l2,
            rounding=self.rounding,
        )
        return y.view(x.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}{', l2=True' if self.l2 else ''}"
