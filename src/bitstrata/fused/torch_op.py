"""What a fused step leaves to torch: one node of the graph, with its own autograd graph from leaf to leaf."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .units import Sources, Step, Unit
from .values import Flow


@contextmanager
def sources_of(module: nn.Module | None) -> Iterator[Sources]:
    """The module's trained parameters; while it lasts, the module computes with views of those that have hooks.

    A gradient that is taken of such a parameter itself would run its hooks, which run again on the step's gradient.
    """
    owners: list[dict[str, Any]] = [] if module is None else [m._parameters for m in module.modules()]
    found: dict[int, tuple[nn.Parameter, Tensor]] = {}
    hooked: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    for own in owners:
        for name, p in own.items():
            if p is None or not p.requires_grad:
                continue
            if p._backward_hooks:
                hooked.append((own, name, p))
            found.setdefault(id(p), (p, p.view_as(p) if p._backward_hooks else p))
    for own, name, p in hooked:
        own[name] = found[id(p)][1]
    try:
        yield list(found.values())
    finally:
        for own, name, p in hooked:
            own[name] = p


@dataclass
class TorchOp(Unit):
    """Any other node, by torch, on float tensors (N, C, H, W), or of other shapes."""

    reads: tuple[str, ...]
    result: str
    node: fx.Node
    module: nn.Module | None
    inplace: bool  # it writes into its first argument, which no other node reads

    def run(self, step: Step) -> None:
        leaves: dict[str, Tensor] = {}

        def argument(node: fx.Node) -> Any:
            value = step.env[node.name]
            if isinstance(value, Flow) and node.name not in leaves:
                leaves[node.name] = value.as_leaf()
            leaf = leaves.get(node.name, value)
            return leaf.clone() if self.inplace and isinstance(leaf, Tensor) else leaf

        with torch.enable_grad(), step.autocast(), sources_of(self.module) as parameters:
            args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), argument)
            result = self._call(args, kwargs)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            step.env[self.result] = result
            return
        value = step.wrap(result, step.pool)
        step.env[self.result] = value
        wanting = [(step.env[name], leaf) for name, leaf in leaves.items() if leaf.requires_grad]
        if result.requires_grad:
            step.tape.append(lambda s: self._backward(s, result, wanting, parameters, value))

    def _call(self, args: Any, kwargs: Any) -> Any:
        if self.module is not None:
            return self.module(*args, **kwargs)
        if self.node.op == "call_method":
            return getattr(args[0], self.node.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
        return self.node.target(*args, **kwargs)  # type: ignore[operator]

    def _backward(
        self, step: Step, result: Tensor, wanting: list[tuple[Flow, Tensor]], parameters: Sources, value: Flow
    ) -> None:
        arrived = value.take_gradient(step, result)
        if arrived is not None:
            sources = [leaf for _, leaf in wanting] + [source for _, source in parameters]
            found = torch.autograd.grad(result, sources, arrived, allow_unused=True)
            for (reader, _), gradient in zip(wanting, found, strict=False):
                if gradient is not None:
                    reader.deliver(gradient)
            step.add_all(parameters, found[len(wanting) :])
        value.release()
