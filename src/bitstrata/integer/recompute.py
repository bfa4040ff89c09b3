"""Results of integer layers that are computed again in the backward pass instead of being kept for it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Result:
    """A result that parts of the graph keep: made when the first part is asked for, there until the last one was."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.parts = self._asked = 0
        self._compute = compute
        self._made: Tensor | None = None

    def tensor(self) -> Tensor:
        if self._made is None:
            with torch.no_grad():
                self._made = self._compute()
        made = self._made
        self._asked += 1
        if self._asked == self.parts:
            self._asked, self._made = 0, None
        return made


class _Part(NamedTuple):
    """Of a result: elements as torch.as_strided takes them."""

    result: _Result
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Kept(NamedTuple):
    """Any other tensor, and the version of its content, which torch compares where there are no hooks."""

    tensor: Tensor
    version: int


class _Known(NamedTuple):
    """A result while somebody holds it. memory: what its views are views of. version: of its content."""

    memory: weakref.ref[Tensor]
    version: int
    dtype: torch.dtype
    result: _Result


class _Present(threading.local):
    known: dict[int, _Known] | None = None  # by the address of the memory


_present = _Present()


@contextmanager
def recompute_outputs() -> Iterator[None]:
    """Run the forward pass in this context, and what torch's operations keep of an integer layer's result is not kept.

    The backward pass computes the result again from the packed codes of the layer's input, which the layer keeps
    anyway, and its weight: the same floats, so gradients are the same to the bit. It costs that product a second time,
    once however many operations ask (a ViT's fc1 before GELU, and its queries, keys and values), and saves 4 bytes an
    element. Results that nobody keeps, that were written in place, or of layers whose weight needs no gradient are not
    affected. Fused networks keep no such results.

        with bitstrata.recompute_outputs():
            loss = F.cross_entropy(model(x), y)
        loss.backward()

    Raises:
        RuntimeError: in the backward pass, if a weight or bias, or another tensor that is needed, was written in place
            since the forward pass.
    """
    known: dict[int, _Known] = {}
    before, _present.known = _present.known, known
    try:
        with saved_tensors_hooks(lambda x: _pack(known, x), _unpack):
            yield
    finally:
        _present.known = before


def recomputes() -> bool:
    """Whether a context of `recompute_outputs` is open in this thread."""
    return _present.known is not None


def remember(y: Tensor, compute: Callable[[], Tensor]) -> None:
    """What `compute` gives is y, in the same layout. For the context that is open."""
    if _present.known is not None:
        memory = y if y._base is None else y._base
        result = _Result(compute)
        _present.known[y.untyped_storage().data_ptr()] = _Known(weakref.ref(memory), y._version, y.dtype, result)


def _pack(known: dict[int, _Known], x: Tensor) -> _Part | _Kept:
    found = known.get(x.untyped_storage().data_ptr()) if type(x) is Tensor else None
    # the address may have passed to another tensor, or the content may be another by now
    if found is None or found.memory() is None or x._version != found.version or x.dtype != found.dtype:
        return _Kept(x, x._version)
    found.result.parts += 1
    return _Part(found.result, x.size(), x.stride(), int(x.storage_offset()))


def _unpack(kept: _Part | _Kept) -> Tensor:
    if isinstance(kept, _Kept):
        if kept.tensor._version != kept.version:
            raise RuntimeError(
                f"recompute_outputs: a tensor {tuple(kept.tensor.shape)} that the backward pass needs was written in "
                f"place since the forward pass (version {kept.tensor._version}, {kept.version} was kept)"
            )
        return kept.tensor
    return kept.result.tensor().as_strided(kept.size, kept.stride, kept.offset)
