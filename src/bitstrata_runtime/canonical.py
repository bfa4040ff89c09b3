"""Canonical JSON: one byte string for one value, read strictly (spec/artifact.md, section 2)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from .errors import ArtifactError

MAX_DEPTH = 32
_INT_LIMIT = 1 << 63
_NUMBER_LENGTH = 32  # the longest shortest-form double has 24 characters


def dump(value: Any) -> bytes:
    """The canonical bytes of a plain value (one that `plain` or `load` returned)."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8")


def plain(value: Any, where: str = "value", depth: int = 0) -> Any:
    """`value` as plain JSON types: tuples become lists, numpy scalars Python numbers.

    Raises ArtifactError, naming the place, for other types, keys that are not strings, numbers that are not finite,
    integers outside 64 bits, text that is not Unicode, and nesting deeper than MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise ArtifactError(f"{where[:80]}: nested deeper than {MAX_DEPTH}")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, int):
        if not -_INT_LIMIT <= value < _INT_LIMIT:
            raise ArtifactError(f"{where}: integers have 64 bits, got one of {value.bit_length()}")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ArtifactError(f"{where}: numbers are finite, got {value}")
        return float(value)
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ArtifactError(f"{where}: keys are strings, got {key!r}")
        return {_text(key, where): plain(item, f"{where}.{key[:80]}", depth + 1) for key, item in value.items()}
    raise ArtifactError(f"{where}: {type(value).__name__} is not a JSON value")


def load(data: bytes, where: str) -> Any:
    """The value whose canonical form is `data`. Raises ArtifactError, naming `where`, for any other bytes.

    Rejected: text that is not UTF-8 or not JSON, repeated keys, NaN and infinities, integers outside 64 bits, nesting
    deeper than MAX_DEPTH, and every spelling of a value other than its canonical one.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
        _check_depth(value)
        canonical = dump(value)
    except ArtifactError as error:
        raise ArtifactError(f"{where}: {error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{where}: is not JSON in UTF-8: {error}") from None
    except UnicodeEncodeError:
        raise ArtifactError(f"{where}: text holds half of a surrogate pair") from None
    except RecursionError:
        raise ArtifactError(f"{where}: nested deeper than {MAX_DEPTH}") from None
    if canonical != data:
        raise ArtifactError(f"{where}: is not in canonical form (sorted keys, no white space, shortest numbers)")
    return value


def _text(value: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ArtifactError(f"{where}: text holds half of a surrogate pair, {value[:80]!a}") from None
    return str(value)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = (
            item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)
        )
        level = [child for container in containers for child in container]
        if not level:
            return
    raise ArtifactError(f"nested deeper than {MAX_DEPTH}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ArtifactError(f"key {key[:80]!r} occurs twice in one object")
        found[key] = value
    return found


def _integer(text: str) -> int:
    if len(text) > _NUMBER_LENGTH:
        raise ArtifactError(f"number of {len(text)} digits, starting {text[:_NUMBER_LENGTH]}")
    value = int(text)
    if not -_INT_LIMIT <= value < _INT_LIMIT:
        raise ArtifactError(f"integers have 64 bits, got {text}")
    return value


def _float(text: str) -> float:
    if len(text) > _NUMBER_LENGTH:
        raise ArtifactError(f"number of {len(text)} characters, starting {text[:_NUMBER_LENGTH]}")
    value = float(text)
    if not math.isfinite(value):
        raise ArtifactError(f"number {text} is beyond double precision")
    return value


def _constant(text: str) -> NoReturn:
    raise ArtifactError(f"numbers are finite, got {text}")
