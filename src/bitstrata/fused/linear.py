"""The linear layer of a fused step in integers: its products, without what autograd and torch would add to them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitstrata_runtime import _engine

from ..integer.autograd import LayerState
from ..integer.engine_codes import FASTEST, Noise, array, noise_of
from ..integer.products import headroom
from ..nn.integer_layers import IntegerLinear
from .torch_op import TorchOp
from .units import Step, Unit
from .values import Codes, Flow, Format, NotFiniteError, Plain

MATRICES = ((1, 1), (1, 1), (0, 0, 0, 0), 1)  # stride, dilation, padding, groups: maps of one position
Rows = NDArray[np.float32]


def _codes(rows: Rows, form: Format, noise: Noise, what: str, state: LayerState) -> Codes:
    """Of a matrix, as maps of one position."""
    out = np.empty((len(rows), 1, 1, rows.shape[1]), np.uint8)
    scale, exponents = _engine.shift_codes(
        rows,
        form.bits,
        form.groups,
        form.signed,
        form.absorbed,
        form.clip_ratio,
        noise,
        out.reshape(rows.shape),
        None,
        FASTEST,
        torch.get_num_threads(),
        form.powers,
    )
    if math.isnan(scale):
        raise NotFiniteError(f"{state.name}: its {what} contains NaN or infinity")
    return Codes(out.view(np.int8) if form.signed else out, scale, exponents, form)


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
        if not isinstance(x, Plain) or not self._takes(x.tensor):
            self.other.run(step)
            return
        rows: Rows = x.tensor.detach().contiguous().numpy()
        rule, bias = self.layer.rule, self.layer.bias
        signed = not (rule.unsigned_nonneg and bool(rows.min() >= 0))
        codes = _codes(
            rows, Format(rule.a, rule.shift_groups, signed, rule.clip_ratio), None, "activation", self.layer.state
        )
        weight, scale = self._weight(by_output=True)
        y = np.empty((len(rows), 1, 1, len(weight)), np.float32)
        _engine.conv_forward(
            codes.data,
            codes.range,
            weight,
            *MATRICES,
            FASTEST,
            torch.get_num_threads(),
            shift=codes.shift,
            values=y,
            factor=self._factor(codes, scale),
        )
        result = torch.from_numpy(y.reshape(len(rows), -1))
        if bias is not None:
            result.add_(bias.detach())
        value = Plain(result)
        trained = [p for p in (self.layer.weight, bias) if p is not None and p.requires_grad]
        value.wanted = x.wanted or bool(trained)
        step.env[self.result] = value
        if value.wanted:
            step.tape.append(lambda s: self._backward(s, x, codes, value))

    def _takes(self, x: Tensor) -> bool:
        layer, rule = self.layer, self.layer.rule
        if x.dim() != 2 or x.numel() == 0 or rule.method != "shift" or rule.act_rounding != "nearest":
            return False
        (outs, ins), groups = layer.weight.shape, rule.shift_groups
        tensors = [t for t in (x, layer.weight, layer.bias) if t is not None]
        return (
            all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
            and headroom(rule.a, groups, ins, other_bits=rule.w, signed=not rule.unsigned_nonneg).fits
            and headroom(rule.grad_bits, rule.grad_groups, outs, other_bits=rule.w).fits
        )

    def _weight(self, *, by_output: bool) -> tuple[NDArray[np.int8], Rows]:
        """Codes (out, in, 1, 1), and the scales of a side's channels."""
        weight = array(self.layer.weight.contiguous()[:, :, None])
        assert weight is not None
        codes = np.empty((*weight.shape, 1), np.int8)
        scale = np.empty(weight.shape[0 if by_output else 1], np.float32)
        bits, threads = self.layer.rule.w, torch.get_num_threads()
        if not _engine.weight_codes(weight, 1, bits, by_output, codes[..., 0], scale, FASTEST, threads):
            raise NotFiniteError(f"{self.layer.state.name}: its weight is not finite")
        return codes, scale

    @staticmethod
    def _factor(codes: Codes, scale: Rows) -> Rows:
        return (codes.unit * scale.astype(np.float64)).astype(np.float32)

    def _backward(self, step: Step, x: Plain, codes: Codes, value: Plain) -> None:
        if value.arrived is None:
            return
        layer, threads = self.layer, torch.get_num_threads()
        rule, bias = layer.rule, layer.bias
        rows = value.arrived.contiguous().numpy()
        noise = noise_of(rule.grad_rounding, layer.state.noise)
        gradient = _codes(rows, Format.of_gradient(rule), noise, "gradient", layer.state)
        if x.wanted:
            weight, scale = self._weight(by_output=False)
            found = np.empty(codes.data.shape, np.float32)
            _engine.conv_input_grad(
                gradient.data,
                gradient.range,
                weight,
                *MATRICES,
                FASTEST,
                threads,
                shift=gradient.shift,
                values=found,
                factor=self._factor(gradient, scale),
            )
            x.deliver(torch.from_numpy(found.reshape(x.tensor.shape)))
        if layer.weight.requires_grad:
            of_weight = torch.empty(layer.weight.shape)
            _engine.conv_weight_grad(
                gradient.data,
                gradient.range,
                codes.data,
                codes.range,
                *MATRICES,
                FASTEST,
                threads,
                values=array(of_weight[:, :, None, None]),
                out_factor=gradient.channel_scales(),
                in_factor=codes.channel_scales(),
            )
            step.add(layer.weight, of_weight)
        if bias is not None and bias.requires_grad:
            sums = _engine.code_sums(gradient.data.reshape(rows.shape), FASTEST, threads)
            step.add(bias, torch.from_numpy((sums * gradient.channel_scales()).astype(np.float32)))
