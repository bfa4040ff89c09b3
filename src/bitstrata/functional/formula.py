"""What a fake quantizer computes: tensor expressions to read, and the same for kernels that do it in one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool]  # whether those of x, step and extra are wanted
LARGEST_CODE = 256  # of what kernels take: whole in bfloat16 too
EPS = 1e-8  # smallest step used: a step that training drives through zero must not flip or blow up the grid


def positive(step: Tensor) -> Tensor:
    """The step as a divisor: at least 1e-8, and 0-d when it is one number.

    A 0-d float32 step keeps bfloat16 inputs in bfloat16 while each operation still computes in float32 and rounds once.
    """
    safe = step.clamp_min(EPS)
    return safe.reshape(()) if safe.numel() == 1 else safe


@dataclass(frozen=True)
class Rule:
    """The same for kernels; engine/include/bitstrata/fake_kernels.h has the formulas of each `grid`.

    lo, hi: codes at the source width. shift: source width less the width. add: value = scale (code + add), where the
    grid does not fix it; slope_add: the same in the gradient of the step. open_range: a value on a bound is outside.
    everywhere: gradients pass outside too. calibrated: elements inside count in the gradient of a clipping level.
    factor: of x, or the width of the sigmoids. rounded: x factor rounded is what is rounded. gain: of the gradient.
    """

    grid: str
    lo: int
    hi: int
    shift: int = 0
    add: float = 0.0
    slope_add: float = 0.0
    open_range: bool = False
    everywhere: bool = False
    calibrated: bool = False
    factor: float = 1.0
    rounded: float = 1.0
    gain: float = 1.0


@dataclass(frozen=True)
class Formula(ABC):
    """A fake quantizer of x by a step (or clipping level) and, for some, an extra parameter of the step's shape.

    A subclass is a frozen dataclass of numbers; `name` tells it from the others in graphs. What `value` and `gradients`
    compute is the definition, `rule` says the same to kernels: values and gradients of x equal to the last bit, sums to
    their rounding.

    A formula whose first part is torch's alone, such as a transcendental function of x, has it in `prepared`; all else
    sees what that returns. Gradients of x are those of the x before it, in the dtype of the x after it.
    """

    name: ClassVar[str]
    narrows: ClassVar[bool] = False  # x / step of a bfloat16 x and one step, or bfloat16 steps, is bfloat16
    takes_extra: ClassVar[bool] = False
    half_steps: ClassVar[bool] = False  # kernels take bfloat16 steps too

    def prepared(self, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """What stands for x and step in the other methods and in kernels."""
        return x, step

    def kernel_needs(self, needs: Needs) -> Needs:
        """The gradients that kernels are asked for where `needs` are wanted."""
        return needs

    def completed(self, found: Gradients, x: Tensor, step: Tensor) -> Gradients:
        """The gradients from those that kernels found for `kernel_needs`."""
        return found

    @abstractmethod
    def value(self, x: Tensor, step: Tensor, extra: Tensor | None) -> Tensor:
        """The fake-quantized x, in x's dtype."""

    @abstractmethod
    def gradients(
        self, grad: Tensor, x: Tensor, step: Tensor, extra: Tensor | None, *, needs: Needs, factor: float
    ) -> Gradients:
        """Those of x, step and extra that are needed; the last two times `factor`, in their parameters' dtypes."""

    @abstractmethod
    def rule(self) -> Rule:
        """What kernels are told. Raises ValueError where they cannot do it."""

    def numbers(self) -> list[float]:
        """The fields as floats, for a graph's node."""
        return [float(v) for v in astuple(self)]


FORMULAS: dict[str, type[Formula]] = {}


def register_formula(cls: type[Formula]) -> type[Formula]:
    """Make a formula known by its name."""
    FORMULAS[cls.name] = cls
    return cls


@lru_cache(maxsize=1024)
def restore(name: str, numbers: tuple[float, ...]) -> Formula:
    """The formula that `name` and `numbers()` stand for.

    Raises:
        ValueError: an unknown name, or numbers that are not its own.
    """
    cls = FORMULAS.get(name)
    if cls is None or len(fields(cls)) != len(numbers):
        raise ValueError(
            f"fake_quantize: {name!r} with {len(numbers)} numbers is no formula; there are {', '.join(FORMULAS)}"
        )
    types: dict[str, Any] = {"int": int, "bool": bool, "float": float}
    return cls(*(types[str(f.type)](v) for f, v in zip(fields(cls), numbers, strict=True)))


@lru_cache(maxsize=1024)
def rule_of(formula: Formula) -> Rule | None:
    """Its rule, or None if kernels do not do it, as with codes larger than they take."""
    try:
        rule = formula.rule()
    except ValueError:
        return None
    return rule if max(-rule.lo, rule.hi) <= LARGEST_CODE and rule.lo <= rule.hi else None
