"""Numbers that stop being finite: found before the step, and traced to a layer by running the batch once more."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitstrata.prepare.observe import tensors_in
from bitstrata.prepare.precision import precision_map
from bitstrata.quantizers.base import Quantizer
from bitstrata.train.config import Level

#: A step size this many times as large as when training began holds all its layer's values in one code.
EXPLODED = 1e4


@dataclass(frozen=True)
class Finding:
    """The first tensor that was not finite.

    way: "forward" or "backward". what: the tensor and its layer, in words. level: the precision, "float" for a float
    network, or "mixed" for a map of several.
    """

    way: str
    what: str
    level: Level

    def __str__(self) -> str:
        at = f"precision {self.level}" if isinstance(self.level, int) else f"{self.level} precision"
        return f"first in the {self.way} pass at {at}: {self.what}"


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Euclidean norm of all gradients together, one pass over them; NaN or infinite if any element is."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    if not dense:
        return 0.0
    norms = torch._foreach_norm(dense)
    if len({(n.device, n.dtype) for n in norms}) > 1:
        norms = tuple(n.to(norms[0].device, torch.float32) for n in norms)
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def first_bad_gradient(model: nn.Module) -> str:
    """The first parameter whose gradient is not finite, in words; "" if there is none."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {_parameter_in_words(model, name)} is not finite"
    return ""


def first_bad_parameter(model: nn.Module) -> str:
    """The first parameter that is not finite, in words; "" if there is none."""
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"{_parameter_in_words(model, name)} is not finite"
    return ""


def trace(model: nn.Module, run: Callable[[], object]) -> Finding | None:
    """Call `run`, a forward and backward pass, and watch every layer; None if everything was finite.

    Errors of `run` itself are not raised: what they complain about is what is looked for.
    """
    probe = _Probe(model)
    try:
        with probe:
            run()
    except (ArithmeticError, ValueError, RuntimeError):
        pass
    return probe.finding


class _Probe:
    """Hooks on every module and parameter while entered. The first tensor that is not finite becomes the finding."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.finding: Finding | None = None
        self.handles: list[Any] = []
        self.readers: dict[tuple[int, int], list[str]] = {}  # tensor and version -> modules that read it
        self.held: list[Tensor] = []  # an id stands for a tensor only as long as it lives

    def __enter__(self) -> None:
        for name, module in self.model.named_modules():
            if name and not _is_container(module):
                self.handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
                self.handles.append(module.register_forward_hook(self._after(name)))
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                words = functools.partial("the gradient of {}".format, _parameter_in_words(self.model, name))
                self.handles.append(parameter.register_hook(self._gradient(words)))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.held.clear()

    def _found(self, way: str, what: str) -> None:
        if self.finding is None:
            self.finding = Finding(way, what, current_level(self.model))

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.finding is not None:
                return
            inputs = _floating((args, kwargs))
            for x in inputs:
                if not _finite(x):
                    self._found("forward", f"the input of layer {name!r} is not finite")
                    return
                if x.requires_grad and not x.is_leaf:
                    self.held.append(x)
                    self.readers.setdefault((id(x), x._version), []).append(name)
            for own, parameter in _in_use(module):
                if not _finite(parameter):
                    words = _parameter_in_words(self.model, f"{name}.{own}")
                    self._found("forward", f"{words} is not finite")
                    return

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if self.finding is not None:
                return
            for y in _floating(output):
                if not _finite(y):
                    what = f"the output of layer {name!r} is not finite, from a finite input and finite parameters"
                    self._found("forward", what)
                    return
                if y.requires_grad:
                    self.held.append(y)
                    words = functools.partial(self._output_in_words, name, (id(y), y._version))
                    self.handles.append(y.register_hook(self._gradient(words)))

        return hook

    def _gradient(self, words: Callable[[], str]) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if self.finding is None and not _finite(gradient):
                self._found("backward", f"{words()} is not finite")

        return hook

    def _output_in_words(self, name: str, key: tuple[int, int]) -> str:
        """What gives the output of `name` its gradient: the layers that read it, or else what is no layer."""
        readers = self.readers.get(key)
        if not readers:
            return f"the gradient that layer {name!r} receives from the loss, or from an operation that is no layer,"
        layers = " and ".join(f"{reader!r}" for reader in readers)
        return f"the gradient of the input of layer {layers}, which gives it to layer {name!r},"


def current_level(model: nn.Module) -> Level:
    """The one precision that the network runs at, "float", or "mixed"."""
    found = set(precision_map(model).values())
    return found.pop() if len(found) == 1 else ("mixed" if found else "float")


class StepSizes:
    """The step sizes of a network, against what they were when this object was made."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.start = {name: float(step.detach().abs().max()) for name, step in step_sizes(model)}
        self.warned: set[str] = set()

    def problem(self) -> str:
        """The first step size that is not finite, or EXPLODED times as large as at the start, in words; or "".

        Warns:
            UserWarning: once for each step size that is not positive. The grid takes the smallest step in its place, so
                that the layer gives almost nothing, but its gradient can bring the step back.
        """
        for name, step in step_sizes(self.model):
            low, high = float(step.detach().min()), float(step.detach().max())
            words = _parameter_in_words(self.model, name)
            if not (math.isfinite(low) and math.isfinite(high)):
                return f"{words} is not finite"
            if low <= 0 and name not in self.warned:
                self.warned.add(name)
                warnings.warn(
                    f"{words} is {low:.3g} and no longer positive, so the layer gives almost nothing: the learning "
                    "rate of step sizes is too high",
                    stacklevel=5,
                )
            if high > EXPLODED * self.start.get(name, math.inf):
                return f"{words} has grown from {self.start[name]:.3g} to {high:.3g}"
        return ""


