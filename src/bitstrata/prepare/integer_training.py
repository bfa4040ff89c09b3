"""integer_: a model that trains in integers; and what layers keep for the backward pass, in bytes.

Source: Guo, Liu et al., "Towards accurate and efficient sub-8-bit integer training".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..integer.rounding import CounterGenerator, CounterRounding
from ..integer.rule import IntegerRule
from ..nn.integer_layers import INTEGER_FORMS, IntegerLayer, layer_noise, to_integer
from ..nn.l1_norm import L1BatchNorm, QuantizedL1BatchNorm, l1_batch_norm_from
from .finite import not_finite, watched
from .observe import Trace, observe, tensors_in
from .precision import quantized_layers
from .swap import SKIPPED
from .wrapped import refuse_wrapped

Filter = Callable[[str, nn.Module], bool]
NORMS = ("l1_quantized", "l1", "l2_quantized", "batch")


@dataclass(frozen=True)
class _Method:
    """What a method sets where the caller does not: widths, normalization, and the rounding of gradients."""

    quantizer: str
    bits: int
    norm: str
    grad_rounding: str


METHODS: dict[str, _Method] = {
    "shift": _Method("shift", 4, "l1_quantized", "stochastic"),
    "int8_naive": _Method("tensor", 8, "l2_quantized", "nearest"),
    "int8_sr": _Method("tensor", 8, "l2_quantized", "stochastic"),
}


def integer_(
    model: nn.Module,
    example_inputs: Any,
    *,
    w: int | None = None,
    a: int | None = None,
    g: int | None = None,
    groups: int = 4,
    edge_bits: int = 8,
    norm: str | None = None,
    l1_scale: str = "sqrt(pi/2)",
    method: str = "shift",
    act_rounding: str = "nearest",
    grad_rounding: str | None = None,
    unsigned_nonneg: bool = False,
    clip_ratio: float = 1.0,
    grad_grid: str = "uniform",
    form: str = "engine",
    on_nonfinite: str = "error",
    seed: int = 0,
    filter: Filter | None = None,
) -> nn.Module:
    """Make every layer that has an integer form train in integers and replace batch normalizations, in place.

    Linear, Conv1d, Conv2d, MultiheadAttention, LSTM, GRU, RNN and their cells have one; an Embedding has no product and
    keeps its exact gradient. Layers change class (`IntegerLayer`), so parameters, hooks, tied weights and the
    state_dict keys of layers stay; the optimizer, loss, activation functions, gates, attention scores, softmax, pooling
    and sums stay in float, as do other normalizations and layers of derived or reparametrized types. The example is run
    once, in evaluation mode, to see which layers run and which is first and last. Torch's transformer layers lose their
    fused path of evaluation, which reads float weights.

    Processes of DistributedDataParallel draw independently if each is given a seed of its own; gradients are averaged,
    so their parameters stay equal all the same.

    Args:
        model: a float model.
        example_inputs: a tensor, or a tuple of positional arguments, as the model's forward takes them.
        w, a, g: widths of weights, activations, gradients, 2..8; None for the method's: 4 for "shift", 8 for the
            others, which take no other.
        groups: N_G of method "shift", 1..8.
        edge_bits: the three widths in the first and the last layer with a product, in order of execution.
        norm: what batch normalization becomes: "l1_quantized", every tensor of it in 8 bits (the paper's);
            "l2_quantized", its twin by standard deviation; "l1", in float; "batch", as it is. None for "l1_quantized"
            with "shift" and "l2_quantized" with the others.
        l1_scale: of `l1_batch_norm_from`.
        method: "shift", ShiftQuant; "int8_naive", one 8-bit scale a tensor with gradients rounded to nearest;
            "int8_sr", the same with stochastic rounding.
        act_rounding, unsigned_nonneg, form, on_nonfinite: of `IntegerRule`.
        clip_ratio, grad_grid: of `IntegerRule`, in layers between the first and the last; 1 and "uniform" in these.
        grad_rounding: "stochastic" or "nearest", in layers and quantized normalizations; None for the method's.
        seed: of all stochastic rounding of gradients, 0..2^64 - 1. Every layer has streams of its own.
        filter: called with (qualified name, layer); False leaves the layer in float.

    Returns:
        The same model.

    Raises:
        TypeError: model is no module.
        ValueError: an option out of range; the model is quantized or in integers already, or a bare layer; no layer is
            left; parameters, statistics or a layer's input on the example are not finite, or the input is empty; a
            batch normalization without running statistics, for another `norm` than "batch". The model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"integer_: model must be a torch.nn.Module, got {type(model).__name__}")
    refuse_wrapped("integer_", model)
    preset = _preset(method, {"w": w, "a": a, "g": g})
    rule = IntegerRule(
        w=w or preset.bits,
        a=a or preset.bits,
        g=g or preset.bits,
        groups=groups,
        act_rounding=act_rounding,
        grad_rounding=grad_rounding or preset.grad_rounding,
        unsigned_nonneg=unsigned_nonneg,
        clip_ratio=clip_ratio,
        grad_grid=grad_grid,
        method=preset.quantizer,
        form=form,
        on_nonfinite=on_nonfinite,
    )
    edge_rule = replace(rule, w=edge_bits, a=edge_bits, g=edge_bits, clip_ratio=1.0, grad_grid="uniform")
    norm = preset.norm if norm is None else norm
    if norm not in NORMS:
        raise ValueError(f"integer_: norm must be one of {', '.join(NORMS)}, got {norm!r}")
    candidates = _candidates(model)
    trace = observe(model, example_inputs, candidates)
    skipped = _skips(candidates, trace, filter)
    chosen = [name for name in candidates if name not in skipped]
    with_product = {name for name in candidates if INTEGER_FORMS[type(candidates[name])].multiplies}
    if not with_product.intersection(chosen):
        raise ValueError(f"integer_: no layer to convert among {len(candidates)} candidates: {skipped or 'none'}")
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)}
    _refuse_not_finite({**{name: candidates[name] for name in chosen}, **norms}, trace)
    indices = {name: index for index, (name, _) in enumerate(model.named_modules())}
    layer_noise(seed, len(indices))  # the seed, before anything changes
    made: dict[int, nn.Module] = {}
    if norm != "batch":
        made = {
            id(module): _norm(name, module, norm, l1_scale, rule.grad_rounding, layer_noise(seed, indices[name]))
            for name, module in norms.items()
        }
    ran = sorted((seen.order, name) for name, seen in trace.layers.items() if seen.calls and name in with_product)
    edges = {ran[0][1], ran[-1][1]}
    for name, reason in skipped.items():
        candidates[name].__dict__[SKIPPED] = reason
    for name in chosen:
        layer = to_integer(
            candidates[name], edge_rule if name in edges else rule, seed=seed, index=indices[name], name=name
        )
        layer.inner_width = rule.w
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():  # every name of a module that has several
            if id(child) in made:
                parent._modules[child_name] = made[id(child)]
    _disable_fused_paths(model)
    return model


