"""A network trained in integers and frozen, as the quantized network that lowering and verification know.

A layer computes sum_c (x_c code) 2^-e_c (w code) d a_o. Its quantized form multiplies channel c of the input by 2^e_c,
which requantization does with the channel's multiplier, quantizes with the one step d, and has the weight codes shifted
left by E - e_c, E the largest exponent, at the step a_o 2^-E. Where codes of w bits leave no room for the shifts within
8 bits, the layer becomes several that are added, each for the channels of some exponents.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..integer.frozen import FrozenRange
from ..integer.shiftquant import along, largest_code
from ..nn.integer_layers import FreezableLayer, IntegerConv1d, IntegerConv2d, IntegerLayer, IntegerLinear
from ..nn.l1_norm import L1BatchNorm, L1BatchNorm1d, L1BatchNorm2d, QuantizedL1BatchNorm
from ..nn.layers import QuantConv1d, QuantConv2d, QuantizedLayer, QuantLinear, convert
from ..nn.norm import PrecisionBatchNorm
from ..prepare.observe import BATCH_NORMS, observe
from ..prepare.precision import quantized_layers
from ..quantizers.base import Grid, Quantizer, WeightQuantizer
from .errors import LowerError

CODE_BITS = 8
FLOAT_FORMS: dict[type[nn.Module], type[nn.Module]] = {
    IntegerLinear: nn.Linear,
    IntegerConv1d: nn.Conv1d,
    IntegerConv2d: nn.Conv2d,
}


class FrozenInput(Quantizer):
    """code = round(clamp(x / step, lo, hi)), ties to even, with a step that is given."""

    step: Tensor

    def __init__(self, precision: int, bits: int, step: Tensor, signed: bool) -> None:
        super().__init__({precision: bits}, signed=signed)
        self.register_buffer("step", step.detach().reshape(1).double())
        self.top = largest_code(bits, signed)

    def grid(self, x: Tensor | None = None) -> Grid:
        return Grid(self.step, 0.0, -self.top if self.signed else 0, self.top)

    def codes(self, x: Tensor) -> Tensor:
        grid = self.grid()
        return (x.detach().double() / self.step).round_().clamp_(grid.lo, grid.hi).to(torch.int32)

    def surrogate(self, x: Tensor) -> Tensor:
        return x

    def init_(self, x: Tensor) -> None:
        """Nothing to set."""


class FrozenWeight(WeightQuantizer):
    """Codes that are given, with a step an output channel."""

    fixed: Tensor
    scale: Tensor

    def __init__(self, precision: int, bits: int, codes: Tensor, scale: Tensor) -> None:
        super().__init__({precision: bits}, channels=codes.shape[0])
        self.register_buffer("fixed", codes.to(torch.int32))
        self.register_buffer("scale", scale.detach().double())

    def grid(self, x: Tensor | None = None) -> Grid:
        half = 2 ** (self.width - 1)
        return Grid(self.scale, 0.0, -half, half - 1)

    def codes(self, x: Tensor) -> Tensor:
        return self.fixed

    def surrogate(self, x: Tensor) -> Tensor:
        return x

    def init_(self, x: Tensor) -> None:
        """Nothing to set."""


class ShiftedLayer(QuantizedLayer):
    """A quantized layer that multiplies the channels of its input by powers of two before it quantizes them."""

    input_factors: Tensor

    def quantized_input(self, x: Tensor) -> Tensor:
        axis = x.dim() - 1 if isinstance(self, nn.Linear) else x.dim() - self.weight.dim() + 1
        return super().quantized_input(x * along(self.input_factors.to(x.dtype), axis, x.dim()))


class ShiftedLinear(ShiftedLayer, QuantLinear):
    """`ShiftedLayer` for `QuantLinear`."""


class ShiftedConv1d(ShiftedLayer, QuantConv1d):
    """`ShiftedLayer` for `QuantConv1d`."""


class ShiftedConv2d(ShiftedLayer, QuantConv2d):
    """`ShiftedLayer` for `QuantConv2d`."""


SHIFTED: dict[type[nn.Module], type[ShiftedLayer]] = {
    QuantLinear: ShiftedLinear,
    QuantConv1d: ShiftedConv1d,
    QuantConv2d: ShiftedConv2d,
}


class SummedLayers(nn.Module):
    """One layer as several that read the same input and are added."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.parts
        y: Tensor = first(x)
        for part in others:
            y = y + part(x)
        return y


