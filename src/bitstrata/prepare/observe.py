"""One look at an unknown model: run it on an example and note which layers run, on what, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..nn.l1_norm import L1BatchNorm
from ..nn.layer_batch_norm import LayerBatchNorm1d, LayerBatchNorm2d
from .compiled import eagerly
from .finite import not_finite

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, LayerBatchNorm1d, LayerBatchNorm2d, L1BatchNorm)


@dataclass
class LayerTrace:
    """What one layer was seen to do on the example."""

    calls: int = 0
    negative: bool = False  # some input element was below zero
    problem: str = ""  # why its inputs tell nothing of their sign
    order: int = -1  # position of the first call among all traced layers
    input_shape: tuple[int, ...] = ()


@dataclass
class Trace:
    """What the example run showed.

    norm_owner: normalization's name -> the layer whose precision it follows. normalized: layers whose output
    normalizations read and nothing else.
    """

    layers: dict[str, LayerTrace] = field(default_factory=dict)
    norm_owner: dict[str, str] = field(default_factory=dict)
    normalized: set[str] = field(default_factory=set)


class _Readers(TorchFunctionMode):
    """Notes which layers' outputs something else than a normalization computes with."""

    def __init__(self, producer: dict[int, str]) -> None:
        super().__init__()
        self.producer = producer
        self.elsewhere: set[str] = set()
        self.in_norm = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.in_norm and isinstance(result, Tensor):
            read = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
            self.elsewhere |= {self.producer[id(x)] for x in read if id(x) in self.producer}
        return result


def observe(model: nn.Module, example: Any, layers: dict[str, nn.Module]) -> Trace:
    """Run `model` on `example` in evaluation mode without gradients and trace `layers` and batch normalizations.

    A normalization is owned by the layer whose output it reads; otherwise (it reads a sum, a pooled map) by the first
    layer that runs after it.

    Args:
        example: a tensor, or a tuple or list of positional arguments.
        layers: qualified name -> module.
    """
    trace = Trace({name: LayerTrace() for name in layers})
    producer: dict[int, str] = {}
    alive: list[Tensor] = []  # ids are only unique among living tensors
    waiting: list[str] = []
    readers = _Readers(producer)
    count = 0

    def layer_hook(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal count
            seen, x = trace.layers[name], _input_of(args, kwargs)
            seen.negative |= bool((x < 0).any())
            seen.problem = seen.problem or _useless(x)
            seen.order = count if seen.calls == 0 else seen.order
            seen.calls += 1
            seen.input_shape = tuple(x.shape)
            count += 1
            for norm in waiting:
                trace.norm_owner.setdefault(norm, name)
            waiting.clear()
            producer[id(output)] = name
            alive.append(output)

        return hook

    def norm_hook(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
            readers.in_norm -= 1
            owner = producer.get(id(_input_of(args, kwargs)))
            if owner is None:
                waiting.append(name)
            else:
                trace.norm_owner.setdefault(name, owner)
                trace.normalized.add(owner)

        return hook

    def enter_norm(_module: nn.Module, _args: Any) -> None:
        readers.in_norm += 1

    handles = [module.register_forward_hook(layer_hook(name), with_kwargs=True) for name, module in layers.items()]
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS):
            handles.append(module.register_forward_hook(norm_hook(name), with_kwargs=True))
            handles.append(module.register_forward_pre_hook(enter_norm))
    try:
        with eagerly(), torch.no_grad(), evaluating(model), readers:
            model(*example) if isinstance(example, tuple | list) else model(example)
    except Exception as error:
        error.add_note(f"quantize_: the model does not run on example_inputs, {_described(example)}{_remedy(example)}")
        raise
    finally:
        for handle in handles:
            handle.remove()
    trace.normalized -= readers.elsewhere
    for norm in waiting:  # nothing follows: the last layer before it is the nearest
        if trace.layers and count:
            last = max((t.order, n) for n, t in trace.layers.items())[1]
            trace.norm_owner.setdefault(norm, last)
    return trace


def _useless(x: Tensor) -> str:
    return f"it has no elements, shape {tuple(x.shape)}" if x.numel() == 0 else not_finite({"it": x})


def _described(example: Any) -> str:
    given = example if isinstance(example, tuple | list) else (example,)
    return ", ".join(
        f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in given
    )


def _remedy(example: Any) -> str:
    """What is probably wrong with an example on which a model does not run."""
    given = example if isinstance(example, tuple | list) else (example,)
    first, rest = (given[0] if given else None), given[1:]
    if not isinstance(first, Tensor):
        return "; give torch tensors"
    if len(rest) == 1 and isinstance(rest[0], Tensor) and not rest[0].is_floating_point():
        return "; the second looks like labels: give the inputs alone"
    if not first.is_floating_point():
        return "; give floats as the model reads them, such as (pixel / 255 - mean) / std"
    return "; the first dimension is the batch: give x[None]" if first.dim() in (1, 3) else ""


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A layer's first tensor: of a Linear its input, of attention the query, of a packed sequence its data."""
    return next(tensors_in((args, kwargs)))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode restored after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
