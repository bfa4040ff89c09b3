"""Schemes of training several widths that vertical layering compares itself with, for any quantized model.

- `cotrain`: all widths at once, plain sum of losses, no distillation. On separate planes ("ascending" weights) this is
  multi-layer co-training (Wu et al., section 3.3); on weights that each width quantizes by itself ("dorefa" weights,
  with clipping levels and normalizations a precision) it is AdaBits' joint training (Jin, Yang, Liao, CVPR 2020).
- `ascending_stages`: narrowest first, then one plane after the other, all before it frozen (Wu et al., section 3.3).
- `top_then_finetune`: the widest alone, then each narrower width from its upper bits (Wu et al., figure 5b, table 5).
- `warm_start_`: start from a network trained at another width (UniQ, Pham et al., section 5.1).

The stage schemes are generators: train what a stage names, then ask for the next.

    for stage in ascending_stages(model):
        config = TrainConfig(precisions=(stage.precision,), distill=None, lr=0.01)
        Trainer(model, config, loader, out_dir=out, name=f"stage-{stage.precision}").fit()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.norm import PrecisionBatchNorm
from ..prepare.parameters import precision_parameters
from ..prepare.precision import precisions, quantized_layers
from ..quantizers.base import Quantizer
from .joint import JointLoss, joint_backward
from .losses import Loss


def cotrain(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss = F.cross_entropy,
    amp: torch.dtype | None = None,
) -> dict[int, JointLoss]:
    """`joint_backward` by plain summation: every parameter gets the sum over precisions of dL_b, without distillation.

    Arguments, result and errors as of `joint_backward`. Source: Wu et al., section 3.3 (multi-layer co-training).
    """
    return joint_backward(model, inputs, targets, loss=loss, distill=None, reduction="sum", amp=amp)


@runtime_checkable
class Layered(Protocol):
    """A weight quantizer whose wider codes add bit-planes with parameters of their own."""

    def enhancement_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Precision -> planes that it adds to the next narrower one."""

    def start_planes_(self, x: Tensor, precision: int) -> None:
        """Set the planes that `precision` adds so that its codes are the nearest to the weight x."""


@dataclass(frozen=True)
class Stage:
    """One stage of a scheme: train `parameters` (all that require gradients now) at `precision` alone.

    Gradients of all parameters are cleared when a stage begins, so that an optimizer leaves the frozen ones alone.
    """

    precision: int
    parameters: tuple[nn.Parameter, ...]


def ascending_stages(model: nn.Module, *, restart: bool = True) -> Iterator[Stage]:
    """Stages of ascending layer training, narrowest precision first, for a model with "ascending" weights.

    Stage 0 is quantization-aware training of the narrowest precision: everything but the planes and what belongs to
    other precisions. Stage i trains the planes that precision i adds, and the parameters of precision i alone
    (normalization, activation steps); weights, steps, edge layers and narrower planes are frozen. requires_grad is as
    before after the last stage, or when the generator is closed. Source: Wu et al., section 3.3.

    Args:
        model: quantized for two or more precisions.
        restart: at the start of stage i > 0, set its planes anew from the weights that stage 0 left, and copy the
            normalizations of the precision before. False leaves both as they are.

    Yields:
        `Stage`, one a precision.

    Raises:
        ValueError: a float model, no layer whose weights have planes of their own, or normalizations whose statistics
            all precisions share, so that no stage could leave the others alone.
    """
    order = _precisions("ascending_stages", model)
    _check_norms("ascending_stages", model)
    layered = [(layer, found) for layer in quantized_layers(model).values() if (found := _layered(layer.weight_quant))]
    planes: dict[int, list[nn.Parameter]] = {p: [] for p in order}
    for _, quantizer in layered:
        for p, group in quantizer.enhancement_parameters().items():
            planes[p].extend(group)
    if not any(planes.values()):
        raise ValueError("ascending_stages: no layer has bit-planes to learn; quantize with 'ascending' weights")
    own = _own(model)
    everything = {id(q) for group in (*planes.values(), *own.values()) for q in group}
    with _training_only(model) as train_only:
        for before, p in zip((None, *order), order, strict=False):
            if before is not None and restart:
                copy_norms_(model, before, p)
                for layer, quantizer in layered:
                    quantizer.start_planes_(layer.effective_weight().detach(), p)
            shared = [q for q in model.parameters() if id(q) not in everything] if before is None else []
            yield Stage(p, train_only([*shared, *planes[p], *own[p]]))


def top_then_finetune(model: nn.Module, *, copy_norms: bool = True) -> Iterator[Stage]:
    """Stages of training the widest precision by itself, then fine-tuning each narrower one on its upper bits.

    Stage 0 trains all that the widest precision uses. Then, widest first, each narrower precision trains what is its
    own (normalization, activation steps, scale ratios) over frozen shared weights, because one set of planes has to
    serve all widths. requires_grad is as before after the last stage, or when the generator is closed.
    Source: Wu et al., figure 5b and table 5 ("QAT + fine-tuning").

    Args:
        model: quantized with a weight grid whose narrower codes are the upper bits of the widest.
        copy_norms: start each narrower precision from the normalizations of the one before.

    Yields:
        `Stage`, one a precision.

    Raises:
        ValueError: a float model, a layer of several widths whose codes are not nested, or normalizations whose
            statistics all precisions share.
    """
    order = tuple(reversed(_precisions("top_then_finetune", model)))
    _check_norms("top_then_finetune", model)
    for name, layer in quantized_layers(model).items():
        quantizer = layer.weight_quant
        if not quantizer.nested and len(set(quantizer.bits.values())) > 1:
            raise ValueError(
                f"top_then_finetune: narrower codes of layer {name!r} are not the upper bits of the widest "
                f"({type(quantizer).__name__}); use a nested weight grid"
            )
    own = _own(model)
    others = {id(q) for group in own.values() for q in group}
    with _training_only(model) as train_only:
        for before, p in zip((None, *order), order, strict=False):
            if before is not None and copy_norms:
                copy_norms_(model, before, p)
            shared = [q for q in model.parameters() if id(q) not in others] if before is None else []
            yield Stage(p, train_only([*shared, *own[p]]))


