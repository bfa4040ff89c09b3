"""What one training step of a configuration computes: losses, gradients, and the optimizer that uses them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bitstrata.objectives import DISTILLATIONS, joint_backward, kl_distillation, make_loss
from bitstrata.objectives.ranks import Ranks
from bitstrata.prepare import parameter_groups, precisions
from bitstrata.train.config import TrainConfig
from bitstrata.train.evaluate import autocast


class LevelLoss(Protocol):
    """Loss and logits (N, classes) of one precision at one step."""

    @property
    def loss(self) -> Tensor | float: ...
    @property
    def logits(self) -> Tensor: ...


#: Runs forward and backward passes and leaves gradients behind; the trainer clears them and makes the step.
Objective = Callable[[nn.Module, Tensor, Tensor], Mapping[Any, LevelLoss]]


class FloatLoss(NamedTuple):
    """Result of a step of a float network."""

    loss: Tensor
    logits: Tensor


def default_objective(model: nn.Module, config: TrainConfig, teacher: nn.Module | None = None) -> Objective:
    """Joint training of all precisions (or those the configuration names), or the plain loss for a float network.

    Raises:
        ValueError: precisions or a teacher for a float network, or precisions that the model does not have.
    """
    known = precisions(model)
    if not known:
        if teacher is not None or config.precisions is not None:
            name = "teacher" if teacher is not None else f"precisions={config.precisions}"
            raise ValueError(f"Trainer: {name} is for a quantized network, and this one is float")
        return float_objective(config)
    unknown = sorted(set(config.precisions or known) - set(known))
    if unknown:
        raise ValueError(f"Trainer: precisions={config.precisions} must be among those of the model, {known}")
    distill = None if config.distill is None else DISTILLATIONS[config.distill]
    if config.distill == "kl":
        distill = functools.partial(kl_distillation, temperature=config.distill_temperature)
    return functools.partial(
        joint_backward,
        loss=loss_of(config),
        distill=distill,
        distill_weight=config.distill_weight,
        teacher=config.teacher if teacher is None else teacher,
        combine=config.combine,
        reduction=config.reduction,
        precisions=config.precisions,
        amp=torch.bfloat16 if config.amp == "bf16" else None,
    )


def float_objective(config: TrainConfig) -> Objective:
    """Loss and gradients of a network that is not quantized."""
    loss = loss_of(config)

    def float_backward(model: nn.Module, inputs: Tensor, targets: Tensor) -> Mapping[Any, LevelLoss]:
        ranks = Ranks.of(model, inputs)
        with autocast(config.amp, inputs.device), ranks.counting():
            logits = ranks.network(inputs)
            value = loss(logits, targets)
        ranks.share(value).backward()
        ranks.average_()
        return {"float": FloatLoss(value.detach(), logits.detach())}

    return float_backward


def loss_of(config: TrainConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The configuration's loss with its options."""
    if config.loss == "maqd":
        return make_loss("maqd", gamma=config.loss_gamma)
    return make_loss(config.loss, label_smoothing=config.label_smoothing)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer over `parameter_groups`; each group remembers its peak learning rate as "peak_lr"."""
    groups = [
        {**group, "peak_lr": group.get("lr", config.lr)}
        for group in parameter_groups(model, config.weight_decay, config.decay)
    ]
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)