def step_sizes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Qualified name and value of each step size that has been set."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            unset = _unset_steps(module)
            for own, parameter in module.named_parameters(recurse=True):
                if own.split(".")[0] in ("step", "steps") and own not in unset:
                    yield f"{name}.{own}" if name else own, parameter


def _unset_steps(quantizer: Quantizer) -> set[str]:
    """Steps of an activation quantizer that no data has set."""
    flags = getattr(quantizer, "initialized", None)
    steps = getattr(quantizer, "steps", None)
    if not isinstance(flags, Tensor) or not isinstance(steps, Mapping | nn.ParameterDict):
        return set()
    return {f"steps.{key}" for key, flag in zip(steps.keys(), flags.tolist(), strict=True) if not flag}


def _in_use(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and, of a quantizer, those that its current precision uses."""
    if not isinstance(module, Quantizer):
        yield from module.named_parameters(recurse=False)
        return
    for name, parameter in module.named_parameters():
        key = name.rpartition(".")[2]
        if not key.isdigit() or int(key) == module.precision:
            yield name, parameter


def _parameter_in_words(model: nn.Module, name: str) -> str:
    """'the weight of layer 'conv1'', 'the step size of 'conv1.act_quant' (steps.4)'."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        owner = ".".join(parts[:cut])
        module = model.get_submodule(owner)
        if isinstance(module, Quantizer):
            own = ".".join(parts[cut:])
            kind = "step size" if parts[cut] in ("step", "steps") else "parameter"
            return f"the {kind} {own!r} of quantizer {owner!r}"
    layer = ".".join(parts[:-1])
    return f"the {parts[-1]} of layer {layer!r}" if layer else f"the parameter {name!r}"


def _is_container(module: nn.Module) -> bool:
    """Whether what a module returns comes from its parts, which are watched themselves."""
    if isinstance(module, Quantizer):
        return False
    return any(True for _ in module.children()) and not any(True for _ in module.parameters(recurse=False))


def _floating(value: Any) -> list[Tensor]:
    return [x for x in tensors_in(value) if x.is_floating_point() or x.is_complex()]


def _finite(tensor: Tensor) -> bool:
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return bool(torch.isfinite(values.detach()).all())
