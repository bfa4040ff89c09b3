"""What one training step of a configuration computes: losses, gradients, and the optimizer that uses them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bitstrata.objectives import DISTILLATIONS, PrecisionSampler, joint_backward, kl_distillation, make_loss
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


@runtime_checkable
class FollowsSteps(Protocol):
    """An objective that depends on the number of the step; the trainer tells it before each one."""

    def at_step(self, step: int) -> None: ...


class JointObjective:
    """`joint_backward` with fixed options, at the precisions that a sampler gives for the step."""

    def __init__(self, sampler: PrecisionSampler, **options: Any) -> None:
        self.sampler = sampler
        self.options = options
        self.step = 0

    def at_step(self, step: int) -> None:
        """The step of the whole run, from 0, that the next calls belong to."""
        self.step = step

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Mapping[Any, LevelLoss]:
        return joint_backward(model, inputs, targets, precisions=self.sampler.at(self.step), **self.options)


class FloatLoss(NamedTuple):
    """Result of a step of a float network."""

    loss: Tensor
    logits: Tensor


def default_objective(model: nn.Module, config: TrainConfig, teacher: nn.Module | None = None) -> Objective:
    """Joint training of all precisions (or those the configuration names), or the plain loss for a float network.

    Raises:
        ValueError: precisions, a sampling of them or a teacher for a float network, or precisions that the model does
            not have.
    """
    known = precisions(model)
    if not known:
        given = {"teacher": teacher is not None, f"precisions={config.precisions}": config.precisions is not None}
        given[f"sampling={config.sampling!r}"] = config.sampling != "all"
        if any(given.values()):
            name = next(name for name, there in given.items() if there)
            raise ValueError(f"Trainer: {name} is for a quantized network, and this one is float")
        return float_objective(config)
    unknown = sorted(set(config.precisions or known) - set(known))
    if unknown:
        raise ValueError(f"Trainer: precisions={config.precisions} must be among those of the model, {known}")
    distill = None if config.distill is None else DISTILLATIONS[config.distill]
    if config.distill == "kl":
        distill = functools.partial(kl_distillation, temperature=config.distill_temperature)
    return JointObjective(
        PrecisionSampler(config.precisions or known, config.sampling, config.seed),
        loss=loss_of(config),
        distill=distill,
        distill_weight=config.distill_weight,
        teacher=config.teacher if teacher is None else teacher,
        combine=config.combine,
        reduction=config.reduction,
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
