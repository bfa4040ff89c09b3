"""A tracer that knows every size: forwards may look at shapes, branch on them and assert about them.

Beside the graph, every operation is run on an example, so that whatever is no tensor (`x.shape`, `x.size(0)`,
`x.dim()`, `len(x)`) is a plain Python value in the traced forward. What depends on a tensor's elements still cannot be
traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from ..nn.layers import FORMS, QuantizedLayer
from ..nn.norm import PrecisionBatchNorm
from ..prepare.observe import BATCH_NORMS


class _SizedProxy(fx.Proxy):
    """Stands for a tensor of the example; attributes of it that are no tensors are given as they are."""

    def __getattr__(self, name: str) -> Any:
        value = self.tracer.known.get(self.node)  # type: ignore[attr-defined]
        if isinstance(value, Tensor) and not name.startswith("__"):
            found = getattr(value, name, None)
            if found is not None and not callable(found) and not isinstance(found, Tensor):
                return found
        return super().__getattr__(name)

    def __len__(self) -> int:
        return len(self.tracer.known[self.node])  # type: ignore[attr-defined]


class SizedTracer(fx.Tracer):
    """Traces a model of one input; quantized layers and normalizations are single nodes.

    Args:
        example: the input; the model is run on it, operation by operation.
    """

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.example = example
        self.known: dict[fx.Node, Any] = {}
        self._running = False  # an operation is being run on the example, and nothing is to be traced

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return forward(*args, **kwargs) if self._running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """A placeholder for every argument without a default; the others keep theirs."""
        assert is_module
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        names = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
        if not names and parameters:  # forward(self, *inputs), or a first argument with a default
            names = [parameters[0].name]
        placeholders = [self.create_proxy("placeholder", name, (), {}) for name in names]
        if placeholders:
            self.known[placeholders[0].node] = self.example
        return root_fn, [self.root, *placeholders]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (QuantizedLayer, PrecisionBatchNorm, *BATCH_NORMS, *FORMS)):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _SizedProxy(node, self)

    def create_proxy(  # noqa: PLR0917
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        node = proxy.node
        if kind in ("placeholder", "output") or any(parent not in self.known for parent in node.all_input_nodes):
            return proxy
        self._running = True
        try:
            value = self._run(node)
        finally:
            self._running = False
        if _holds_tensors(value):
            self.known[node] = value
            return proxy
        self.graph.erase_node(node)
        return value

    def _run(self, node: fx.Node) -> Any:
        args: Any = fx.node.map_arg(node.args, self.known.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, self.known.__getitem__)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            found: Any = self.root
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_holds_tensors(part) for part in value)
    if isinstance(value, dict):
        return any(_holds_tensors(part) for part in value.values())
    return isinstance(value, Tensor)
