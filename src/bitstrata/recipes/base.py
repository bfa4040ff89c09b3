"""What a recipe is, and the registry of recipes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..quantizers import registry as quantizers


@dataclass(frozen=True)
class Part:
    """A registered quantizer and its options, checked when the part is made."""

    quantizer: str
    role: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        record = quantizers.describe(self.quantizer, self.role)
        unknown = sorted(set(self.options) - set(record.options))
        if unknown:
            raise ValueError(
                f"Part: {self.role} quantizer {self.quantizer!r} has no option {', '.join(map(repr, unknown))}; "
                f"it has: {', '.join(record.options) or 'none'}"
            )

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        return f"{self.quantizer}({options})"


@dataclass(frozen=True)
class Recipe:
    """A composition of parts. Each field can be replaced with `dataclasses.replace`.

    precisions: ascending; a precision's number is the weight width of the inner layers at it.
    activation_bits: precision -> width of inner layers' inputs.
    per_channel: one weight step an output channel (else one a tensor).
    activation: None keeps activations in float (weight-only).
    edge_bits: width of first and last layers' weights and inputs at every precision; None keeps these layers in float.
    distill: objective against the next higher precision in joint training, "cosine" or None.
    """

    name: str
    description: str
    precisions: tuple[int, ...]
    weight: Part
    activation: Part | None
    activation_bits: Mapping[int, int]
    per_channel: bool = False
    edge_weight: Part = Part("lsq", "weight")
    edge_activation: Part = Part("lsq", "activation")
    edge_bits: int | None = 8
    distill: str | None = "cosine"

    def __post_init__(self) -> None:
        p = self.precisions
        if not p or list(p) != sorted(set(p)) or p[0] < 1 or p[-1] > 8:
            raise ValueError(f"Recipe {self.name!r}: precisions must be ascending and within 1..8, got {p}")
        if self.activation is not None and set(self.activation_bits) != set(p):
            raise ValueError(
                f"Recipe {self.name!r}: activation_bits must have the keys {p}, got {sorted(self.activation_bits)}"
            )
        for precision, width in self.activation_bits.items():
            if not isinstance(width, int) or not 1 <= width <= 8:
                raise ValueError(f"Recipe {self.name!r}: activation width must be 1..8, got {width!r} at {precision}")
        if self.edge_bits is not None and not 2 <= self.edge_bits <= 8:
            raise ValueError(f"Recipe {self.name!r}: edge_bits must be 2..8 or None, got {self.edge_bits}")
        if self.distill not in ("cosine", None):
            raise ValueError(f"Recipe {self.name!r}: distill must be 'cosine' or None, got {self.distill!r}")

    def __str__(self) -> str:
        edges = (
            "float" if self.edge_bits is None else f"{self.edge_bits} bits, {self.edge_weight} x {self.edge_activation}"
        )
        widths = ", ".join(f"w{p}a{self.activation_bits.get(p, 'f')}" for p in self.precisions)
        return "\n".join(
            [
                f"{self.name}: {self.description}",
                f"  precisions   {widths}",
                f"  weights      {self.weight}, one step {'an output channel' if self.per_channel else 'a tensor'}",
                f"  activations  {self.activation or 'float'}",
                f"  edges        {edges}",
                "  batch norm   statistics and affine of its own at every precision",
                f"  distillation {self.distill or 'none'}",
            ]
        )


@dataclass(frozen=True)
class RecipeRecord:
    """A registered recipe: a function that makes it, and its fields."""

    name: str
    description: str
    make: Callable[..., Recipe]


_RECORDS: dict[str, RecipeRecord] = {}


def register(name: str, description: str) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:
    """Decorator: make a recipe function available by name."""

    def add(make: Callable[..., Recipe]) -> Callable[..., Recipe]:
        if name in _RECORDS:
            raise ValueError(f"register: a recipe named {name!r} exists")
        _RECORDS[name] = RecipeRecord(name, description, make)
        return make

    return add


def names() -> tuple[str, ...]:
    """Names of all registered recipes, sorted."""
    return tuple(sorted(_RECORDS))


def describe(name: str) -> RecipeRecord:
    """The record of a recipe. ValueError if there is none, naming the nearest."""
    if name not in _RECORDS:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no recipe named {name!r}; there are: {', '.join(names())}{hint}")
    return _RECORDS[name]


def get(name: str, **fields: Any) -> Recipe:
    """Make a recipe by name. ValueError on unknown names and fields."""
    record = describe(name)
    known = list(inspect.signature(record.make).parameters)
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"recipe {name!r} has no field {', '.join(map(repr, unknown))}; it has: {', '.join(known)}")
    return record.make(**fields)
