"""How a layer that trains in integers computes: widths, groups, rounding, and what of them its operands follow.

Source: Guo, Liu et al., "Towards accurate and efficient sub-8-bit integer training", section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .groups import check_groups
from .linear import WeightCodes, weight_codes
from .peers import tensor_quantize
from .powers import check_powers, power_quantize, product_bits
from .products import check_form
from .rounding import ROUNDINGS, CounterGenerator
from .shiftquant import ShiftQuantized, check_bits, check_clip, shift_quantize

METHODS = ("shift", "tensor")
REACTIONS = ("error", "skip")
GRIDS = ("uniform", "powers")


@dataclass(frozen=True)
class IntegerRule:
    """How a layer computes in integers.

    Attributes:
        w, a, g: widths of weights, activations and gradients, 2..8.
        groups: N_G of activations and gradients, 1..8; only for method "shift".
        act_rounding: of activations in training: "nearest" or "stochastic". Evaluation rounds everything to nearest.
        grad_rounding: of gradients in training: "stochastic" or "nearest".
        unsigned_nonneg: activations without negative elements get codes 0..2^a - 1, which buys a bit after a ReLU.
        clip_ratio: of activations, above 0 and at most 1: what `shift_quantize` multiplies their ranges by.
        method: "shift": ShiftQuant for activations and gradients, weights with a scale a channel. "tensor": one scale a
            tensor for all three.
        form: of `product`, how the integers are multiplied; all give the same result. "engine", the compiled kernels,
            is the fastest; it takes "float64" for what is not on the CPU or int32 is not proved to hold.
        grad_grid: of gradients: "uniform", ShiftQuant's; "powers", 0 and powers of two with one scale a tensor, g up to
            4 (`power_quantize`), which take 8 bits in the products.
        on_nonfinite: NaN or infinity in an activation or a gradient is an "error", or its step is a "skip": all
            gradients of the layer are 0 and `LayerState.skipped` counts it; the result of an activation that is not
            finite is NaN.

    Raises:
        ValueError: a field out of range.
    """

    w: int = 4
    a: int = 4
    g: int = 4
    groups: int = 4
    act_rounding: str = "nearest"
    grad_rounding: str = "stochastic"
    unsigned_nonneg: bool = False
    clip_ratio: float = 1.0
    method: str = "shift"
    form: str = "engine"
    on_nonfinite: str = "error"
    grad_grid: str = "uniform"

    def __post_init__(self) -> None:
        for name in ("w", "a", "g"):
            check_bits(getattr(self, name), f"IntegerRule: {name}")
        check_groups(self.groups, "IntegerRule")
        check_form(self.form)
        for name, known in (
            ("act_rounding", ROUNDINGS),
            ("grad_rounding", ROUNDINGS),
            ("method", METHODS),
            ("on_nonfinite", REACTIONS),
            ("grad_grid", GRIDS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"IntegerRule: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        check_clip(self.clip_ratio, self.act_rounding, "IntegerRule")
        if self.grad_grid == "powers":
            check_powers(self.g, "IntegerRule: grad_grid 'powers'")

    @property
    def shift_groups(self) -> int:
        """N_G in use: 1 for method "tensor"."""
        return self.groups if self.method == "shift" else 1

    @property
    def grad_groups(self) -> int:
        """N_G in use for gradients: 1 for powers of two."""
        return 1 if self.grad_grid == "powers" else self.shift_groups

    @property
    def grad_bits(self) -> int:
        """Bits of the integers that gradients are multiplied as."""
        return product_bits(self.g) if self.grad_grid == "powers" else self.g

    def quantize_activation(
        self, x: Tensor, axis: int, *, training: bool = False, generator: CounterGenerator | None = None
    ) -> ShiftQuantized:
        """The activation's codes, groups along `axis`; errors as shift_quantize."""
        return shift_quantize(
            x,
            self.a,
            self.shift_groups,
            axis,
            rounding=self.act_rounding if training else "nearest",
            generator=generator,
            unsigned_nonneg=self.unsigned_nonneg,
            clip_ratio=self.clip_ratio,
        )

    def quantize_gradient(
        self, grad: Tensor, axis: int, *, training: bool = False, generator: CounterGenerator | None = None
    ) -> ShiftQuantized:
        """The gradient's codes, groups along `axis`; errors as shift_quantize."""
        rounding = self.grad_rounding if training else "nearest"
        if self.grad_grid == "powers":
            return power_quantize(grad, self.g, axis, rounding=rounding, generator=generator)
        return shift_quantize(grad, self.g, self.shift_groups, axis, rounding=rounding, generator=generator)

    def quantize_weight(self, weight: Tensor, side: str, conv_groups: int = 1) -> WeightCodes:
        """The weight's codes, to nearest, for the forward product (side "out") or the input gradient ("in")."""
        if self.method == "shift":
            return weight_codes(weight, self.w, side, conv_groups)
        coded = tensor_quantize(weight, self.w)
        channels = weight.shape[0] if side == "out" else weight.shape[1] * conv_groups
        return WeightCodes(coded.codes, coded.scale.expand(channels).contiguous(), self.w, side, conv_groups)
