"""The graph builder: turns real-valued operations into program nodes, materialising integers only where needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bitstrata_runtime.program import Node

from .errors import LowerError

Bound = float | None


@dataclass(frozen=True)
class Real:
    """A real-valued tensor of the model, as a program value with an affine and a clip still to be applied.

    kind: "input" (codes of the network's input), "acc" or "fixed". shape: (C, H, W). `pooled`: the scale is not a
    power of two (an average pool's divisor).
    """

    base: str
    kind: str
    shape: tuple[int, int, int]
    affine: tuple[str, ...] = ()
    lo: Bound = None
    hi: Bound = None
    pooled: bool = False

    @property
    def clipped(self) -> bool:
        return self.lo is not None or self.hi is not None


class Builder:
    """Collects nodes; identical materialisations are made once."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._names: set[str] = set()
        self._made: dict[Any, str] = {}

    def emit(self, name: str, op: str, inputs: tuple[str, ...], **attrs: Any) -> str:
        """Append a node and return its (unique) name; an identical node made before is used again.

        Convolutions alone are repeated, so that the program runs a layer as often as the model does.
        """
        key = (op, inputs, repr(sorted(attrs.items())))
        if key in self._made and op != "conv":
            return self._made[key]
        unique, count = name, 1
        while unique in self._names:
            count += 1
            unique = f"{name}.{count}"
        self._names.add(unique)
        self.nodes.append(Node(unique, op, inputs, attrs))
        self._made[key] = unique
        return unique

    def clip(self, x: Real, lo: Bound, hi: Bound) -> Real:
        """min(max(x, lo), hi) after what is pending already."""

        def limit(v: float) -> float:
            v = v if lo is None else max(v, lo)
            return v if hi is None else min(v, hi)

        new_lo = lo if x.lo is None else limit(x.lo)
        new_hi = hi if x.hi is None else limit(x.hi)
        return replace(x, lo=new_lo, hi=new_hi)

    def fixed(self, x: Real, where: str, *, power_of_two: bool = False, name: str | None = None) -> Real:
        """x as int32 fixed point with nothing pending; `where` names the reading operation in errors."""
        if x.kind == "input":
            raise LowerError(
                f"lower: {where} computes on the network's input before any quantized layer has read it; move this "
                "operation behind the first convolution or linear layer (a convolution can pad by itself)"
            )
        if x.kind == "acc" or x.affine or (power_of_two and x.pooled):
            attrs = {"affine": list(x.affine), "clip": [x.lo, x.hi]}
            return Real(self.emit(name or f"{x.base}.fixed", "rescale", (x.base,), **attrs), "fixed", x.shape)
        if x.clipped:
            base = self.emit(name or f"{x.base}.clip", "clip", (x.base,), clip=[x.lo, x.hi])
            return Real(base, "fixed", x.shape, pooled=x.pooled)
        return x

    def codes(self, x: Real, layer: str) -> str:
        """x on the input grid of `layer`."""
        if x.kind == "input":
            return x.base
        attrs = {"to": layer, "affine": list(x.affine), "clip": [x.lo, x.hi]}
        return self.emit(f"{layer}.input", "requant", (x.base,), **attrs)