def shift_name(layer: str) -> str:
    """Name of the affine that multiplies a layer's input channels by powers of two."""
    return f"{layer}.shift"


def input_factors(layers: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
    """Layer -> the powers of two, float64 (channels,), of those layers that have any."""
    return {name: layer.input_factors.double() for name, layer in layers.items() if isinstance(layer, ShiftedLayer)}


def deployed(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """The quantized network that a frozen network trained in integers evaluates as; any other model itself.

    Args:
        model: unchanged.
        example: an input batch: normalizations then become those that lowering folds; without it they stay modules that
            evaluate to the same.

    Raises:
        LowerError: a layer that is not frozen, has no integer program, saw zeros only, or pads with something else.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    integer = {name: module for name, module in model.named_modules() if isinstance(module, IntegerLayer)}
    if not integer:
        return model
    for name, layer in integer.items():
        _refuse(name, layer)
    if quantized_layers(model):
        raise LowerError("lower: the model has layers trained in integers beside fake-quantized ones; use one kind")
    if isinstance(model, IntegerLayer):
        raise LowerError(f"lower: the model is a bare {type(model).__name__}; wrap it in nn.Sequential")
    twin = copy.deepcopy(model).eval()
    layers = {name: module for name, module in twin.named_modules() if isinstance(module, FreezableLayer)}
    precision = _precision(layers)
    made = {id(layer): _quantized(name, layer, precision) for name, layer in layers.items()}
    made.update({id(m): _affine_norm(m) for m in twin.modules() if isinstance(m, QuantizedL1BatchNorm)})
    _replace(twin, made)
    if example is not None:
        _own_norms(twin, example, precision)
    return twin.eval()


def _precision(layers: Mapping[str, FreezableLayer]) -> int:
    """What names the network's one precision: the weights' width in inner layers, else the commonest one."""
    inner = {layer.inner_width for layer in layers.values() if layer.inner_width is not None}
    return min(inner) if inner else Counter(layer.rule.w for layer in layers.values()).most_common(1)[0][0]


def _refuse(name: str, layer: IntegerLayer) -> None:
    kind = type(layer).__name__
    if not isinstance(layer, FreezableLayer):
        raise LowerError(
            f"lower: {kind} {name!r} trains in integers, but the integer programs of attention, recurrent layers and "
            "embeddings come later; linear layers and convolutions can be lowered"
        )
    if type(layer) not in FLOAT_FORMS:
        raise LowerError(f"lower: {kind} {name!r} trains in integers, but a layer of this type has no integer program")
    frozen = layer.frozen
    if frozen is None:
        raise LowerError(
            f"lower: {kind} {name!r} trains in integers whose ranges follow each batch; fix them first: "
            "bitstrata.freeze_(model, batches)"
        )
    if not float(frozen.scale(layer.rule.a)) > 0:
        raise LowerError(f"lower: {kind} {name!r}: its input was zero in every batch that freeze_ saw: it has no step")
    mode = getattr(layer, "padding_mode", "zeros")
    if mode != "zeros":
        raise LowerError(f"lower: {kind} {name!r} pads by padding_mode {mode!r}; programs pad with zeros")


def _quantized(name: str, layer: FreezableLayer, precision: int) -> nn.Module:
    """A quantized layer, or several in a sum, that evaluate as the frozen layer."""
    frozen, rule = layer.frozen, layer.rule
    assert frozen is not None
    assert isinstance(layer.weight, Tensor)
    groups = int(getattr(layer, "groups", 1))
    try:
        coded = rule.quantize_weight(layer.weight.detach(), "out", groups)
    except ValueError as error:
        raise LowerError(f"lower: {type(layer).__name__} {name!r}: {error}") from error
    codes, exponents = coded.codes.to(torch.int64), frozen.exponents.to(torch.int64)
    columns = _per_weight(exponents, codes, groups)
    if codes.shape[1] == 1 and groups > 1:  # depthwise: an output has one input channel, whose factor its scale takes
        scale = coded.scale.double() * torch.exp2(-columns[:, 0].double())
        return _part(layer, frozen, (codes, scale, rule.w), exponents, precision)
    room = CODE_BITS - rule.w
    parts: list[QuantizedLayer] = []
    low = int(exponents.min())
    while True:
        high = min(low + room, int(exponents.max()))
        inside = (exponents >= low) & (exponents <= high)
        if bool(inside.any()):
            high = int(exponents[inside].max())
            used = ((columns >= low) & (columns <= high)).long()
            shifted = codes * _tail(used << (high - columns).clamp(min=0), codes)
            shift = int((high - exponents[inside]).max())
            scale = coded.scale.double() * 2.0**-high
            factors = torch.where(inside, exponents, low)
            parts.append(_part(layer, frozen, (shifted, scale, rule.w + shift), factors, precision, bias=not parts))
        low = high + 1
        if low > int(exponents.max()):
            break
    return parts[0] if len(parts) == 1 else SummedLayers(parts)


def _per_weight(channels: Tensor, codes: Tensor, groups: int) -> Tensor:
    """(in,) as (out, in / groups): the channel that each weight multiplies."""
    rows = channels.reshape(groups, -1)
    return rows.repeat_interleave(codes.shape[0] // groups, dim=0)


def _tail(rows: Tensor, codes: Tensor) -> Tensor:
    return rows.reshape(*rows.shape, *[1] * (codes.dim() - 2))


def _part(  # noqa: PLR0917
    layer: FreezableLayer,
    frozen: FrozenRange,
    weight: tuple[Tensor, Tensor, int],
    exponents: Tensor,
    precision: int,
    bias: bool = True,
) -> QuantizedLayer:
    """A quantized layer with these weight codes, scales and width that reads channels at 2^exponent their size."""
    codes, scale, width = weight
    part = copy.deepcopy(layer)
    part.thaw_()
    if not bias:
        part.register_parameter("bias", None)
    part.__class__ = FLOAT_FORMS[type(layer)]  # type: ignore[assignment]
    rule = layer.rule
    step = frozen.scale(rule.a).double()
    made = convert(
        part,
        FrozenWeight(precision, width, codes, scale),
        FrozenInput(precision, rule.a, step, frozen.signed),
        edge=rule.w != precision,
    )
    for quantizer in (made.weight_quant, made.act_quant):
        assert quantizer is not None
        quantizer.double()  # convert has made them of the layer's dtype
    if bool(exponents.any()):
        made.__class__ = SHIFTED[type(made)]
        made.register_buffer("input_factors", torch.exp2(exponents.double()))
    return made


def _affine_norm(norm: QuantizedL1BatchNorm) -> L1BatchNorm:
    """The plain normalization that a frozen one evaluates as."""
    if not norm.is_frozen:
        raise LowerError(
            f"lower: a {type(norm).__name__} follows each batch; fix it first: bitstrata.freeze_(model, batches)"
        )
    codes = norm.affine_codes()
    form = L1BatchNorm2d if 4 in norm.ranks else L1BatchNorm1d
    made = form(norm.num_features, 0.0, norm.momentum, norm.affine, device=norm.running_mean.device).double()
    with torch.no_grad():
        made.running_mean.copy_(codes.mean.value[0])
        made.running_deviation.copy_(codes.deviation.value[0])
        if codes.weight is not None and codes.bias is not None:
            made.weight.copy_(codes.weight.value[0])
            made.bias.copy_(codes.bias.value[0])
    return made.to(norm.running_mean.dtype)


def _own_norms(twin: nn.Module, example: Tensor, precision: int) -> None:
    """Normalizations as lowering folds them: each with the quantized layer that it follows."""
    layers = quantized_layers(twin)
    x = torch.zeros_like(example, dtype=next(twin.parameters()).dtype)
    trace = observe(twin, x, dict(layers))
    made: dict[int, nn.Module] = {}
    for name, module in twin.named_modules():
        owner = trace.norm_owner.get(name)
        if isinstance(module, BATCH_NORMS) and owner is not None:
            made[id(module)] = PrecisionBatchNorm(module, (precision,), owner, layers[owner])
    _replace(twin, made)


def _replace(model: nn.Module, made: Mapping[int, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # every name of a module that has several
            if id(child) in made:
                parent._modules[name] = made[id(child)]
