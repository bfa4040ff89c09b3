"""A layer's training step by the engine: quantization, products and the codes to keep, in one call each way.

The same integers and floats as the operations one by one, which remain for what the engine does not take. What torch
and Python do between those counts where layers are small or called often, as in recurrent networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bitstrata_runtime import _engine

from .convolution import Geometry
from .engine_codes import FASTEST, MEMORY, Noise, array, takes
from .engine_products import INT32_MAX, WIDEST_OUTPUT, maps, planes, rows_as_maps
from .memory import floats, step_floats
from .rule import IntegerRule
from .shiftquant import PackedShift, largest_code

Needs = tuple[bool, bool, bool]  # gradients of input, weight and bias that somebody asks for


class OperandError(ValueError):
    """An operand is NaN or infinite. Nothing has been computed.

    Attributes:
        weight: whether it is the weight, not the input or the gradient.
    """

    def __init__(self, failed: str) -> None:
        self.weight = failed == "weight"
        super().__init__(f"the {'weight' if self.weight else 'input or gradient'} contains NaN or infinity")


class SharedWeight:
    """Codes of a weight that several calls use before it changes, as those of a recurrent layer do at every step.

    They are made once for each side, and stay until the other side's are asked for: when the backward pass begins.
    """

    def __init__(self) -> None:
        self._made: tuple[Any, ...] | None = None
        self._of: tuple[Any, ...] | None = None

    def codes(self, operation: Any, weight: Tensor, *, by_output: bool) -> tuple[Any, ...]:
        """Codes and scales for the engine, of a weight (out, in / groups, rows, columns).

        Raises:
            OperandError: of the weight.
        """
        asked = (operation, weight.data_ptr(), weight._version, by_output)
        if self._made is None or asked != self._of:
            channels = weight.shape[0] if by_output else weight.shape[1]
            made = array(torch.empty(weight.shape, dtype=torch.int8)), array(floats(channels))
            if not operation.weight_codes(array(weight), by_output, *made, FASTEST, torch.get_num_threads()):
                raise OperandError("weight")
            self._made, self._of = made, asked
        return self._made


@lru_cache(maxsize=1024)
def _operation(rule: IntegerRule, geometry: Geometry | None, dims: int) -> Any:
    """The engine's, of layers with this rule and geometry; None for matrices."""
    planar = {"stride": (1, 1), "dilation": (1, 1), "padding": (0, 0)}
    groups = 1
    if geometry is not None:
        planar, groups = geometry.planar(dims), geometry.groups
    return _engine.LayerStep(
        **planar,
        groups=groups,
        weight_bits=rule.w,
        one_scale=rule.method == "tensor",
        bits=rule.a,
        code_groups=rule.shift_groups,
        clip=rule.clip_ratio,
        gradient_bits=rule.g,
        gradient_groups=rule.grad_groups,
        powers=rule.grad_grid == "powers",
    )


