"""Channel groups with power-of-two ranges, the optimal groups they stand in for, and small integers packed into bytes.

Source: Guo, Liu et al., "Towards accurate and efficient sub-8-bit integer training", section 4.1, eqs. 1 to 3. There
the ranges of the groups are tau_0 2^-e, e = 0..N_G - 1, read so that the first group holds the widest channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_GROUPS = 8
OBJECTIVES = ("ratio", "variance")


def check_groups(groups: int, where: str) -> None:
    """ValueError, naming `where`, unless groups is in 1..8."""
    if isinstance(groups, bool) or not isinstance(groups, int) or not 1 <= groups <= MAX_GROUPS:
        raise ValueError(f"{where}: groups must be an integer in 1..{MAX_GROUPS}, got {groups!r}")


def channel_ranges(x: Tensor, axis: int) -> Tensor:
    """r_i = max |x| of each channel along `axis`, over all other dimensions: (x.shape[axis],), in x's dtype."""
    rows = x.detach().abs()
    others = [d for d in range(x.dim()) if d != axis % x.dim()]
    return rows.amax(dim=others) if others else rows


def group_exponents(ranges: Tensor, groups: int = 4) -> Tensor:
    """e_i = max{e in 0..N_G - 1: r_i <= tau_0 2^-e}, tau_0 = max r: eqs. 2 and 3.

    The bound belongs to the narrower group (r = tau_0 / 2 has e = 1), and the last group takes every narrower channel,
    those of zeros included.

    Args:
        ranges: (channels,) floating, finite, not negative.
        groups: N_G, 1..8.

    Returns:
        uint8 (channels,).

    Raises:
        ValueError: ranges empty, of another dimension, negative or not finite; groups out of range.
    """
    check_groups(groups, "group_exponents")
    if ranges.dim() != 1 or ranges.numel() == 0:
        raise ValueError(f"group_exponents: ranges must be (channels,), not empty, got shape {tuple(ranges.shape)}")
    if not bool(ranges.isfinite().all()) or bool((ranges < 0).any()):
        raise ValueError("group_exponents: ranges must be finite and not negative")
    wide = ranges.detach().to(torch.promote_types(ranges.dtype, torch.float32))
    largest = wide.amax()
    exponents = torch.zeros_like(wide, dtype=torch.uint8)
    for e in range(1, groups):
        # r 2^e <= tau_0 instead of r <= tau_0 2^-e: scaling up never loses bits, and an overflow compares correctly
        exponents += (wide * 2.0**e <= largest).to(torch.uint8)
    return exponents


@dataclass(frozen=True)
class OptimalGroups:
    """A grouping of least cost.

    Attributes:
        index: uint8 (channels,), the group of each channel, the widest group first.
        thresholds: float64 (groups in use,), tau_g, the largest range in each group.
        cost: the objective's value.
    """

    index: Tensor
    thresholds: Tensor
    cost: float


def grouping_cost(ranges: Tensor, taus: Tensor, objective: str = "ratio") -> float:
    """What a grouping costs when channel i is quantized with range tau_i.

    "ratio": sum_i tau_i / r_i, the objective of eq. 1. "variance": sum_i tau_i^2, the bound of the stochastic
    rounding's variance up to a factor (appendix B). Channels of zeros cost nothing.

    Args:
        ranges, taus: (channels,).

    Raises:
        ValueError: unknown objective; shapes that differ.
    """
    _check_objective(objective, "grouping_cost")
    if ranges.shape != taus.shape:
        raise ValueError(f"grouping_cost: ranges {tuple(ranges.shape)} and taus {tuple(taus.shape)} must agree")
    used = ranges > 0
    r, t = ranges[used].double(), taus[used].double()
    return float((t / r).sum() if objective == "ratio" else t.square().sum())


def optimal_groups(ranges: Tensor, groups: int = 4, objective: str = "ratio") -> OptimalGroups:
    """The grouping into at most N_G groups that minimizes eq. 1, by dynamic programming over the sorted ranges.

    Some optimal grouping consists of runs of the sorted ranges, and the range of a group is best its largest. With the
    ranges in descending order, best[g][j] = min_i best[g-1][i] + cost(i, j), cost of the run i..j-1. Time O(N_G
    channels^2): a reference to measure power-of-two groups against.

    Args:
        ranges: (channels,) floating, finite, not negative. Channels of zeros join the last group; they cost nothing.
        groups: N_G, 1..8.
        objective: "ratio" (eq. 1) or "variance" (sum of tau^2).

    Raises:
        ValueError: as group_exponents; unknown objective.
    """
    group_exponents(ranges, groups)  # checks both
    _check_objective(objective, "optimal_groups")
    r = ranges.detach().double().cpu().numpy()
    order = np.argsort(-r, kind="stable")
    positive = r[order][r[order] > 0]
    if positive.size == 0:
        index = torch.zeros(r.size, dtype=torch.uint8)
        return OptimalGroups(index, torch.zeros(1, dtype=torch.float64), 0.0)
    bounds = _cut(positive, groups, objective)
    index_np = np.full(r.size, len(bounds) - 1, dtype=np.uint8)
    for g, (begin, end) in enumerate(bounds):
        index_np[order[begin:end]] = g
    thresholds = torch.from_numpy(positive[[begin for begin, _ in bounds]].copy())
    index = torch.from_numpy(index_np)
    cost = grouping_cost(torch.from_numpy(r), thresholds[index.long()], objective)
    return OptimalGroups(index, thresholds, cost)


