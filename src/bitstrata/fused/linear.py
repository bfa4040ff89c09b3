"""The linear layer of a fused step in integers: its step by the engine, without what autograd would add to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..integer.engine_codes import noise_of
from ..integer.engine_step import EngineStep, OperandError
from ..integer.shiftquant import PackedShift
from ..nn.integer_layers import IntegerLinear
from .torch_op import TorchOp
from .units import Step, Unit
from .values import Flow, NotFiniteError, Plain


@dataclass
class Linear(Unit):
    """An `IntegerLinear` that reads a matrix (samples, in). Inputs and rules that it does not take are left to `other`,
    the layer itself.
    """

    reads: tuple[str, ...]
    result: str
    layer: IntegerLinear
    other: TorchOp

    def run(self, step: Step) -> None:
        x: Flow = step.env[self.reads[0]]
        operation = self._operation(x.tensor) if isinstance(x, Plain) else None
        if not isinstance(x, Plain) or operation is None:
            self.other.run(step)
            return
        weight, bias = self.layer.weight, self.layer.bias
        try:
            y, kept = operation.forward(x.tensor, weight, bias, None, keep=weight.requires_grad)
        except OperandError as error:
            raise self._reported(error, "activation") from error
        value = Plain(y)
        value.wanted = x.wanted or any(p is not None and p.requires_grad for p in (weight, bias))
        step.env[self.result] = value
        if value.wanted:
            step.tape.append(lambda s: self._backward(s, x, operation, kept, value))

    def _operation(self, x: Tensor) -> EngineStep | None:
        layer, rule = self.layer, self.layer.rule
        if x.dim() != 2 or x.numel() == 0 or rule.act_rounding != "nearest":
            return None
        return EngineStep.of(rule, None, (len(x), layer.out_features), (x, layer.weight, layer.bias))

    def _backward(self, step: Step, x: Plain, operation: EngineStep, kept: PackedShift | None, value: Plain) -> None:
        if value.arrived is None:
            return
        layer = self.layer
        weight, bias = layer.weight, layer.bias
        noise = noise_of(layer.rule.grad_rounding, layer.state.noise)
        needs = x.wanted, weight.requires_grad, bias is not None and bias.requires_grad
        try:
            of_x, of_weight, of_bias = operation.backward(value.arrived, weight.shape, weight, kept, noise, needs=needs)
        except OperandError as error:
            raise self._reported(error, "gradient") from error
        if of_x is not None:
            x.deliver(of_x)
        for parameter, gradient in ((weight, of_weight), (bias, of_bias)):
            if gradient is not None:
                step.add(parameter, gradient)

    def _reported(self, error: OperandError, other: str) -> NotFiniteError:
        what = "weight" if error.weight else other
        return NotFiniteError(f"{self.layer.state.name}: its {what} contains NaN or infinity")
