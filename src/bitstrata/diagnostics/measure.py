"""Everything that can be known of a network on one batch, as numbers by layer and precision."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fused import FusedNetwork
from ..prepare.compiled import eagerly
from ..prepare.precision import precision, precisions, quantized_layers
from ..prepare.wrapped import unwrapped
from ..quantizers.base import ActivationQuantizer
from .kept import kept
from .nonzero import nonzero_activations, nonzero_weights
from .objectives import objective_geometry
from .rules import training_rules
from .signal import LayerSignal, layer_signals

Batch = tuple[Tensor, Tensor]
Table = dict[str, dict[str, float]]

#: What can be asked for -> the names of its values.
WHAT: dict[str, tuple[str, ...]] = {
    "sqnr": ("weight_sqnr", "input_sqnr"),
    "steps": ("weight_step", "input_step"),
    "deviation": ("weight_deviation", "input_deviation"),
    "clipping": ("weight_clipped", "input_clipped"),
    "nonzero": ("weight_nonzero", "input_nonzero", "R_w", "R_a"),
    "flips": ("flips",),
    "kappa": ("kappa0", "kappa1"),
    "ratio": ("variance_ratio",),
    "gradient": ("gradient_variance",),
    "moo": ("moo_loss", "moo_norm", "moo_factor", "moo_cosine"),
}
SIGNALS = ("sqnr", "steps", "deviation", "clipping", "nonzero")
RULES = ("kappa", "ratio", "gradient")
FIELDS = {"sqnr": "sqnr", "steps": "step", "deviation": "deviation", "clipping": "clipped", "nonzero": "nonzero"}


@dataclass
class Measurement:
    """Numbers of one moment; those that are not finite are left out.

    Attributes:
        layers: value -> precision -> layer -> number. Of "flips" the second key is the number of the bit-plane, "1" for
            the most significant one; of a float network it is "float".
        whole: value -> precision -> number, of the whole network; of "moo_cosine" the key is a pair, "4-2".
        seconds: wall time of each group of measurements: "signals", "rules", "flips", "moo".
    """

    layers: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    whole: Table = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, key: object, values: Mapping[str, float | None]) -> None:
        """Numbers of layers."""
        finite = {layer: float(v) for layer, v in values.items() if v is not None and math.isfinite(v)}
        if finite:
            self.layers.setdefault(name, {})[str(key)] = finite

    def note(self, name: str, key: object, value: float) -> None:
        """A number of the whole network."""
        if math.isfinite(value):
            self.whole.setdefault(name, {})[str(key)] = float(value)


def check_what(who: str, model: nn.Module, what: Iterable[str] | None) -> tuple[str, ...]:
    """What is asked for, or all that the network has, in the order of WHAT.

    Raises:
        ValueError: an unknown name, or something that this network does not have, with the reason.
    """
    if isinstance(what, str):
        raise ValueError(f"{who}: what must be a collection of names, got {what!r}")
    lacking = _lacking(model)
    if what is None:
        found = tuple(name for name in WHAT if name not in lacking)
        if not found:
            raise ValueError(f"{who}: {lacking['kappa']}")
        return found
    asked = tuple(what)
    unknown = [repr(name) for name in asked if name not in WHAT]
    if unknown or not asked:
        raise ValueError(f"{who}: what must be among {', '.join(WHAT)}, got {', '.join(unknown) or 'nothing'}")
    for name in asked:
        if name in lacking:
            raise ValueError(f"{who}: {name!r} is not to be had: {lacking[name]}")
    return tuple(name for name in WHAT if name in asked)


def _lacking(model: nn.Module) -> dict[str, str]:
    """What a network does not have -> why."""
    known = precisions(model)
    if len(known) > 1:
        return {}
    if known:
        return {"moo": f"the network has one precision, {known[0]}"}
    if not any(type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d) for module in network_of(model).modules()):
        return dict.fromkeys(WHAT, "the network has no Linear, Conv1d or Conv2d layer, float or quantized")
    float_ones = ("kappa", "gradient")
    return {name: "the network is float; call quantize_ first" for name in WHAT if name not in float_ones}


def network_of(model: nn.Module) -> nn.Module:
    """The network inside what distributed training, torch.compile or `fuse` have made of it."""
    model = unwrapped(model)
    while isinstance(model, FusedNetwork):
        model = unwrapped(model.model)
    return model


def measure(
    model: nn.Module,
    batch: Batch,
    what: Iterable[str] | None = None,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    losses: Callable[[int], Tensor] | None = None,
    images: int | None = 32,
) -> Measurement:
    """Measure a network at every precision it has; it is left as it was, to the bit, random streams included.

    Signals ("sqnr", "steps", "deviation", "clipping", "nonzero") are taken in evaluation mode, on the first `images` of
    the batch; rules ("kappa", "ratio", "gradient") and "moo" in training mode, by one forward and backward pass a
    precision of the whole batch. "flips" has no part here: it needs two moments, see `CodeFlips` and `Live`. Inputs
    whose steps no data have set yet are left out.

    Args:
        model: quantized, or float (for "kappa" and "gradient"); may be fused, compiled or distributed.
        batch: inputs and targets as the model and `loss` take them.
        what: names of WHAT; None for all that the network has.
        loss: called with (logits, targets), gives one number; of the rules.
        losses: precision -> its loss with its graph, asked widest first, for "moo"; `loss` by default.
        images: of the batch that signals are taken on, at least 1; None for all.

    Returns:
        The numbers. "gradient_variance" is the mean square of the gradient to the quantized weight; kappas as in
        `training_rules`; factors of "moo" are those of multiple gradient descent.

    Raises:
        ValueError: what `check_what` raises, or images below 1.
    """
    wanted = [name for name in check_what("measure", model, what) if name != "flips"]
    check_images("measure", images)
    network, found = network_of(model), Measurement()
    groups: list[tuple[str, Sequence[str], Callable[[list[str]], None]]] = [
        ("signals", SIGNALS, lambda names: _signals(network, batch[0][:images], names, found)),
        ("rules", RULES, lambda names: _rules(network, batch, names, found, loss)),
        ("moo", ("moo",), lambda names: _objectives(network, batch, found, loss, losses)),
    ]
    with eagerly(), kept(network, training=None):
        for group, members, work in groups:
            asked = [name for name in wanted if name in members]
            if asked:
                begun = time.perf_counter()
                work(asked)
                found.seconds[group] = time.perf_counter() - begun
    return found


def check_images(who: str, images: int | None) -> None:
    """ValueError unless it is a positive number or None."""
    if images is not None and (isinstance(images, bool) or not isinstance(images, int) or images < 1):
        raise ValueError(f"{who}: images must be at least 1, or None for all, got {images!r}")


def _signals(model: nn.Module, inputs: Tensor, names: list[str], found: Measurement) -> None:
    for p in precisions(model):
        with precision(model, p):
            batches = [inputs] if _has_steps(model) else []
            signals = layer_signals(model, batches)
            for name in names:
                _add_signals(found, name, p, signals)
            if "nonzero" in names:
                found.note("R_w", p, nonzero_weights(model).pooled)
                if batches and len(signals) > 1:
                    found.note("R_a", p, nonzero_activations(model, batches).pooled)


def _add_signals(found: Measurement, name: str, p: int, signals: Mapping[str, LayerSignal]) -> None:
    part = FIELDS[name]
    found.add(WHAT[name][0], p, {layer: getattr(signal.weight, part) for layer, signal in signals.items()})
    inputs = {layer: getattr(s.input, part) for layer, s in signals.items() if s.input is not None}
    found.add(WHAT[name][1], p, inputs)


def _has_steps(model: nn.Module) -> bool:
    quantizers = [layer.act_quant for layer in quantized_layers(model).values()]
    return all(q.is_initialized() for q in quantizers if isinstance(q, ActivationQuantizer))


def _rules(
    model: nn.Module, batch: Batch, names: list[str], found: Measurement, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    def of_batch(network: nn.Module, pair: Batch) -> Tensor:
        return loss(network(pair[0]), pair[1])

    def once(key: object) -> None:
        rules = training_rules(model, of_batch, batch, training=True)
        if "kappa" in names:
            found.note("kappa0", key, rules.kappa0)
            found.add("kappa1", key, {layer: rule.kappa1 for layer, rule in rules.layers.items()})
        if "ratio" in names:
            found.add("variance_ratio", key, {layer: rule.ratio for layer, rule in rules.layers.items()})
        if "gradient" in names:
            found.add("gradient_variance", key, {layer: rule.gradient for layer, rule in rules.layers.items()})

    for p in precisions(model):
        with precision(model, p):
            once(p)
    if not precisions(model):
        once("float")


def _objectives(
    model: nn.Module,
    batch: Batch,
    found: Measurement,
    loss: Callable[[Tensor, Tensor], Tensor],
    losses: Callable[[int], Tensor] | None,
) -> None:
    def at(network: nn.Module, pair: Batch) -> Tensor:
        if losses is None:
            return loss(network(pair[0]), pair[1])
        return losses(next(iter(quantized_layers(network).values())).precision)

    geometry = objective_geometry(model, at, batch, training=True)
    known = geometry.precisions
    for name, values in (("loss", geometry.losses), ("norm", geometry.norms), ("factor", geometry.factors)):
        for p, value in zip(known, values, strict=True):
            found.note(f"moo_{name}", p, value)
    for i, p in enumerate(known):
        for j, other in enumerate(known[:i]):
            found.note("moo_cosine", f"{p}-{other}", float(geometry.cosines[i, j]))


def rounded(values: Mapping[str, object]) -> dict[str, object]:
    """The same nest of mappings with numbers of five digits, for files that many of them go into."""
    return {
        key: rounded(value) if isinstance(value, Mapping) else float(f"{value:.5g}") for key, value in values.items()
    }


def not_finite(model: nn.Module) -> str | None:
    """The first parameter or buffer that holds NaN or infinity; None if there is none."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None
