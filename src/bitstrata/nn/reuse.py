"""Fake-quantized weights computed once and used many times, with one backward pass through the quantizer for all uses.

A use gets a leaf that holds the quantized weight; backward passes add up their gradients there, and `settle` passes the
sums on through the quantizers. So uses may lie in one graph or in several, in forward passes of several batches, and
within `torch.utils.checkpoint`. Gradients are linear, so those of the parameters are what they are when every use
quantizes for itself, but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .layers import QuantizedLayer

EFFECTIVE = "effective"


def _flags(inputs: Iterable[Tensor]) -> tuple[bool, ...]:
    return tuple(t.requires_grad for t in inputs)


def _versions(inputs: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(t._version for t in inputs)


@dataclass(eq=False)
class Once:
    """A computed value: `root` with its graph, and the leaf that takes its place.

    level: "effective" for what is quantized; else of the quantized weight, the precision, or None where it serves all.
    inputs: the layer's weight first, then what else decides the value. versions, flags: theirs at that time.
    """

    layer: str
    level: int | str | None
    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]
    flags: tuple[bool, ...]
    root: Tensor
    leaf: Tensor

    def valid(self, weight: Tensor) -> bool:
        """Whether computing it again would give the same."""
        same = self.inputs[0] is weight and self.flags == _flags(self.inputs)
        return same and not self.outdated()

    def outdated(self) -> bool:
        """Whether something that it was computed from has been written to since."""
        return self.versions != _versions(self.inputs)


class StepWeights:
    """What quantized layers have computed in the present step; see `bitstrata.step_weights`.

    keep: what has been settled serves further uses, until the last time; else it is computed anew.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep
        self._now: dict[Hashable, Once] = {}
        self._before: list[Once] = []  # no longer handed out; gradients may come yet

    def effective(self, layer: QuantizedLayer, compute: Callable[[], Tensor]) -> Tensor:
        """The real-valued weight that is quantized: one for all precisions."""
        return self._use(layer, EFFECTIVE, [layer.weight_transform], compute)

    def quantized(self, layer: QuantizedLayer, compute: Callable[[], Tensor]) -> Tensor:
        """The fake-quantized weight: one for all precisions where they quantize alike, else the current one's."""
        level = None if layer.weight_quant.same_at_all_precisions else layer.precision
        return self._use(layer, level, [layer.weight_transform, layer.weight_quant], compute)

    def _use(
        self,
        layer: QuantizedLayer,
        level: int | str | None,
        parts: Iterable[nn.Module | None],
        compute: Callable[[], Tensor],
    ) -> Tensor:
        key = (id(layer), level, torch.is_autocast_enabled(layer.weight.device.type))
        found = self._now.get(key)
        if found is None or not found.valid(layer.weight):
            if found is not None:
                self._before.append(found)
            inputs = (layer.weight, *(t for part in parts if part is not None for t in part.parameters()))
            versions, flags = _versions(inputs), _flags(inputs)
            # Hooks on saved tensors that are in force here must not see the quantizer's: torch.utils.checkpoint, which
            # runs its region again in the backward pass, expects it to save the same then, when the weight is there.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
                root = compute()
            leaf = root.detach().requires_grad_(root.requires_grad)
            found = Once(type(layer).__name__, level, inputs, versions, flags, root, leaf)
            self._now[key] = found
        return found.leaf if torch.is_grad_enabled() else found.leaf.detach()

    def settle(self, *, everything: bool = True, last: bool = False) -> None:
        """Pass the gradients that have come to the leaves on, to the parameters' `.grad`.

        Args:
            everything: else only weights that one precision has for itself, whose uses end with its turn.
            last: `close` comes next.

        Raises:
            RuntimeError: a parameter was written to after its quantized weight had been used; no gradient is passed on.
        """
        there = [*self._before, *self._now.values()]
        for once in there:
            if once.leaf.grad is not None and once.outdated():
                raise RuntimeError(
                    f"step_weights: the weight of shape {tuple(once.inputs[0].shape)} of a {once.layer}, or a "
                    "parameter of its quantizer, was changed while gradients of the former value were outstanding; "
                    "change parameters after the block has ended"
                )
        keep = self.keep and not last
        chosen = there if everything else [once for once in there if isinstance(once.level, int)]
        _pass_on([once for once in chosen if once.level != EFFECTIVE], keep)
        _pass_on([once for once in chosen if once.level == EFFECTIVE], keep)
        if not keep and not last:  # `close` comes next, and needs to know them
            gone = {id(once) for once in chosen}
            self._now = {key: once for key, once in self._now.items() if id(once) not in gone}
            self._before = [once for once in self._before if id(once) not in gone]

    def close(self) -> None:
        """Forget everything; a backward pass that still reaches a leaf is an error from now on."""
        for once in (*self._before, *self._now.values()):
            if once.leaf.requires_grad:
                once.leaf.register_hook(_late)
        self._now, self._before = {}, []

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """A copy of a model takes no part in the step of the original."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


def _pass_on(chosen: list[Once], keep: bool) -> None:
    pending = [(once.root, once.leaf.grad) for once in chosen if once.leaf.grad is not None]
    for once in chosen:
        once.leaf.grad = None
    if pending:
        roots, gradients = zip(*pending, strict=True)
        torch.autograd.backward(roots, gradients, retain_graph=keep)


def _late(gradient: Tensor) -> NoReturn:
    raise RuntimeError(
        "step_weights: a backward pass ran after the block in which its forward pass had been; its gradients would be "
        "lost: run it inside the block"
    )


def _same(x: Tensor) -> Tensor:
    return x
