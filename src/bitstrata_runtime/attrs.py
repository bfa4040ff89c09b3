"""Typed, checked access to the attributes of nodes.

Validation and derivation both read attributes through these functions, so what was checked is what is used.
"""

from __future__ import annotations

from .errors import ProgramError
from .program import Node

MAX_EXTENT = 1 << 16  # of a kernel, stride, dilation or padding
MAX_ELEMENTS = 1 << 28  # of one value, padding included


def node_error(node: Node, message: str) -> ProgramError:
    """A ProgramError that names the node."""
    return ProgramError(f"node {node.name!r} ({node.op}): {message}")


def integers(node: Node, key: str, count: int, low: int, high: int = MAX_EXTENT) -> tuple[int, ...]:
    """Attribute `key`: a list of `count` integers in [low, high]."""
    value = node.attrs[key]
    if not isinstance(value, (list, tuple)) or len(value) != count or not all(_is_int(v, low, high) for v in value):
        raise node_error(node, f"attribute {key!r} = {value!r}: must be {count} integers in [{low}, {high}]")
    return tuple(value)


def integer(node: Node, key: str, low: int, high: int) -> int:
    """Attribute `key`: one integer in [low, high]."""
    value = node.attrs[key]
    if not _is_int(value, low, high):
        raise node_error(node, f"attribute {key!r} = {value!r}: must be an integer in [{low}, {high}]")
    return int(value)


def _is_int(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def extents(node: Node, key: str) -> tuple[int, int]:
    """Attribute `key`: positive (height, width), as of a kernel or stride."""
    height, width = integers(node, key, 2, 1)
    return height, width


def padding(node: Node) -> tuple[int, int, int, int]:
    """Attribute "padding": top, bottom, left, right."""
    top, bottom, left, right = integers(node, "padding", 4, 0)
    return top, bottom, left, right


def margins(node: Node, key: str) -> tuple[int, int]:
    """Attribute `key` of a pad: how much before and after."""
    before, after = integers(node, key, 2, 0)
    return before, after


def clip_bounds(node: Node) -> tuple[float | None, float | None]:
    """Attribute "clip": real bounds, None where there is none. Without the attribute, (None, None)."""
    value = node.attrs.get("clip", (None, None))
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(_is_bound(v) for v in value):
        raise node_error(node, f"attribute 'clip' = {value!r}: must be two numbers, each finite or None")
    low, high = (None if v is None else float(v) for v in value)
    if low is not None and high is not None and low > high:
        raise node_error(node, f"attribute 'clip' = {value!r}: the lower bound exceeds the upper one")
    return low, high


def _is_bound(value: object) -> bool:
    # Far beyond any activation, and far enough from infinity for a division by a step.
    return value is None or (isinstance(value, (int, float)) and type(value) is not bool and abs(value) <= 1e30)


def slice_bounds(node: Node, key: str, size: int) -> tuple[int, int, int]:
    """Attribute `key` of a slice: (start, stop, step) within an axis of `size`."""
    start, stop, step = integers(node, key, 3, 0, MAX_ELEMENTS)
    if not start < stop <= size or step < 1:
        raise node_error(
            node,
            f"attribute {key!r} = {node.attrs[key]!r}: must be [start, stop, step] with "
            f"0 <= start < stop <= {size} (the size of the input's axis) and step >= 1",
        )
    return start, stop, step


def affine_names(node: Node) -> tuple[str, ...]:
    """Attribute "affine": names of entries of `Program.affines`, in order of application."""
    value = node.attrs["affine"]
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise node_error(node, f"attribute 'affine' = {value!r}: must be a list of names of affines")
    return tuple(value)