def _preset(method: str, widths: Mapping[str, int | None]) -> _Method:
    if method not in METHODS:
        raise ValueError(f"integer_: method must be one of {', '.join(METHODS)}, got {method!r}")
    preset = METHODS[method]
    for name, bits in widths.items():
        if preset.quantizer == "tensor" and bits not in (None, preset.bits):
            raise ValueError(f"integer_: method {method!r} has {preset.bits} bits; got {name}={bits!r}")
        if bits == 0:
            raise ValueError(f"integer_: {name} must be in 2..8, got 0")
    return preset


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    if integer_layers(model) or quantized_layers(model):
        raise ValueError("integer_: the model is quantized or in integers already; start from a float model")
    if type(model) in INTEGER_FORMS:
        raise ValueError(
            f"integer_: the model is a bare {type(model).__name__}; wrap it in nn.Sequential or use to_integer"
        )
    return {name: module for name, module in model.named_modules() if type(module) in INTEGER_FORMS}


def _skips(candidates: Mapping[str, nn.Module], trace: Trace, keep: Filter | None) -> dict[str, str]:
    skipped = {}
    for name, module in candidates.items():
        if not trace.layers[name].calls:
            skipped[name] = "did not run on the example"
        elif keep is not None and not keep(name, module):
            skipped[name] = "kept in float by the filter"
    return skipped


def _refuse_not_finite(modules: Mapping[str, nn.Module], trace: Trace) -> None:
    for name, module in modules.items():
        problem = not_finite({**watched(module), **dict(module.named_parameters())})
        if problem:
            raise ValueError(f"integer_: {type(module).__name__} {name!r}: {problem}")
    for name, seen in sorted(trace.layers.items(), key=lambda item: item[1].order):  # the first one is the cause
        if name in modules and seen.problem:
            raise ValueError(f"integer_: the input of layer {name!r} on the example: {seen.problem}")


def _norm(  # noqa: PLR0917
    name: str, module: nn.Module, norm: str, l1_scale: str, rounding: str, noise: CounterGenerator
) -> L1BatchNorm:
    quantized = norm != "l1"
    rounds: Any = CounterRounding(noise) if rounding == "stochastic" else rounding
    try:
        return l1_batch_norm_from(
            module, l1_scale=l1_scale, quantized=quantized, l2=norm == "l2_quantized", rounding=rounds
        )
    except ValueError as error:
        raise ValueError(f"integer_: {type(module).__name__} {name!r}: {error}") from error


