"""The registry of quantizers: frozen records, listable, built by name with checked options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .base import Quantizer

Q = TypeVar("Q", bound=type[Quantizer])


@dataclass(frozen=True)
class QuantizerRecord:
    """A registered quantizer. role is "weight", "activation" or "input"; options are its own keyword arguments."""

    name: str
    role: str
    description: str
    cls: type[Quantizer]
    options: tuple[str, ...]


_RECORDS: dict[tuple[str, str], QuantizerRecord] = {}
_COMMON = {"self", "bits", "channels", "signed", "shared"}  # set by quantize_, not by a recipe


def register(name: str, role: str, description: str) -> Callable[[Q], Q]:
    """Class decorator: make a quantizer available to recipes under `name` for `role`."""

    def add(cls: Q) -> Q:
        key = (role, name)
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


def build(name: str, role: str, options: Mapping[str, Any], **common: Any) -> Quantizer:
    """Make a quantizer. ValueError on an option that it does not have."""
    record = describe(name, role)
    unknown = sorted(set(options) - set(record.options))
    if unknown:
        raise ValueError(
            f"{role} quantizer {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"it has: {', '.join(record.options) or 'none'}"
        )
    return record.cls(**common, **options)
