"""The short forms in which recipes take widths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Widths = str | int | Mapping[int, int] | None


def activation_widths(precisions: tuple[int, ...], a: Widths) -> dict[int, int]:
    """Activation width at each precision: "same" as the weights', one for all, a map, or None for float.

    ValueError on anything else.
    """
    if a is None:
        return {}
    if isinstance(a, Mapping):
        return dict(a)
    if a == "same":
        return {p: p for p in precisions}
    if isinstance(a, int) and not isinstance(a, bool):
        return dict.fromkeys(precisions, a)
    raise ValueError(f"recipe: a must be 'same', a width, a map from precision to width, or None, got {a!r}")


def weight_widths(recipe: str, w: Sequence[int]) -> tuple[int, ...]:
    """Widths in ascending order, each once. ValueError on anything that is no whole number."""
    if isinstance(w, str) or not isinstance(w, Iterable):
        raise ValueError(f"{recipe}: weight widths must be several numbers of bits such as (2, 4), got {w!r}")
    w = tuple(w)
    if not all(isinstance(b, int) and not isinstance(b, bool) for b in w):
        raise ValueError(f"{recipe}: weight widths must be whole numbers of bits, got {w}")
    return tuple(sorted(set(w)))
