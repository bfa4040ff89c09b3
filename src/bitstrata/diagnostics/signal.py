"""What quantization does to each layer's weight and input: noise, clipping, steps, codes (UniQ, figures 3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.layers import QuantizedLayer
from ..prepare.precision import quantized_layers
from ..quantizers.base import Grid, Quantizer
from ..quantizers.pixels import PixelInput


@dataclass(frozen=True)
class Signal:
    """A tensor and its quantized form.

    sqnr: 10 log10(variance / mean squared error), dB; infinite without error, NaN for a tensor that does not vary.
    step: mean scale of the grid. deviation: standard deviation of the tensor. clipped: share of elements beyond the
    grid's outermost values by more than half a step. nonzero: share whose quantized value is not zero. counts: how
    often each code from lo to hi occurs.
    """

    sqnr: float
    step: float
    deviation: float
    clipped: float
    nonzero: float
    lo: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class LayerSignal:
    """One layer at the present precision; input is None where it is not quantized, are pixels, or was not seen."""

    weight: Signal
    input: Signal | None


@torch.no_grad()
def layer_signals(model: nn.Module, batches: Iterable[Tensor] = ()) -> dict[str, LayerSignal]:
    """Statistics of every quantized layer's weight, and of its input over `batches`, at the present precision.

    Args:
        model: quantized; runs in evaluation mode on the batches, and has its modes back afterwards.
        batches: inputs of the model; none leaves the inputs out.

    Raises:
        ValueError: a float model.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("layer_signals: the model has no quantized layers; call quantize_ first")
    inputs: dict[str, _Sums] = {}
    handles = [layer.register_forward_pre_hook(_watch(name, inputs)) for name, layer in layers.items()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for x in batches:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    found = {}
    for name, layer in layers.items():
        sums = _Sums()
        sums.add(layer.weight_quant, layer.effective_weight())
        found[name] = LayerSignal(sums.signal(), inputs[name].signal() if name in inputs else None)
    return found


class _Sums:
    """Sums over all that was seen of a tensor, in float64."""

    def __init__(self) -> None:
        self.count = self.clipped = self.nonzero = 0
        self.total = self.squares = self.errors = 0.0
        self.step = 0.0
        self.lo = 0
        self.counts = torch.zeros(0, dtype=torch.int64)

    def add(self, quantizer: Quantizer, x: Tensor) -> None:
        grid, codes = quantizer.grid(x), quantizer.codes(x)
        value = grid.dequantize(codes).double()
        wide = x.double()
        self.count += x.numel()
        self.total += float(wide.sum())
        self.squares += float(wide.square().sum())
        self.errors += float((wide - value).square().sum())
        self.clipped += int(_beyond(grid, wide).sum())
        self.nonzero += int(value.count_nonzero())
        self.step = float(grid.scale.double().mean())
        self.lo = grid.lo
        counts = torch.bincount((codes.reshape(-1) - grid.lo).long(), minlength=grid.hi - grid.lo + 1)
        self.counts = counts if not self.counts.numel() else self.counts + counts

    def signal(self) -> Signal:
        n = max(self.count, 1)
        variance = max(self.squares / n - (self.total / n) ** 2, 0.0)
        noise = self.errors / n
        sqnr = math.nan if variance == 0 else math.inf if noise == 0 else 10 * math.log10(variance / noise)
        counts = tuple(int(c) for c in self.counts)
        return Signal(sqnr, self.step, variance**0.5, self.clipped / n, self.nonzero / n, self.lo, counts)


def _beyond(grid: Grid, x: Tensor) -> Tensor:
    """Whether elements lie outside the grid by more than half a step."""
    scale = grid.scale.double()
    if scale.numel() > 1:
        scale = scale.view(-1, *[1] * (x.dim() - 1))
    offset = grid.offset.double() if isinstance(grid.offset, Tensor) else grid.offset
    u = x / scale - offset
    return (u < grid.lo - 0.5) | (u > grid.hi + 0.5)


def _watch(name: str, inputs: dict[str, _Sums]):  # type: ignore[no-untyped-def]
    def note(layer: QuantizedLayer, args: tuple[Tensor, ...]) -> None:
        if layer.act_quant is not None and not isinstance(layer.act_quant, PixelInput) and args[0].numel():
            inputs.setdefault(name, _Sums()).add(layer.act_quant, args[0])

    return note


class CodeFlips:
    """How many weight codes change from look to look, bit-plane by bit-plane.

        flips = CodeFlips(model)
        ...  # some steps of training
        flips.update()  # {"layer1.0.conv1": (0.001, 0.004, 0.02, 0.09), ...}

    The planes are those of the offset code, most significant first: plane i of a code c in [lo, hi] is a bit of c - lo.
    """

    def __init__(self, model: nn.Module) -> None:
        """ValueError for a float model."""
        self.model = model
        if not quantized_layers(model):
            raise ValueError("CodeFlips: the model has no quantized layers; call quantize_ first")
        self._before = self._codes()

    @torch.no_grad()
    def update(self) -> dict[str, tuple[float, ...]]:
        """Layer -> share of weights whose bit has changed since the last look, a plane each."""
        now, found = self._codes(), {}
        for name, (codes, bits) in now.items():
            changed = codes ^ self._before[name][0]
            planes = range(bits - 1, -1, -1)
            found[name] = tuple(float(((changed >> plane) & 1).double().mean()) for plane in planes)
        self._before = now
        return found

    def state(self) -> dict[str, Tensor]:
        """Layer -> the offset codes of the last look, uint8, of the weight's shape."""
        return {name: codes.to(torch.uint8) for name, (codes, _) in self._before.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take `state` for the last look.

        Raises:
            ValueError: other layers, or weights of another shape; nothing is changed.
        """
        mine = {name: tuple(codes.shape) for name, (codes, _) in self._before.items()}
        given = {name: tuple(codes.shape) for name, codes in state.items()}
        if given != mine:
            odd = sorted(name for name in mine.keys() | given.keys() if mine.get(name) != given.get(name))
            raise ValueError(
                f"CodeFlips.load_state: the codes are of another network: {odd[0]!r} has the shape "
                f"{given.get(odd[0])}, expected {mine.get(odd[0])}"
            )
        self._before = {
            name: (state[name].to(codes.device, codes.dtype), bits) for name, (codes, bits) in self._before.items()
        }

    @torch.no_grad()
    def _codes(self) -> dict[str, tuple[Tensor, int]]:
        """Offset codes at the widest precision and their bits."""
        found = {}
        for name, layer in quantized_layers(self.model).items():
            quantizer, here = layer.weight_quant, layer.weight_quant.precision
            quantizer.precision = max(quantizer.bits)
            try:
                grid = layer.weight_grid()
                found[name] = (layer.weight_codes() - grid.lo, (grid.hi - grid.lo).bit_length())
            finally:
                quantizer.precision = here
        return found
