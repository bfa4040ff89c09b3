"""The mean over all positions that most networks end with, and the flattening behind it, in a fused step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import fx, nn

from .torch_op import TorchOp
from .units import Step, Unit
from .values import Plain, Value, as_map


def is_mean(module: nn.Module | None) -> bool:
    """Whether a pooling leaves one position."""
    return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))


def is_flatten(node: fx.Node) -> bool:
    """Whether a node makes a matrix, (samples, rest), of its input."""
    if not (node.target == "flatten" if node.op == "call_method" else node.target is torch.flatten):
        return False
    options = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | dict(node.kwargs)
    return options in ({"start_dim": 1}, {"start_dim": 1, "end_dim": -1})


@dataclass
class Mean(Unit):
    """(N, C, H, W) to (N, C) by torch's own pooling, without autograd's graph: the gradient is the same everywhere.

    parts: the pooling and the flattening by torch, for inputs of other kinds.
    """

    reads: tuple[str, ...]
    result: str
    parts: tuple[TorchOp, TorchOp]

    def run(self, step: Step) -> None:
        x = step.env[self.reads[0]]
        if not isinstance(x, Value):
            for part in self.parts:
                part.run(step)
            return
        with torch.no_grad():
            pooled = nn.functional.adaptive_avg_pool2d(as_map(x.real(), x.shape), 1)
        value = Plain(pooled.flatten(1))
        value.wanted = x.wanted
        step.env[self.result] = value
        if x.wanted:
            step.tape.append(lambda s: self._backward(s, x, value))

    @staticmethod
    def _backward(step: Step, x: Value, value: Plain) -> None:
        if value.arrived is None:
            return
        n, h, w, c = x.shape
        everywhere = (value.arrived / (h * w)).numpy()
        rows = step.pool.take(x.rows, np.float32)
        rows.reshape(n, h * w, c)[:] = everywhere[:, None]
        x.gradient.append(rows)
