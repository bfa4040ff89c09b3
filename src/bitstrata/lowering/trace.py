"""Tracing: the model's graph with every tensor's shape on one example."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..nn.layers import QuantizedLayer
from ..nn.norm import PrecisionBatchNorm
from .errors import LowerError


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, QuantizedLayer | PrecisionBatchNorm):
            return True
        return super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class Traced:
    """A float64 evaluation copy of the model, its graph, and every node's value on the example.

    values: tensors as (shape without the batch); anything else (sizes, numbers) as it is.
    """

    model: nn.Module
    graph: fx.Graph
    values: dict[fx.Node, Any]


def double_copy(model: nn.Module) -> nn.Module:
    """A float64 copy in evaluation mode on the CPU: what "the fake-quantized model, exactly" means here."""
    return copy.deepcopy(model).cpu().double().eval()


def trace(model: nn.Module, example: Tensor) -> Traced:
    """Trace a model of one input tensor.

    Raises:
        LowerError: the model's forward cannot be traced (control flow that depends on data, several inputs).
    """
    twin = double_copy(model)
    try:
        graph = _Tracer().trace(twin)
    except Exception as error:
        raise LowerError(
            f"lower: cannot trace {type(model).__name__}.forward: {error}; its control flow must not depend on the input: move "
            "such parts out of forward, or lower the part of the model that is free of them"
        ) from error
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        raise LowerError(f"lower: the model must take one input tensor, {type(model).__name__} takes {len(inputs)}")
    values: dict[fx.Node, Any] = {}

    class _Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            values[n] = tuple(result.shape[1:]) if isinstance(result, Tensor) else result
            return result

    with torch.no_grad():
        _Record(fx.GraphModule(twin, graph)).run(example.detach().cpu().double())
    return Traced(twin, graph, values)
