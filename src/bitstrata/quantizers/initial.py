"""Rules for initial step sizes, shared by all quantizers with a learned step.

| rule | weights: step a row | activations: statistic, step |
|---|---|---|
| "mse" | c std(w), c minimises E(w - Q(w))^2 on N(0,1) (UniQ 4.2) | sqrt(2 mean x^2), times c of a half Gaussian |
| "lsq" | 2 mean|w| / sqrt(Q_P) (LSQ 2.1) | mean|x|, 2 . / sqrt(Q_P) |
| "minmax" | max|w| / largest level | max|x|, . / Q_P |
| "vertical" | 2 mean|w| / sqrt(2^n - 1) (vertical layering 4.4) | |
| "three_sigma" | max(|mean - 3 std|, |mean + 3 std|) / 2^(b-1) (LSQ+ 3.2) | |
| "paper_bits" | | max|x|, . / (2^(b+1) - 1) (vertical layering 4.4) |
| a number | that step | that step, without data |

Source papers name these for their own quantizers; here any quantizer takes any rule that fits its levels.
"""

from __future__ import annotations

from torch import Tensor

from ..functional.steps import optimal_step

Rule = str | float

WEIGHT_RULES = ("mse", "lsq", "minmax", "vertical", "three_sigma")
ACTIVATION_RULES = ("mse", "lsq", "minmax", "paper_bits")
SMALLEST = 1e-6
#: The statistic of activations is the mean of this power of |x|, and its root; 0 where it is the maximum.
POWER = {"mse": 2, "lsq": 1, "minmax": 0, "paper_bits": 0}


def check_rule(owner: str, rule: Rule, allowed: tuple[str, ...]) -> Rule:
    """The rule, if it is one of `allowed` or a positive number; ValueError naming `owner` otherwise."""
    if isinstance(rule, int | float) and not isinstance(rule, bool) and rule > 0:
        return float(rule)
    if rule not in allowed:
        raise ValueError(f"{owner}: init must be one of {', '.join(allowed)} or a positive step, got {rule!r}")
    return rule


def weight_step(rule: Rule, rows: Tensor, lo: int, hi: int, offset: float = 0.0) -> Tensor:
    """Initial step of each row, at least 1e-6.

    Args:
        rule: see the module's table.
        rows: (rows, elements), the weights that share a step.
        lo, hi, offset: the grid's codes and offset: levels are step * (code + offset).

    Returns:
        (rows,) in the dtype of `rows`.

    Raises:
        ValueError: unknown rule, or "lsq" for a grid whose largest code is 0.
    """
    check_rule("weight_step", rule, WEIGHT_RULES)
    if isinstance(rule, float | int):
        return rows.new_full((rows.shape[0],), float(rule))
    if rule == "mse":
        step = optimal_step(tuple(c + offset for c in range(lo, hi + 1))) * deviation(rows)
    elif rule == "lsq":
        if hi < 1:
            raise ValueError("weight_step: init='lsq' divides by sqrt(Q_P), which is 0 at 1 bit; use 'mse'")
        step = 2 * rows.abs().mean(dim=1) / hi**0.5
    elif rule == "vertical":
        step = 2 * rows.abs().mean(dim=1) / (hi - lo) ** 0.5
    elif rule == "minmax":
        step = rows.abs().amax(dim=1) / max(hi + offset, 0.5)
    else:
        mean, spread = rows.mean(dim=1), 3 * deviation(rows)
        step = ((mean - spread).abs().maximum((mean + spread).abs())) / max(-lo, 1)
    return step.clamp_min(SMALLEST)


def deviation(rows: Tensor) -> Tensor:
    """Standard deviation (unbiased) a row; the root mean square where all elements are (nearly) alike."""
    power = rows.square().mean(dim=1).sqrt()
    spread = rows.std(dim=1) if rows.shape[1] > 1 else power
    return spread.where(spread > 1e-3 * power, power)


def activation_statistic(rule: Rule, x: Tensor, signed: bool) -> Tensor:
    """What the initial step is proportional to, one element; calibration keeps its maximum over batches."""
    if rule == "mse":
        power = x.square().mean()
        return (power if signed else 2 * power).sqrt()
    if rule == "lsq":
        return x.abs().mean()
    return x.abs().amax()


def activation_step(rule: Rule, statistic: Tensor, lo: int, hi: int) -> Tensor:
    """Initial step for a statistic of `activation_statistic`, on codes lo..hi."""
    if isinstance(rule, float | int):
        return statistic.new_full((), float(rule))
    if rule == "mse":
        levels = tuple(float(c) for c in range(lo, hi + 1))
        return optimal_step(levels, rectified=lo >= 0) * statistic
    if rule == "lsq":
        return 2 * statistic / hi**0.5
    return statistic / (hi if rule == "minmax" else 2 * hi + 1)