@torch.no_grad()
def copy_norms_(model: nn.Module, source: int, target: int) -> None:
    """Copy statistics and affine parameters of every normalization from one precision to another, in place.

    Raises:
        ValueError: a precision that a normalization does not have.
    """
    for name, module in model.named_modules():
        if isinstance(module, PrecisionBatchNorm):
            for p in (source, target):
                if str(p) not in module.levels:
                    raise ValueError(f"copy_norms_: {name!r} has no precision {p}; it has {list(module.levels)}")
            module.levels[str(target)].load_state_dict(module.levels[str(source)].state_dict())


def warm_start_(narrow_model: nn.Module, wide_state_dict: Mapping[str, Any], *, precision: int | None = None) -> None:
    """Start a quantized model from the state of the same network at another width (UniQ: 1 bit from 2 bits), in place.

    Weights, biases and normalizations are copied. What describes the other grid (steps, number of levels) is not: the
    weight steps are set anew from the loaded weights at the model's own widths, and activation steps by the next
    `calibrate_` or training batch. Layers that are quantized on one side and in float on the other are fine.

    Args:
        narrow_model: a quantized model.
        wide_state_dict: state_dict() of a quantized or float model of the same network.
        precision: whose normalizations to take, the same for every precision of the model; by default the narrowest
            in the state.

    Raises:
        ValueError: a float model, a precision that the state does not have, or a state of another network; then the
            model is unchanged.
    """
    _precisions("warm_start_", narrow_model)
    float_state = _float_state(narrow_model, wide_state_dict, precision)
    before = {key: value.clone() for key, value in narrow_model.state_dict().items() if isinstance(value, Tensor)}
    try:
        narrow_model.load_state_dict(float_state)
    except RuntimeError as error:
        narrow_model.load_state_dict(before, strict=False)
        raise ValueError(f"warm_start_: the state does not fit the model: {error}") from error


def _float_state(model: nn.Module, state: Mapping[str, Any], precision: int | None) -> dict[str, Any]:
    """The part of a quantized model's state that a float model would have."""
    modules = dict(model.named_modules())
    grids = {"weight_quant", "act_quant"}
    grids |= {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, Quantizer)}
    result: dict[str, Any] = {}
    norms: dict[int, dict[str, Any]] = {}
    for key, value in state.items():
        parts = key.split(".")
        if grids.intersection(parts[:-1]):
            continue
        if len(parts) > 2 and parts[-3] == "levels" and parts[-2].isdigit():
            norms.setdefault(int(parts[-2]), {})[".".join([*parts[:-3], parts[-1]])] = value
        else:
            result[key] = value
    if precision is not None and precision not in norms:
        raise ValueError(f"warm_start_: the state has normalizations of precisions {sorted(norms)}, not of {precision}")
    return {**result, **(norms[min(norms) if precision is None else precision] if norms else {})}


def _precisions(operation: str, model: nn.Module) -> tuple[int, ...]:
    found = precisions(model)
    if not found:
        raise ValueError(f"{operation}: the model has no quantized layers; call quantize_ first")
    return found


def _layered(quantizer: nn.Module) -> Layered | None:
    """The quantizer itself, or the one that it wraps, if it has planes."""
    return next((module for module in quantizer.modules() if isinstance(module, Layered)), None)


def _check_norms(operation: str, model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, PrecisionBatchNorm) and len({id(m) for m in module.levels.values()}) < len(module.levels):
            raise ValueError(
                f"{operation}: all precisions share the normalization {name!r}, so training one changes the others; "
                "use norm_levels='individual' or 'statistics'"
            )


def _own(model: nn.Module) -> dict[int, list[nn.Parameter]]:
    """Precision -> parameters that are its own, for every precision of the model."""
    found = precision_parameters(model)
    return {p: found.get(p, []) for p in precisions(model)}


class _TrainOnly:
    """Freezes a model but for some parameters, among those that were trained at first."""

    def __init__(self, model: nn.Module) -> None:
        self.before = [(q, q.requires_grad) for q in model.parameters()]

    def __call__(self, wanted: list[nn.Parameter]) -> tuple[nn.Parameter, ...]:
        chosen = {id(q) for q in wanted}
        for q, trained in self.before:
            q.requires_grad_(trained and id(q) in chosen)
            q.grad = None
        return tuple(q for q, _ in self.before if q.requires_grad)


@contextmanager
def _training_only(model: nn.Module) -> Iterator[_TrainOnly]:
    """requires_grad returns to what it was."""
    scheme = _TrainOnly(model)
    try:
        yield scheme
    finally:
        for q, trained in scheme.before:
            q.requires_grad_(trained)
