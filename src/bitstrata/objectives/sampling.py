"""Which precisions a step of joint training runs: all of them, or a sample that costs less."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SAMPLINGS = ("all", "sandwich", "pair")
_STREAM = 0x7072656373616D70  # keeps these draws apart from those of anything else that takes the same seed


@dataclass(frozen=True)
class PrecisionSampler:
    """Precisions of every step, with the weight that each one's loss has in the step.

        sampler = PrecisionSampler(bs.precisions(model), "sandwich", seed=0)
        for step, (x, y) in enumerate(batches):
            joint_backward(model, x, y, precisions=sampler.at(step))

    "all": every precision, weight 1. "sandwich": the narrowest and the widest, weight 1, and one of the m between them,
    each with probability 1/m and weight m. "pair": the widest, weight 1, and one of the m others likewise. What is
    drawn stands for all n precisions: the weights of a step add up to n, and since m * 1/m = 1, the expectation over
    the draws of sum_b weight_b dL_b is the full sum of dL_b. Slimmable networks, which the sandwich is from, add the
    three without weights; what they minimise counts a precision between the ends m times less than an end. Where there
    is nothing to choose from, all precisions are trained.

    Where a precision's teacher is the next wider one ("next"), that is the next wider of the sampled ones, so that the
    narrowest learns from the one drawn. What belongs to a precision alone (normalization, activation steps, ratios)
    moves only in steps that draw it: it has no gradient otherwise, optimizers leave it and its momentum alone, and its
    batch statistics are not updated.

    The draw of a step is a function of (seed, step): the same after a resumption, on every rank, and for every part of
    a batch whose gradients are accumulated.

    Source: Yu and Huang, "Universally slimmable networks and improved training techniques", 2019, section 3.3; for bit
    widths, with these weights, ours.

    Args:
        precisions: any order, without repetition.
        sampling: "all", "sandwich" or "pair".
        seed: of the draws.

    Raises:
        ValueError: no precisions, a repeated one, or an unknown sampling.
    """

    precisions: tuple[int, ...]
    sampling: str = "all"
    seed: int = 0

    def __init__(self, precisions: Iterable[int], sampling: str = "all", seed: int = 0) -> None:
        found = tuple(sorted(precisions))
        if not found or len(set(found)) < len(found):
            raise ValueError(f"PrecisionSampler: precisions must be one or more different ones, got {found}")
        if sampling not in SAMPLINGS:
            raise ValueError(f"PrecisionSampler: sampling must be one of {SAMPLINGS}, got {sampling!r}")
        object.__setattr__(self, "precisions", found)
        object.__setattr__(self, "sampling", sampling)
        object.__setattr__(self, "seed", int(seed))

    def at(self, step: int) -> dict[int, float]:
        """Precision -> weight at a step, widest first; the weights add up to the number of all precisions.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"PrecisionSampler: step must not be negative, got {step}")
        always = {"all": self.precisions, "sandwich": self.precisions[:1] + self.precisions[-1:]}.get(
            self.sampling, self.precisions[-1:]
        )
        others = tuple(p for p in self.precisions if p not in always)
        weights = dict.fromkeys(always, 1.0)
        if others:
            weights[others[self._draw(step, len(others))]] = float(len(others))
        return {p: weights[p] for p in sorted(weights, reverse=True)}

    def _draw(self, step: int, count: int) -> int:
        """Uniform in 0..count - 1, from Philox at counter `step` under the seed as key.

        The raw words are used because numpy fixes them for all its versions, unlike what `Generator` makes of them.
        """
        key = np.array([self.seed % 2**64, _STREAM], dtype=np.uint64)
        word = int(np.random.Philox(key=key, counter=np.array([step, 0, 0, 0], dtype=np.uint64)).random_raw())
        return word * count >> 64