def _check_objective(objective: str, where: str) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"{where}: objective must be 'ratio' or 'variance', got {objective!r}")


def _cut(r: NDArray[np.float64], groups: int, objective: str) -> list[tuple[int, int]]:
    """The runs (begin, end) of the descending ranges r that make up a best grouping."""
    n = r.size
    # normalized by the largest range: neither squares nor reciprocals overflow for the ranges of float32
    t = r / r[0]
    weights, power = (1 / t, t) if objective == "ratio" else (np.ones(n), t * t)
    total = np.concatenate(([0.0], np.cumsum(weights)))
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    choices: list[NDArray[np.int64]] = []
    for _ in range(min(groups, n)):
        following, choice = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64)
        for j in range(1, n + 1):
            costs = best[:j] + power[:j] * (total[j] - total[:j])
            choice[j] = int(np.argmin(costs))
            following[j] = costs[choice[j]]
        best = following
        choices.append(choice)
    bounds: list[tuple[int, int]] = []
    end = n
    for choice in reversed(choices):  # a run more never costs more, so the best grouping uses all that are allowed
        begin = int(choice[end])
        bounds.append((begin, end))
        end = begin
    return bounds[::-1]


def pack_bits(values: Tensor, width: int) -> Tensor:
    """Packs unsigned integers of `width` bits without gaps; value i takes bits i*width.. of the stream, low bits first.

    Args:
        values: integers in 0..2^width - 1, any shape, read in row-major order.
        width: 0..8; 0 takes no bytes.

    Returns:
        uint8 (ceil(count * width / 8),), unused bits zero.
    """
    flat = values.reshape(-1).to(torch.uint8)
    if width == 0:
        return flat.new_empty(0)
    if width == 8:
        return flat.clone()
    per = 8 // width if 8 % width == 0 else 8  # values that end at a byte's edge together
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % per)).reshape(-1, per)
    size = (flat.numel() * width + 7) // 8
    if per < 8 or width == 1:
        packed = rows[:, 0].clone()
        for i in range(1, per):
            packed |= rows[:, i] << (i * width)
        return packed
    word = torch.zeros(len(rows), dtype=torch.int64, device=flat.device)
    for i in range(per):
        word |= rows[:, i].to(torch.int64) << (i * width)
    return (
        torch.stack([(word >> (8 * j) & 255).to(torch.uint8) for j in range(width)], dim=1).reshape(-1)[:size].clone()
    )


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """Inverse of pack_bits: uint8 (count,).

    Raises:
        ValueError: `packed` is not uint8 or has another length than pack_bits gives.
    """
    size = (count * width + 7) // 8
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        raise ValueError(
            f"unpack_bits: {count} values of {width} bits take {size} bytes, "
            f"got {tuple(packed.shape)} of {packed.dtype}"
        )
    if width == 0:
        return packed.new_zeros(count)
    if width == 8:
        return packed.clone()
    mask = (1 << width) - 1
    if 8 % width == 0:
        parts = [(packed >> (i * width)) & mask for i in range(8 // width)]
        return torch.stack(parts, dim=1).reshape(-1)[:count].clone()
    rows = torch.nn.functional.pad(packed, (0, -size % width)).reshape(-1, width)
    word = torch.zeros(len(rows), dtype=torch.int64, device=packed.device)
    for j in range(width):
        word |= rows[:, j].to(torch.int64) << (8 * j)
    parts = [(word >> (i * width) & mask).to(torch.uint8) for i in range(8)]
    return torch.stack(parts, dim=1).reshape(-1)[:count].clone()


def group_bits(groups: int) -> int:
    """ceil(log2 N_G): the bits of a group's number; 0 for a single group."""
    check_groups(groups, "group_bits")
    return (groups - 1).bit_length()


def pack_groups(exponents: Tensor, groups: int) -> Tensor:
    """Packs (channels,) exponents 0..groups - 1 into ceil(log2 groups) bits each: uint8 (ceil(channels * bits / 8),).

    Raises:
        ValueError: groups out of range; an exponent of groups or more, or below 0.
    """
    width = group_bits(groups)
    if exponents.numel() and not 0 <= int(exponents.min()) <= int(exponents.max()) < groups:
        raise ValueError(
            f"pack_groups: exponents must be in 0..{groups - 1}, got {int(exponents.min())}..{int(exponents.max())}"
        )
    return pack_bits(exponents, width)


def unpack_groups(packed: Tensor, groups: int, channels: int) -> Tensor:
    """Inverse of pack_groups: uint8 (channels,).

    Raises:
        ValueError: a length that does not belong to `channels`; an exponent of groups or more.
    """
    exponents = unpack_bits(packed, group_bits(groups), channels)
    if channels and int(exponents.max()) >= groups:
        raise ValueError(
            f"unpack_groups: found exponent {int(exponents.max())}, largest for {groups} groups is {groups - 1}"
        )
    return exponents
