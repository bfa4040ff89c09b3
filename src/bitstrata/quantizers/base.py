"""The one quantizer contract: fake-quantized tensor, codes, and grid, with value = scale * (codes + offset)."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.ranks import joined_elements, power_mean_over_ranks
from ..functional.ste import with_value
from ..functional.uniform import EPS
from .initial import ACTIVATION_RULES, POWER, Rule, activation_statistic, activation_step, check_rule


@dataclass(frozen=True)
class Grid:
    """The values that codes stand for: value = scale * (code + offset), code in [lo, hi].

    scale: one element, or one an output channel, the first dimension of a weight.
    offset: a number, or a tensor broadcastable to the quantized tensor.
    valid: the codes that occur, where the grid leaves out some between lo and hi.
    """

    scale: Tensor
    offset: float | Tensor
    lo: int
    hi: int
    valid: tuple[int, ...] | None = None

    def dequantize(self, codes: Tensor) -> Tensor:
        """scale * (codes + offset), in the scale's dtype and the codes' shape."""
        scale = self.scale if self.scale.numel() == 1 else self.scale.view(-1, *[1] * (codes.dim() - 1))
        return (codes.to(scale.dtype) + self.offset) * scale


@dataclass(frozen=True)
class LayerFacts:
    """What `quantize_` saw of the layer that a quantizer serves.

    kind: "conv" or "linear". normalized: only normalizations read the layer's output. edge: first or last layer.
    """

    kind: str
    normalized: bool
    edge: bool


class Quantizer(nn.Module, ABC):
    """Base of all quantizers; works at the current `precision`, one of `bits`' keys.

    A subclass implements `grid`, `codes`, `init_` and either `surrogate` or `forward`, and names its per-precision
    parameters. The contract, tested for every registered quantizer:
    ``forward(x) == grid(x).dequantize(codes(x))`` exactly, in x's dtype.

    Args:
        bits: precision -> width of the codes at that precision.
        channels: None for one step a tensor; else one step an output channel (weights).
        signed: the codes may be negative. Weights always are; activations are told by what was seen.
    """

    nested = False  # codes at a narrower width are the upper bits of the codes at the widest
    offset = 0.0
    stands_for_relu = False  # an activation quantizer that maps 0 and less to 0, 1 and more to its largest value
    needs_transform: str | None = None  # weight transform without which the grid is meaningless
    shifted = False  # an input grid whose offset is not 0: convolutions pad with the code nearest zero

    def __init__(self, bits: Mapping[int, int], *, channels: int | None = None, signed: bool = True) -> None:
        super().__init__()
        if not bits:
            raise ValueError(f"{type(self).__name__}: bits must name at least one precision")
        for precision, width in bits.items():
            if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= 8:
                raise ValueError(f"{type(self).__name__}: bits must be 1..8, got {width!r} at precision {precision}")
        self.bits = dict(sorted(bits.items()))
        self.channels = channels
        self.signed = signed
        self.precision = max(self.bits)

    @abstractmethod
    def grid(self, x: Tensor | None = None) -> Grid:
        """The grid at the current precision, for the tensor x; only grids that follow the tensor itself need it."""

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x at the current precision: int32, x's shape."""

    @abstractmethod
    def init_(self, x: Tensor) -> None:
        """Set the step sizes from a sample: the weight itself, or a batch of activations (current precision only)."""

    def surrogate(self, x: Tensor) -> Tensor:
        """A differentiable expression, of x's shape and dtype, whose gradient is the quantizer's."""
        raise NotImplementedError(f"{type(self).__name__}: implement surrogate, or override forward")

    def forward(self, x: Tensor) -> Tensor:
        """The fake-quantized tensor: exactly the grid's values for the codes, with the gradient of `surrogate`."""
        with torch.no_grad():
            value = self.grid(x).dequantize(self.codes(x)).to(x.dtype)
            value.masked_fill_(x.isnan(), torch.nan)  # integer codes have no NaN to pass on
        return with_value(self.surrogate(x), value)

    def adapt_(self, facts: LayerFacts) -> None:
        """Told once, by `quantize_`, which kind of layer the quantizer serves."""

    def precision_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Parameters that belong to one precision alone; every other parameter is shared by all precisions."""
        return {}

    @property
    def width(self) -> int:
        """Bits of the codes at the current precision."""
        return self.bits[self.precision]

    def _step_shape(self) -> tuple[int, ...]:
        return (1,) if self.channels is None else (self.channels,)

    def _broadcast(self, step: Tensor, x: Tensor) -> Tensor:
        return step if self.channels is None else step.view(-1, *[1] * (x.dim() - 1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            # A float checkpoint knows nothing of quantizers: keep what is here, which the layer has just set anew.
            state_dict.update({key: value.clone() for key, value in self.state_dict(prefix=prefix).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        widths = sorted(set(self.bits.values()))
        granularity = "tensor" if self.channels is None else f"channel[{self.channels}]"
        return f"bits={widths}, per={granularity}, signed={self.signed}"


class ActivationQuantizer(Quantizer):
    """Base of activation quantizers: steps that are set from the first data seen, one of them a precision.

    While `observing`, every forward raises the current precision's running statistic to that of the batch (UniQ eq. 10:
    the maximum over batches) and sets the step from it before quantizing.

    Args:
        shared: one step for all precisions (edge layers) instead of one a precision.
        numel: "sample" or "batch", the features N that the gradient scale of the step counts.
        init: rule for the initial step, see `initial`; a number fixes it without data.

    With `sync`, which `synchronize_` sets, statistics and N are those of the joined batch of all ranks.
    """

    min_signed_bits = 2  # signed one-bit codes would be {-1, 0}
    sync = False

    initialized: Tensor  # bool, one flag a step
    statistic: Tensor  # running maximum while observing, one a step

    def __init__(
        self,
        bits: Mapping[int, int],
        *,
        signed: bool = False,
        shared: bool = False,
        numel: str = "sample",
        init: Rule = "lsq",
    ) -> None:
        super().__init__({p: max(b, self.min_signed_bits) if signed else b for p, b in bits.items()}, signed=signed)
        if numel not in ("sample", "batch"):
            raise ValueError(f"{type(self).__name__}: numel must be 'sample' or 'batch', got {numel!r}")
        self.shared = shared
        self.numel = numel
        self.init = check_rule(type(self).__name__, init, ACTIVATION_RULES)
        self._slots = {p: 0 if shared else i for i, p in enumerate(self.bits)}
        keys = ["shared"] if shared else [str(p) for p in self.bits]
        self.steps = nn.ParameterDict({key: nn.Parameter(torch.ones(1)) for key in keys})
        self.register_buffer("initialized", torch.zeros(len(keys), dtype=torch.bool))
        self.register_buffer("statistic", torch.zeros(len(keys)), persistent=False)
        self.observing = False
        self.batches = 1  # whose gradients one step of the optimizer sums
        if isinstance(self.init, float):
            self.fix_steps_()

    def restart_(self) -> None:
        """Forget steps that data have set, so that the next calibration or training batch sets them anew."""
        if not isinstance(self.init, float):
            self.initialized.fill_(False)
            self.__dict__.pop("_initialized_cache", None)

    def fix_steps_(self) -> None:
        """Set every step from a rule that needs no data."""
        here = self.precision
        with torch.no_grad():
            for p in self.bits:
                self.precision = p
                self.step.copy_(self.step_from(torch.ones(())).reshape(1))
        self.initialized.fill_(True)
        self.precision = here

    @property
    def step(self) -> nn.Parameter:
        """The step of the current precision."""
        return self.steps["shared" if self.shared else str(self.precision)]

    def limits(self) -> tuple[int, int]:
        """Smallest and largest code at the current precision."""
        width = self.width
        return (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if self.signed else (0, 2**width - 1)

    def count(self, x: Tensor) -> int:
        """N of the gradient scale 1/sqrt(N Q_P): features a sample or elements a batch, at least 1."""
        if self.numel == "batch":
            return max((joined_elements(x) if self.sync else x.numel()) * self.batches, 1)
        return max(x.numel() // max(x.shape[0], 1), 1)

    def statistic_of(self, x: Tensor) -> Tensor:
        """The statistic that the initial step is proportional to, one element."""
        return activation_statistic(self.init, x, self.signed)

    def step_from(self, statistic: Tensor) -> Tensor:
        """The initial step for a statistic, at the current precision."""
        return activation_step(self.init, statistic, *self.limits())

    def grid(self, x: Tensor | None = None) -> Grid:
        self.require_initialized()
        lo, hi = self.limits()
        return Grid(self.step.detach().clamp_min(EPS), self.offset, lo, hi)

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        if isinstance(self.init, float):
            return
        slot = self._slots[self.precision]
        wide = torch.promote_types(x.dtype, torch.float32)
        current = self.statistic_of(x.detach().to(wide)).to(self.statistic)
        if self.sync:
            current = power_mean_over_ranks(current, x.numel(), POWER[str(self.init)])
        if self.observing:
            current = torch.maximum(self.statistic[slot], current)
        if not torch.isfinite(current):
            raise ValueError(
                f"{type(self).__name__}: cannot set the step from a batch of shape {tuple(x.shape)}: not finite"
            )
        if not self.signed and bool((x < 0).any()):
            warnings.warn(
                f"{type(self).__name__}: inputs below zero meet an unsigned grid, which cuts them: the example given "
                "to quantize_ showed none; give it an example drawn from the data",
                stacklevel=2,
            )
        self.statistic[slot] = current
        if current > 0:  # an all-zero batch tells nothing; keep the old step
            self.step.copy_(self.step_from(current).reshape(1).to(self.step))
            self.initialized[slot] = True

    def prepare(self, x: Tensor) -> None:
        """Called at the start of forward: observe, or initialise on the first training batch.

        An all-zero batch sets no step, and needs none: zero is on every activation grid whose offset is 0. So a layer
        whose inputs are always zero can be trained and evaluated.
        """
        if self.observing or (self.training and not self.is_initialized()):
            self.init_(x)
        elif not self.is_initialized() and (self.offset != 0 or bool((x != 0).any())):
            self.require_initialized()

    def is_initialized(self) -> bool:
        """Whether the current precision's step was set."""
        flag = self.__dict__.get("_initialized_cache")
        if not flag or not flag[self._slots[self.precision]]:  # reading a buffer each step would stall accelerators
            flag = self.initialized.tolist()
            self.__dict__["_initialized_cache"] = flag
        return flag[self._slots[self.precision]]

    @property
    def known_steps(self) -> list[bool] | None:
        """What is remembered of `initialized`, to be put back together with that buffer; None for nothing."""
        return self.__dict__.get("_initialized_cache")

    @known_steps.setter
    def known_steps(self, value: list[bool] | None) -> None:
        self.__dict__["_initialized_cache"] = value

    def require_initialized(self) -> None:
        """Raise RuntimeError if the current precision's step was never set."""
        if not self.is_initialized():
            raise RuntimeError(
                f"{type(self).__name__}: no step size at precision {self.precision}: run bitstrata.calibrate_(model, "
                "batches), or a training batch, at this precision first; an all-zero batch does not count"
            )

    def precision_parameters(self) -> dict[int, list[nn.Parameter]]:
        return {} if self.shared else {p: [self.steps[str(p)]] for p in self.bits}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.__dict__.pop("_initialized_cache", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.initialized.is_meta:
            self.is_initialized()  # read it here: torch.compile cannot read a buffer's values inside a graph


class WeightQuantizer(Quantizer):
    """Base of weight quantizers. Their steps are set from the weight when the layer is made or a float state loaded."""

    width_decides = False  # precisions of the same width quantize alike

    @property
    def same_at_all_precisions(self) -> bool:
        """Whether a weight has one quantized value, whatever the precision."""
        return len(self.bits) == 1 or (self.width_decides and len(set(self.bits.values())) == 1)
