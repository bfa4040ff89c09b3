"""C text of constant tables: arrays and designated initializers, with names that do not repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_TYPES = {
    "uint8": "uint8_t", "int16": "int16_t", "int32": "int32_t", "uint32": "uint32_t", "int64": "int64_t",
}  # fmt: skip


@dataclass
class Tables:
    """Definitions in order; equal arrays are written once. size: bytes of all arrays."""

    text: list[str] = field(default_factory=list)
    size: int = 0
    _known: dict[tuple[str, bytes], str] = field(default_factory=dict)

    def array(self, name: str, values: NDArray[np.generic]) -> str:
        """A static constant array, flat, of a type that _TYPES has; returns the name to use for it."""
        flat = np.ascontiguousarray(values).reshape(-1)
        key = (flat.dtype.name, flat.tobytes())
        if key not in self._known:
            self._known[key] = name
            self.size += flat.nbytes
            self.text.append(f"static const {_TYPES[flat.dtype.name]} {name}[{flat.size}] = {{\n{_lines(flat)}}};\n")
        return self._known[key]

    def struct(self, ctype: str, name: str, fields: Mapping[str, object]) -> str:
        """A static constant structure; returns its address as an expression."""
        self.text.append(f"static const {ctype} {name} = {initializer(fields)};\n")
        return f"&{name}"

    def structs(self, ctype: str, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        """A static constant array of structures."""
        body = "".join(f"  {initializer(row)},\n" for row in rows)
        self.text.append(f"static const {ctype} {name}[{len(rows)}] = {{\n{body}}};\n")


def initializer(fields: Mapping[str, object]) -> str:
    """{.name = value, ...}; fields that are None or 0 are left out, as C makes them so."""
    parts = [f".{name} = {_value(value)}" for name, value in fields.items() if value not in (None, 0)]
    return "{" + ", ".join(parts or ["0"]) + "}"


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return initializer(value)
    if isinstance(value, int | np.integer):
        return _integer(int(value))
    return str(value)


def _integer(value: int, wide: bool = False) -> str:
    if value == -(1 << 31) and not wide:
        return "INT32_MIN"
    if value == -(1 << 63):
        return "INT64_MIN"
    return f"INT64_C({value})" if wide else str(value)


def _lines(flat: NDArray[np.generic]) -> str:
    if flat.dtype == np.uint32:
        words = [f"0x{int(x):08x}u" for x in flat.tolist()]
    else:
        words = [_integer(int(x), flat.dtype == np.int64) for x in flat.tolist()]
    lines, line = [], " "
    for word in words:
        if len(line) + len(word) + 2 > 118:
            lines.append(line)
            line = " "
        line += f" {word},"
    return "\n".join([*lines, line]) + "\n"
