"""Multiple gradient descent: the convex combination of gradients with the smallest norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ITERATIONS = 250
TOLERANCE = 1e-5


def min_norm_point(
    vectors: Sequence[Tensor] | None = None,
    *,
    gram: Tensor | None = None,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """alpha = argmin ||sum_i alpha_i g_i||^2 over the simplex (alpha_i >= 0, sum alpha_i = 1).

    Frank-Wolfe: starts from the best point on any segment between two vectors, then moves towards the vertex of the
    steepest descent with an exact line search, whose ends 0 and 1 are reached exactly. With two vectors the result is
    exact at once. Source: vertical layering (Wu et al.), eq. 10; Sener and Koltun, 2018, algorithm 2.

    Args:
        vectors: g_i, tensors of one shape and any number of dimensions. Give this or `gram`.
        gram: (n, n) inner products g_i . g_j.
        iterations: most Frank-Wolfe steps.
        tolerance: stop when a step moves alpha by less, in the sum of absolute values.

    Returns:
        alpha, (n,) float64 on the processor.

    Raises:
        ValueError: neither or both of vectors and gram, none of them, other shapes, or values that are not finite.
    """
    products = _gram(vectors, gram)
    alpha = _best_pair(products)
    for _ in range(iterations):
        slopes = products @ alpha
        vertex = int(slopes.argmin())
        keep = _segment(float(alpha @ slopes), float(slopes[vertex]), float(products[vertex, vertex]))
        moved = keep * alpha
        moved[vertex] += 1 - keep
        change = float((moved - alpha).abs().sum())
        alpha = moved
        if change < tolerance:
            break
    return alpha


def _gram(vectors: Sequence[Tensor] | None, gram: Tensor | None) -> Tensor:
    if (vectors is None) == (gram is None):
        raise ValueError("min_norm_point: give either vectors or gram")
    if vectors is not None:
        shapes = sorted({tuple(v.shape) for v in vectors})
        if len(shapes) != 1:
            raise ValueError(f"min_norm_point: vectors must be one or more of one shape, got shapes {shapes}")
        rows = torch.stack([v.detach().to("cpu", torch.float64).reshape(-1) for v in vectors])
        gram = rows @ rows.T
    assert gram is not None
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or not gram.numel():
        raise ValueError(f"min_norm_point: gram must be (n, n) with n >= 1, got {tuple(gram.shape)}")
    products = gram.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(products).all()):
        raise ValueError("min_norm_point: inner products are not finite")
    return products


def _segment(aa: float, ab: float, bb: float) -> float:
    """t of the shortest vector t a + (1 - t) b, 0 <= t <= 1, from the inner products; a itself if a = b."""
    if ab >= aa:
        return 1.0
    if ab >= bb:
        return 0.0
    return (bb - ab) / (aa + bb - 2 * ab)


def _best_pair(products: Tensor) -> Tensor:
    """The shortest combination of two vectors, as alpha."""
    count = len(products)
    best = torch.zeros(count, dtype=torch.float64)
    best[int(products.diagonal().argmin())] = 1.0
    shortest = float(products.diagonal().min())
    for i in range(count):
        for j in range(i + 1, count):
            aa, ab, bb = (float(products[k]) for k in ((i, i), (i, j), (j, j)))
            t = _segment(aa, ab, bb)
            norm = t * t * aa + 2 * t * (1 - t) * ab + (1 - t) ** 2 * bb
            if norm < shortest:
                shortest = norm
                best = torch.zeros(count, dtype=torch.float64)
                best[i], best[j] = t, 1 - t
    return best
