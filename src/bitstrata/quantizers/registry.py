"""The registry of quantizers: frozen records, listable, built by name with checked options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from .base import Quantizer, WeightQuantizer

Q = TypeVar("Q", bound=type[nn.Module])
ROLES = ("weight", "activation", "input", "transform", "rescale", "gradient", "integer")


@dataclass(frozen=True)
class QuantizerRecord:
    """A registered quantizer or weight transform; options are its own keyword arguments.

    role: "weight", "activation", "input", "transform" (of a weight, before its quantizer), "rescale" (of a weight
    quantizer's grid), "gradient" (of a layer's output gradient) or "integer" (weight or activation of layers that train
    in integers, which quantize both themselves).
    """

    name: str
    role: str
    description: str
    cls: type[nn.Module]
    options: tuple[str, ...]


_RECORDS: dict[tuple[str, str], QuantizerRecord] = {}
_COMMON = {"self", "bits", "channels", "signed", "shared", "inner", "edge"}  # set by quantize_, not by a recipe


def register(name: str, role: str, description: str) -> Callable[[Q], Q]:
    """Class decorator: make a quantizer available to recipes under `name` for `role`."""

    def add(cls: Q) -> Q:
        key = (role, name)
        if role not in ROLES:
            raise ValueError(f"register: role must be one of {', '.join(ROLES)}, got {role!r}")
        if key in _RECORDS:
            raise ValueError(f"register: a {role} quantizer named {name!r} exists: {_RECORDS[key].cls.__name__}")
        options = tuple(p for p in inspect.signature(cls.__init__).parameters if p not in _COMMON)
        _RECORDS[key] = QuantizerRecord(name, role, description, cls, options)
        return cls

    return add


def names(role: str) -> tuple[str, ...]:
    """Registered names for a role, sorted."""
    return tuple(sorted(name for r, name in _RECORDS if r == role))


def describe(name: str, role: str) -> QuantizerRecord:
    """The record of a quantizer. ValueError if there is none, naming the nearest."""
    try:
        return _RECORDS[role, name]
    except KeyError:
        near = difflib.get_close_matches(name, names(role), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no {role} quantizer named {name!r}; there are: {', '.join(names(role))}{hint}") from None


def check_options(name: str, role: str, options: Mapping[str, Any]) -> QuantizerRecord:
    """The record of a quantizer or transform that has all of `options`; ValueError if it does not."""
    record = describe(name, role)
    unknown = sorted(set(options) - set(record.options))
    if unknown:
        raise ValueError(
            f"{role} {'quantizer ' if role != 'transform' else ''}{name!r} has no option "
            f"{', '.join(map(repr, unknown))}; it has: {', '.join(record.options) or 'none'}"
        )
    return record


def build(name: str, role: str, options: Mapping[str, Any], **common: Any) -> Quantizer:
    """Make a quantizer. ValueError on an option that it does not have."""
    made = check_options(name, role, options).cls(**common, **options)
    assert isinstance(made, Quantizer)
    return made


def build_transform(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Make a weight transform, a module from weight to weight. ValueError on an option that it does not have."""
    return check_options(name, "transform", options).cls(**options)


def build_rescale(name: str, options: Mapping[str, Any], inner: WeightQuantizer) -> WeightQuantizer:
    """Wrap a weight quantizer so that its grid is rescaled. ValueError on an option that the wrapper does not have."""
    made = check_options(name, "rescale", options).cls(inner=inner, **options)
    assert isinstance(made, WeightQuantizer)
    return made


def build_gradient(name: str, options: Mapping[str, Any], *, edge: bool) -> nn.Module:
    """Make a gradient quantizer. ValueError on an option that it does not have or that is out of range."""
    return check_options(name, "gradient", options).cls(edge=edge, **options)