def _disable_fused_paths(model: nn.Module) -> None:
    """Torch's transformer layers have a fused path for evaluation that reads the float weights of their parts."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer) and integer_layers(module):
            module.activation_relu_or_gelu = 0


def integer_layers(model: nn.Module) -> dict[str, IntegerLayer]:
    """Qualified name -> layer that trains in integers, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, IntegerLayer)}


def _generators(model: nn.Module) -> dict[str, CounterGenerator]:
    found: dict[str, CounterGenerator] = {
        f"{name}.{product}" if product else name: state.noise
        for name, layer in integer_layers(model).items()
        for product, state in layer.states.items()
    }
    for name, layer in quantized_layers(model).items():
        if layer.grad_quant is not None:
            found[name] = layer.grad_quant.state.noise
    for name, module in model.named_modules():
        if isinstance(module, QuantizedL1BatchNorm) and isinstance(module.rounding, CounterRounding):
            found[name] = module.rounding.generator
    return found


def noise_state(model: nn.Module) -> dict[str, dict[str, int]]:
    """Seed and next stream of every layer and normalization: with the state_dict, what an exact resume needs.

    Layers with several products have an entry for each, as "lstm.weight_hh_l0".
    Not part of the state_dict, whose keys stay those of the float model.
    """
    return {name: generator.state_dict() for name, generator in _generators(model).items()}


def load_noise_state_(model: nn.Module, state: Mapping[str, Mapping[str, int]]) -> None:
    """Continue where `noise_state` was taken.

    Raises:
        ValueError: the names are not those of the model's layers.
    """
    generators = _generators(model)
    if set(generators) != set(state):
        raise ValueError(
            f"load_noise_state_: the state is of {sorted(state)}, the model's generators of {sorted(generators)}"
        )
    for name, generator in generators.items():
        generator.load_state_dict(state[name])


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that one layer keeps for its backward pass.

    Attributes:
        kept: of all tensors it saves but parameters (packed codes, exponents and scales of an integer product; of
            attention and recurrent layers also scores, gates and states, in float). Each piece of memory once.
        float32: of its floating inputs in float32, or of indices as they are: what a float Linear, convolution or
            Embedding saves.
    """

    kept: int
    float32: int


@dataclass(frozen=True)
class SavedMemory:
    """Bytes kept for the backward pass.

    Attributes:
        layers: qualified name -> bytes of each layer that `integer_` knows, float or integer, that ran.
        total: of all that the whole model saves but parameters and buffers, each piece of memory once.
            Activation functions save their results too, so that this shrinks less than the layers do.
    """

    layers: dict[str, LayerMemory]
    total: int


def saved_memory(model: nn.Module, example_inputs: Any) -> SavedMemory:
    """What a forward pass on the example, in the model's present mode, keeps for the backward pass.

    Measured: every tensor that autograd saves passes through a hook. The forward pass is a real one: in training mode
    it updates running statistics.

    Args:
        model: float or integer. example_inputs: a tensor, or a tuple of positional arguments.
    """
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    layers: dict[str, LayerMemory] = {}
    storages: dict[int, Tensor] = {}  # a tensor of each, alive so that no address is used twice
    running: list[str] = []
    pieces: set[tuple[str, int, int]] = set()  # of a layer: name, address, bytes

    def pack(saved: Tensor) -> Tensor:
        address = saved.untyped_storage().data_ptr()
        if saved.numel() and address not in owned:
            storages[address] = saved
            if running:
                seen, size = layers[running[-1]], saved.numel() * saved.element_size()
                piece = (running[-1], saved.data_ptr(), size)
                layers[running[-1]] = replace(seen, kept=seen.kept + (0 if piece in pieces else size))
                pieces.add(piece)
        return saved

    def enter(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = list({id(x): x for x in tensors_in((args, kwargs))}.values())
            floats = sum(4 * x.numel() for x in inputs if x.is_floating_point())
            size = floats or sum(x.numel() * x.element_size() for x in inputs)
            seen = layers.get(name, LayerMemory(0, 0))
            layers[name] = replace(seen, float32=seen.float32 + size)
            running.append(name)

        return hook

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for name, module in model.named_modules():
        if type(module) in INTEGER_FORMS or isinstance(module, IntegerLayer):
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda saved: saved):
            model(*example_inputs) if isinstance(example_inputs, tuple | list) else model(example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return SavedMemory(layers, sum(t.untyped_storage().nbytes() for t in storages.values()))
