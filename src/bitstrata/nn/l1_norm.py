"""L1 batch normalization, in float and fully quantized (Guo, Liu et al., section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional.l1norm import (
    HALF,
    Codes,
    QuantizedNorm,
    Rounding,
    l1_factor,
    l1_normalize,
    nearest,
    quantized_norm,
    quantized_norm_codes,
    stochastic,
)
from ..functional.ste import with_value
from ..integer.engine_norm import NormRule, batch_norm, norm_applies
from .running_norm import RunningNorm

ROUNDINGS: dict[str, Rounding] = {"stochastic": stochastic, "nearest": nearest}


def wide(x: Tensor) -> Tensor:
    """Half precision in float32."""
    return x.float() if x.dtype in HALF else x


def check_quantized(owner: str, bits: int, rounding: str | Rounding, l1_scale: str, l2: bool) -> Rounding:
    """The rounding as a function, if the options of a fully quantized form go together."""
    if not 2 <= bits <= 8:
        raise ValueError(f"{owner}: bits must be 2..8, got {bits}")
    if l2 and l1_scale != "1":
        raise ValueError(f"{owner}: l1_scale is for the mean absolute deviation; with l2=True it must be '1'")
    if isinstance(rounding, str):
        if rounding not in ROUNDINGS:
            raise ValueError(
                f"{owner}: rounding must be 'stochastic', 'nearest' or a function of a tensor, got {rounding!r}"
            )
        return ROUNDINGS[rounding]
    return rounding


class L1BatchNorm(RunningNorm):
    """Batch normalization by the mean absolute deviation of each channel; use `L1BatchNorm1d` or `2d`.

    y_c = weight_c (x - mean_c) / (deviation_c + eps) + bias_c, with deviation_c = c mean|x - mean_c| over batch and
    positions, mean and deviation both differentiated. Evaluation uses the running statistics:
    r <- (1 - momentum) r + momentum batch. Source: Guo, Liu et al., eqs. 5 and 36-40; the deviation is a mean over the
    batch, not the sum that eq. 39 prints.

    Half-precision input is computed in float32. Attributes and state_dict keys are those of torch's BatchNorm with
    `running_deviation` (C,), c times the mean absolute deviation and without eps, in the place of `running_var`; as an
    attribute for reading, `running_var` is its square. The state of a BatchNorm does not load; `l1_batch_norm_from`
    converts a module.

    Args:
        num_features: channels C.
        eps: at least 0, added to the deviation. With 0, a constant channel becomes its bias.
        momentum: None for the plain average over all batches since the last reset.
        affine: weight and bias a channel, initially 1 and 0; else there are none.
        l1_scale: c: "1", or "sqrt(pi/2)", which makes the deviation of a Gaussian channel its standard deviation and
            the module a replacement of trained batch normalization.
    """

    spread = "running_deviation"

    running_deviation: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        l1_scale: str = "1",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, statistics=num_features, device=device, dtype=dtype)
        l1_factor(l1_scale, type(self).__name__)
        self.l1_scale = l1_scale

    @property
    def running_var(self) -> Tensor:
        """The square of `running_deviation`, computed: writing into it changes nothing."""
        return self.running_deviation.square()

    def forward(self, x: Tensor) -> Tensor:
        """Any of `shapes` to the same shape and dtype.

        Raises:
            ValueError: another number of dimensions or of channels, or a training batch of fewer than two elements a
                channel.
        """
        self._check(x)
        w = wide(x)
        weight, bias = (None if t is None else self._broadcast(t, w) for t in (self.weight, self.bias))
        return self._normalized(w, weight, bias).to(x.dtype)

    def _normalized(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The result for x in float32 or float64; weight and bias of its rank and dtype."""
        if self.training:
            y, mean, deviation = l1_normalize(x, self._dims(x), eps=self.eps, l1_scale=self.l1_scale)
            self._track(mean, deviation)
            return y if weight is None or bias is None else y * weight + bias
        mean, deviation = self._running(x)
        spread = deviation + self.eps
        gain = spread.masked_fill(spread == 0, 1.0).reciprocal()
        return (x - mean) * gain if weight is None or bias is None else (x - mean) * (weight * gain) + bias

    def _running(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Running mean and deviation of x's rank and dtype."""
        return self._broadcast(self.running_mean, x), self._broadcast(self.running_deviation, x)

    @staticmethod
    def _broadcast(channels: Tensor, x: Tensor) -> Tensor:
        return channels.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))

    @staticmethod
    def _dims(x: Tensor) -> tuple[int, ...]:
        return (0, *range(2, x.dim()))

    def _check(self, x: Tensor) -> None:
        self._check_shape(x)
        if self.training and x.numel() // x.shape[1] < 2:
            raise ValueError(
                f"{type(self).__name__}: training needs more than one element a channel, got shape {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, l1_scale={self.l1_scale!r}"


class L1BatchNorm1d(L1BatchNorm):
    """L1 batch normalization of (N, C) or (N, C, L); see `L1BatchNorm`."""

    shapes = ("(N, C)", "(N, C, L)")
    ranks = (2, 3)


class L1BatchNorm2d(L1BatchNorm):
    """L1 batch normalization of (N, C, H, W); see `L1BatchNorm`."""

    shapes = ("(N, C, H, W)",)
    ranks = (4,)


class QuantizedL1BatchNorm(L1BatchNorm):
    """L1 batch normalization with everything in it quantized; use `QuantizedL1BatchNorm1d` or `2d`.

    Input, mean, deviation, normalized input, weight and bias each get a symmetric grid over the whole tensor, as wide
    as its largest magnitude at the moment, and are rounded to nearest; the result is weight * normalized + bias of the
    quantized three. In backward the gradient of the result is quantized likewise with `rounding`; see
    `functional.l1norm.quantized_norm`. Source: Guo, Liu et al., section 3.3 and eqs. 41-42; the order of the steps is
    a reconstruction.

    Evaluation quantizes the running statistics, which follow the batch's mean and deviation before they are quantized,
    and all else as in training. The normalized input's grid follows the batch, so evaluation is no affine map and
    depends on the other samples, until `freeze_` makes it one: frozen, evaluation is the affine map of quantized
    statistics, weight and bias, and input and normalized input are not rounded. A frozen normalization has the buffer
    `frozen` in its state_dict; loading a state freezes it or thaws it.

    Args:
        num_features, eps, momentum, affine, l1_scale: as for `L1BatchNorm`.
        bits: width of every grid, the gradient's too, 2..8.
        l2: divide by sqrt(mean (x - mean)^2 + eps) instead, all else equal: the twin to compare with. The running
            deviation is then that of the root mean square.
        rounding: of the gradient: "stochastic", from torch's default generator; "nearest"; or a function from real to
            whole numbers, such as `functional.l1norm.stochastic_rounding(generator)`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        l1_scale: str = "1",
        bits: int = 8,
        l2: bool = False,
        rounding: str | Rounding = "stochastic",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, l1_scale=l1_scale, device=device, dtype=dtype)
        self.rounding = check_quantized(type(self).__name__, bits, rounding, l1_scale, l2)
        self.bits = bits
        self.l2 = l2

    @property
    def is_frozen(self) -> bool:
        """Whether evaluation is the affine map of `affine_codes`."""
        return "frozen" in self._buffers

    def freeze_(self, frozen: bool = True) -> None:
        """Make evaluation an affine map, or let it follow the batch again; training always does."""
        self._buffers.pop("frozen", None)
        if frozen:
            self.register_buffer("frozen", torch.tensor(True, device=self.running_mean.device))

    def affine_codes(self) -> QuantizedNorm:
        """Mean, deviation, weight and bias on their grids in evaluation, each of shape (1, C)."""
        rows = [self.running_mean, self.running_deviation, self.weight, self.bias]
        mean, deviation, weight, bias = (None if t is None else wide(t.detach())[None] for t in rows)
        assert mean is not None
        assert deviation is not None
        options: dict[str, Any] = {"bits": self.bits, "eps": self.eps, "l1_scale": self.l1_scale, "l2": self.l2}
        nothing = torch.zeros_like(mean)
        return quantized_norm_codes(nothing, weight, bias, (0,), statistics=(mean, deviation), **options)

    def _frozen(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        codes = self.affine_codes()
        mean, spread = (self._broadcast(part.value[0], x) for part in (codes.mean, codes.deviation))

        def quantized(real: Tensor, part: Codes | None) -> Tensor:
            assert part is not None
            return with_value(real, self._broadcast(part.value[0], x))

        y = (x - mean) / spread
        y = y if weight is None else y * quantized(weight, codes.weight)
        return y if bias is None else y + quantized(bias, codes.bias)

    def engine_rule(self) -> NormRule | None:
        """What the engine's kernels compute in training, or None if they do not know how the gradient is rounded."""
        factor = l1_factor(self.l1_scale, type(self).__name__)
        return NormRule.of(self.rounding, bits=self.bits, l2=self.l2, eps=self.eps, factor=factor)

    def track(self, mean: Tensor, deviation: Tensor) -> None:
        """Move the running statistics towards a batch's, (C,)."""
        self._track(mean, deviation)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.freeze_(f"{prefix}frozen" in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """As of `L1BatchNorm`; a training batch of float32 on the CPU by the engine's kernels."""
        rule = self.engine_rule() if self.training and norm_applies(x, self.weight) else None
        if rule is None:
            return super().forward(x)
        self._check(x)
        y, mean, deviation = batch_norm(x, self.weight, self.bias, rule)
        self._track(mean, deviation)
        return y

    def _normalized(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.is_frozen and not self.training:
            return self._frozen(x, weight, bias)
        y, mean, deviation = quantized_norm(
            x,
            weight,
            bias,
            self._dims(x),
            bits=self.bits,
            eps=self.eps,
            l1_scale=self.l1_scale,
            l2=self.l2,
            statistics=None if self.training else self._running(x),
            rounding=self.rounding,
        )
        if self.training:
            self._track(mean, deviation)
        return y

    def extra_repr(self) -> str:
        marks = (", l2=True" if self.l2 else "") + (", frozen" if self.is_frozen else "")
        return f"{super().extra_repr()}, bits={self.bits}{marks}"


class QuantizedL1BatchNorm1d(QuantizedL1BatchNorm):
    """Fully quantized L1 batch normalization of (N, C) or (N, C, L); see `QuantizedL1BatchNorm`."""

    shapes = ("(N, C)", "(N, C, L)")
    ranks = (2, 3)


class QuantizedL1BatchNorm2d(QuantizedL1BatchNorm):
    """Fully quantized L1 batch normalization of (N, C, H, W); see `QuantizedL1BatchNorm`."""

    shapes = ("(N, C, H, W)",)
    ranks = (4,)


def l1_batch_norm_from(
    norm: nn.Module,
    *,
    l1_scale: str = "sqrt(pi/2)",
    quantized: bool = False,
    l2: bool = False,
    rounding: str | Rounding = "stochastic",
) -> L1BatchNorm:
    """An L1 batch normalization that evaluates to what `norm` does, with its momentum, device, dtype and mode.

    Channels are taken for Gaussian, whose mean absolute deviation is sqrt(2/pi) standard deviations. So with
    "sqrt(pi/2)" the running deviation is the standard deviation of `norm` and training starts near where it ended;
    with "1" the running deviation and the weight are both sqrt(2/pi) times what they are with "sqrt(pi/2)".

    Args:
        norm: BatchNorm1d or BatchNorm2d with running statistics.
        l1_scale: as for `L1BatchNorm`; with `l2` it does not matter.
        quantized: make a `QuantizedL1BatchNorm`; its evaluation is that of `norm` up to quantization.
        l2, rounding: as for `QuantizedL1BatchNorm`; only with `quantized`.

    Raises:
        TypeError: another module.
        ValueError: no running statistics; unknown `l1_scale` or `rounding`; `l2` without `quantized`; l1_scale="1"
            without an affine, which has to take the factor up.
    """
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
        raise TypeError(f"l1_batch_norm_from: norm must be BatchNorm1d or BatchNorm2d, got {type(norm).__name__}")
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"l1_batch_norm_from: {norm} has no running statistics; use track_running_stats=True")
    if l2 and not quantized:
        raise ValueError("l1_batch_norm_from: l2=True is for quantized=True; in float that is the batch norm itself")
    if l1_scale == "1" and not norm.affine and not l2:
        raise ValueError("l1_batch_norm_from: l1_scale='1' needs an affine that takes the factor up; use 'sqrt(pi/2)'")
    flat = isinstance(norm, nn.BatchNorm1d)
    place: dict[str, Any] = {"device": norm.running_mean.device, "dtype": norm.running_mean.dtype}
    made: L1BatchNorm
    if quantized:
        kind = QuantizedL1BatchNorm1d if flat else QuantizedL1BatchNorm2d
        chosen: dict[str, Any] = {"l2": True, "eps": norm.eps} if l2 else {"l1_scale": l1_scale}
        made = kind(norm.num_features, momentum=norm.momentum, affine=norm.affine, rounding=rounding, **chosen, **place)
    else:
        form = L1BatchNorm1d if flat else L1BatchNorm2d
        made = form(norm.num_features, momentum=norm.momentum, affine=norm.affine, l1_scale=l1_scale, **place)
    factor = 1.0 if l2 else l1_factor(l1_scale, "l1_batch_norm_from") / l1_factor("sqrt(pi/2)", "")
    var = norm.running_var.double()
    with torch.no_grad():
        spread = var.sqrt() if l2 else (factor * (var + norm.eps).sqrt() - made.eps).clamp_(min=0)
        made.running_mean.copy_(norm.running_mean)
        made.running_deviation.copy_(spread)
        made._take_over(norm)
        if norm.affine:
            made.weight.copy_(norm.weight.double() * factor)
    return made.train(norm.training)