@dataclass(frozen=True)
class EngineStep:
    """The step of a layer for an input and a result of certain shapes.

    Attributes:
        operation: the engine's. rule: the layer's. planar: whether it is a convolution, not of matrices. signed: the
            input's codes. shape, result: of the input and of the result. shared: of the weight, if other calls use its
            codes too.
    """

    operation: Any
    rule: IntegerRule
    planar: bool
    signed: bool
    shape: tuple[int, ...]
    result: tuple[int, ...]
    shared: SharedWeight | None = None

    @staticmethod
    def of(
        rule: IntegerRule,
        geometry: Geometry | None,
        result: tuple[int, ...],
        operands: tuple[Tensor, Tensor, Tensor | None],
        shared: SharedWeight | None = None,
    ) -> EngineStep | None:
        """None where the engine does not take it, or int32 is not proved to hold sums. operands: x, weight, bias."""
        x, weight, bias = operands
        own = (weight,) if bias is None else (weight, bias)
        if rule.form != "engine" or not takes(x):
            return None
        if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in own):
            return None
        signed = not (rule.unsigned_nonneg and bool(x.detach().amin() >= 0))
        forward = weight[0].numel() * (largest_code(rule.a, signed) << (rule.shift_groups - 1))
        conv_groups = 1 if geometry is None else geometry.groups
        if weight.shape[0] % conv_groups:
            return None
        backward = weight[:, 0].numel() // conv_groups * (largest_code(rule.grad_bits) << (rule.grad_groups - 1))
        if max(forward, backward) * largest_code(rule.w) > INT32_MAX:
            return None
        if geometry is not None and result[-1] > WIDEST_OUTPUT:
            return None
        operation = _operation(rule, geometry, x.dim() - 2)
        return EngineStep(operation, rule, geometry is not None, signed, tuple(x.shape), result, shared)

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, noise: Noise, *, keep: bool
    ) -> tuple[Tensor, PackedShift | None]:
        """The result, float32, and the input's codes if they are to be kept.

        Raises:
            OperandError: of the input or the weight.
        """
        maps_of_x = self._maps(x)
        bits = self.rule.a
        packed = torch.empty((x.numel() * bits + 7) // 8, dtype=torch.uint8) if keep else None
        weights = self._weights(weight)
        y = (step_floats if keep else floats)(maps_of_x.shape[0], *self._size(self.result), weights.shape[0])
        failed, scale, exponents = self.operation.forward(
            array(maps_of_x.view(MEMORY[x.dtype])),
            self.signed,
            noise,
            array(weights),
            self._known(weight, by_output=True),
            None if bias is None else array(bias.reshape(-1)),
            array(y),
            array(packed),
            FASTEST,
            torch.get_num_threads(),
        )
        if failed:
            raise OperandError(failed)
        if packed is None:
            return self._shaped(y, self.result), None
        groups = self.rule.shift_groups
        kept = PackedShift(
            packed,
            torch.from_numpy(exponents),
            torch.tensor(scale, dtype=torch.float32),
            self.shape,
            bits,
            1 if self.planar else len(self.shape) - 1,
            groups,
            self.signed,
            self.planar,
        )
        return self._shaped(y, self.result), kept

    def again(self, kept: PackedShift, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The result of `forward` once more, from what was kept and the same weight and bias: the same floats.

        Raises:
            OperandError: of the weight.
        """
        sizes, weights = self._sizes(), self._weights(weight)
        y = step_floats(sizes[0], *self._size(self.result), weights.shape[0])
        failed = self.operation.again(
            sizes,
            _as_kept(kept),
            array(weights),
            self._known(weight, by_output=True),
            None if bias is None else array(bias.reshape(-1)),
            array(y),
            FASTEST,
            torch.get_num_threads(),
        )
        if failed:
            raise OperandError(failed)
        return self._shaped(y, self.result)

    def backward(
        self,
        gradient: Tensor,
        weight_shape: tuple[int, ...],
        weight: Tensor | None,
        kept: PackedShift | None,
        noise: Noise,
        *,
        needs: Needs,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias, float32, as far as they are needed.

        The input's needs the weight, the weight's what was kept.

        Raises:
            OperandError: of the gradient or the weight.
        """
        maps_of_g, weight_sizes = self._maps(gradient), self._four(weight_shape)
        sizes = self._sizes()
        of_input = step_floats(*sizes) if needs[0] else None
        of_weight = floats(*weight_sizes) if needs[1] else None
        of_bias = floats(weight_sizes[0]) if needs[2] else None
        failed = self.operation.backward(
            array(maps_of_g.view(MEMORY[gradient.dtype])),
            noise,
            sizes,
            None if kept is None else _as_kept(kept),
            weight_sizes,
            None if weight is None else array(self._weights(weight)),
            self._known(weight, by_output=False) if needs[0] else None,
            array(of_input),
            array(of_weight),
            array(of_bias),
            FASTEST,
            torch.get_num_threads(),
        )
        if failed:
            raise OperandError(failed)
        return (
            None if of_input is None else self._shaped(of_input, self.shape),
            None if of_weight is None else of_weight.view(weight_shape),
            of_bias,
        )

    def _known(self, weight: Tensor | None, *, by_output: bool) -> tuple[Any, ...] | None:
        """The weight's codes if others have use for them; None if they are this call's affair."""
        if self.shared is None or weight is None:
            return None
        return self.shared.codes(self.operation, self._weights(weight), by_output=by_output)

    def _maps(self, x: Tensor) -> Tensor:
        """(samples, height, width, channels), contiguous."""
        return maps(x.detach()) if self.planar else rows_as_maps(x.detach())

    def _sizes(self) -> tuple[int, ...]:
        """Of the input as maps."""
        channels = self.shape[1 if self.planar else -1]
        size = self._size(self.shape)
        return math.prod(self.shape) // (channels * math.prod(size)), *size, channels

    def _size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of a tensor of this shape."""
        if not self.planar:
            return 1, 1
        return (shape[2], shape[3]) if len(shape) == 4 else (1, shape[2])

    def _shaped(self, y: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Maps as the layer's tensor."""
        return planes(y, len(shape) - 2) if self.planar else y.view(shape)

    @staticmethod
    def _four(shape: tuple[int, ...]) -> tuple[int, ...]:
        """A weight's sizes as (out, in / groups, rows, columns)."""
        return (*shape, 1, 1) if len(shape) == 2 else (*shape[:2], *(1,) * (4 - len(shape)), *shape[2:])

    @classmethod
    def _weights(cls, weight: Tensor) -> Tensor:
        """A weight with these sizes, contiguous."""
        return weight.detach().contiguous().view(cls._four(tuple(weight.shape)))


def _as_kept(x: PackedShift) -> tuple[Any, Any, float, bool]:
    """As the engine takes it."""
    return array(x.codes), array(x.exponents), float(x.scale), x.signed
