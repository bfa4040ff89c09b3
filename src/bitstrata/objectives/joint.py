"""Joint training of all precisions with distillation (vertical layering, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..prepare.parameters import precision_parameters
from ..prepare.precision import precision, precisions
from ..prepare.step import weights_of_a_step
from ..prepare.wrapped import refuse_wrapped
from .distill import DISTILLATIONS, Distillation
from .losses import Loss
from .mgd import min_norm_point
from .ranks import Ranks

COMBINE = ("scalarization", "mgd")
REDUCTIONS = ("mean", "sum")
TEACHERS = ("next", "widest")


@dataclass(frozen=True)
class JointLoss:
    """One precision's share of a joint step.

    loss: its whole loss (with distillation), detached. logits: detached. alpha: what its gradient was multiplied by in
    the shared parameters' gradient.
    """

    loss: Tensor
    logits: Tensor
    alpha: float = 1.0


def joint_backward(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss = F.cross_entropy,
    distill: str | Distillation | None = "cosine",
    distill_weight: float = 1.0,
    teacher: str | nn.Module = "next",
    combine: str = "scalarization",
    reduction: str = "mean",
    precisions: Iterable[int] | Mapping[int, float] | None = None,
    amp: torch.dtype | None = None,
) -> dict[int, JointLoss]:
    """Run one batch at every precision, widest first, and add the gradients of the joint objective to `.grad`.

    L_b = loss(logits_b, targets) + distill_weight * distill(logits_b, teacher's logits). Parameters that all
    precisions share (weights, source steps, edge layers) receive sum_b alpha_b dL_b; those of one precision
    (normalization, activation steps, scale ratios) the unscaled dL_b. The caller zeroes gradients and steps
    the optimizer, so gradient accumulation and clipping work as usual.

    Weights that all precisions quantize alike (edge layers), and what is done to a weight before it is quantized, are
    computed once for all precisions; weights of a module in several places once a precision (see `step_weights`, which
    serves layers that are applied repeatedly). Not with "mgd" or in wrapped models.
    combine="mgd" holds one shared gradient a precision in memory, and takes gradients without running hooks on their
    accumulation. Source: vertical layering (Wu et al.), eqs. 9-11, sections 4.2.2-4.2.3.

    In `DistributedDataParallel` the gradients of the wrapped network are averaged over ranks once, after the last
    precision (not inside `no_sync`); for "mgd" each precision's are, so that every rank finds the same alphas. `loss`
    has to be a mean over samples; ranks may have different numbers of them.

    Args:
        model: a quantized model, in training mode, or `DistributedDataParallel` of one, or one that `fully_shard` has
            sharded ("mgd" needs whole gradients, which the latter has not).
        inputs, targets: as the model and `loss` take them.
        loss: called with (logits, targets), returns a scalar.
        distill: "cosine", "kl", a function of (student logits, teacher logits), or None for no distillation.
        distill_weight: factor of the distillation loss, not negative.
        teacher: "next" (the next higher of the trained precisions), "widest" (the highest of them), or a network of
            its own, which runs in evaluation mode without gradient, keeps its mode, and teaches the widest too.
        combine: "scalarization" (alpha_b by `reduction`) or "mgd" (multiple gradient descent: the alpha on the simplex
            that makes the shared gradient shortest, see `min_norm_point`).
        reduction: "mean" (alpha_b = 1/number of precisions) or "sum" (alpha_b = 1); for scalarization.
        precisions: which to train; all by default. A mapping gives each a positive weight c_b, as `PrecisionSampler.at`
            does: alpha_b = c_b / sum of c ("mean") or c_b ("sum").
        amp: dtype for torch.autocast on the forward pass, e.g. torch.bfloat16; None for none.

    Returns:
        precision -> `JointLoss`, widest first.

    Raises:
        TypeError: the model returns something else than a tensor.
        ValueError: a float model, an unknown precision, an option out of its range, or a loss without gradient.
        FloatingPointError: combine="mgd" with gradients that are not finite; no gradient has been added.
    """
    chosen = _chosen(model, precisions)
    _check_option("combine", combine, COMBINE)
    _check_option("reduction", reduction, REDUCTIONS)
    if combine == "mgd" and reduction != "mean":
        raise ValueError(
            f"joint_backward: combine='mgd' chooses the factors itself, so reduction={reduction!r} is void"
        )
    if combine == "mgd" and len(set(chosen.values())) > 1:
        raise ValueError(f"joint_backward: combine='mgd' chooses the factors itself, so weights {chosen} are void")
    guide = _Guide(_distillation(distill), distill_weight, _checked_teacher(model, teacher, distill))
    ranks = Ranks.of(model, inputs)
    if ranks.sharded and combine == "mgd":
        raise ValueError("joint_backward: combine='mgd' needs whole gradients, and FSDP shards this model's over ranks")
    model = ranks.network
    step = _Step(model, inputs, targets, loss, guide, amp, ranks)
    owner = _owners(model)
    if combine == "mgd":
        return _descend(step, tuple(chosen), owner)
    whole = sum(chosen.values()) if reduction == "mean" else 1.0
    result: dict[int, JointLoss] = {}
    inverse = {p: whole / weight for p, weight in chosen.items()}
    unscaled = _unscaled_sharded_gradients if ranks.sharded else _unscaled_precision_gradients
    with unscaled(model, owner, inverse), weights_of_a_step(model) as weights:
        for p, weight in chosen.items():
            factor = weight / whole
            with precision(model, p):
                total, logits = step.forward(p)
                ranks.share(total * factor if factor != 1.0 else total).backward()
            weights.settle(everything=False)
            result[p] = JointLoss(total.detach(), logits, factor)
        weights.settle()
    ranks.average_()
    return result


@dataclass
class _Guide:
    """What the student at hand learns from, beside the labels."""

    distillation: Distillation | None
    weight: float
    teacher: str | nn.Module
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"joint_backward: distill_weight must not be negative, got {self.weight!r}")

    def ask(self, inputs: Tensor) -> Tensor | None:
        """The teacher's logits, or None where there is no teacher (the widest precision)."""
        if self.logits is None and isinstance(self.teacher, nn.Module) and self.distillation is not None:
            with _evaluating(self.teacher), torch.no_grad():
                self.logits = self.teacher(inputs)
        return self.logits

    def learned(self, logits: Tensor) -> None:
        """Take note of what a precision has answered: it may teach the narrower ones."""
        if self.teacher == "next" or (self.teacher == "widest" and self.logits is None):
            self.logits = logits


@dataclass
class _Step:
    """Forward passes of one batch."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Loss
    guide: _Guide
    amp: torch.dtype | None
    ranks: Ranks

    def forward(self, p: int) -> tuple[Tensor, Tensor]:
        """Loss with its graph, and detached logits, at the model's current precision p."""
        autocast = torch.autocast(self.inputs.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None)
        with autocast, self.ranks.counting():
            taught = self.guide.ask(self.inputs)
            logits = _logits(self.model(self.inputs))
            total = self.loss(logits, self.targets)
            if self.guide.distillation is not None and taught is not None:
                total = total + self.guide.weight * self.guide.distillation(logits, taught)
        if not total.requires_grad:
            raise ValueError(f"joint_backward: the loss at precision {p} depends on no parameter that is trained")
        detached = logits.detach()
        self.guide.learned(detached)
        return total, detached


def losses_of_a_step(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss = F.cross_entropy,
    distill: str | Distillation | None = "cosine",
    distill_weight: float = 1.0,
    teacher: str | nn.Module = "next",
    amp: torch.dtype | None = None,
) -> Callable[[int], Tensor]:
    """The losses that `joint_backward` differentiates, one at a time, with their graphs.

    Args:
        All: as `joint_backward` takes them.

    Returns:
        A function of a precision. A precision learns from those that it was called with before, so they come widest
        first, each once.

    Raises:
        ValueError: an option out of its range, a wrapped model, or (the function) a loss without gradient.
    """
    refuse_wrapped("losses_of_a_step", model)
    guide = _Guide(_distillation(distill), distill_weight, _checked_teacher(model, teacher, distill))
    step = _Step(model, inputs, targets, loss, guide, amp, Ranks(model))

    def at(p: int) -> Tensor:
        with precision(model, p):
            return step.forward(p)[0]

    return at


def _logits(output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"joint_backward: the model returns a {type(output).__name__}, expected one tensor of logits; wrap it in a "
            "network whose forward returns the logits alone"
        )
    return output


@dataclass
class _Gradients:
    """Gradients of one precision: of the shared parameters, and of those that are its own."""

    shared: list[Tensor | None]
    own: dict[nn.Parameter, Tensor] = field(default_factory=dict)


def _descend(step: _Step, chosen: tuple[int, ...], owner: dict[int, int]) -> dict[int, JointLoss]:
    """Multiple gradient descent over the shared parameters; everything is added to `.grad` at the end."""
    trained = [(name, q) for name, q in step.model.named_parameters() if q.requires_grad]
    shared = [(name, q) for name, q in trained if id(q) not in owner]
    losses: dict[int, tuple[Tensor, Tensor]] = {}
    gradients: list[_Gradients] = []
    for p in chosen:
        own = [q for _, q in trained if owner.get(id(q)) == p]
        with precision(step.model, p):
            total, logits = step.forward(p)
            wanted = [q for _, q in shared] + own
            mine = torch.autograd.grad(step.ranks.share(total), wanted, allow_unused=True)
            found = step.ranks.mean(mine, wanted)
        losses[p] = (total.detach(), logits)
        kept = {q: g for q, g in zip(own, found[len(shared) :], strict=True) if g is not None}
        gradients.append(_Gradients(list(found[: len(shared)]), kept))
    alphas = _alphas([g.shared for g in gradients], [name for name, _ in shared], chosen)
    for index, (_, q) in enumerate(shared):
        parts = [(a, g.shared[index]) for a, g in zip(alphas, gradients, strict=True)]
        present = [(a, g) for a, g in parts if g is not None]
        if present:
            combined = torch.zeros_like(q)
            for a, g in present:
                combined.add_(g, alpha=a)
            _accumulate(q, combined)
    for found_at in gradients:
        for q, g in found_at.own.items():
            _accumulate(q, torch.empty_like(q).copy_(g))
    return {p: JointLoss(*losses[p], alpha) for p, alpha in zip(chosen, alphas, strict=True)}


def _alphas(gradients: list[list[Tensor | None]], names: list[str], chosen: tuple[int, ...]) -> list[float]:
    """Factors of the precisions from the inner products of their gradients; equal ones if nothing is shared."""
    if not names:
        return [1.0 / len(chosen)] * len(chosen)
    gram = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
    for index, name in enumerate(names):
        column = [g[index] for g in gradients]
        if any(g is not None and g.is_sparse for g in column):
            raise ValueError(f"joint_backward: combine='mgd' needs dense gradients, that of {name!r} is sparse")
        like = next((g for g in column if g is not None), None)
        if like is not None:
            rows = torch.stack([torch.zeros_like(like) if g is None else g for g in column]).flatten(1)
            gram += (rows @ rows.T).to("cpu", torch.float64)
    if not bool(torch.isfinite(gram).all()):
        bad = [p for p, norm in zip(chosen, gram.diagonal(), strict=True) if not math.isfinite(float(norm))]
        raise FloatingPointError(f"joint_backward: gradients at precisions {bad} are not finite")
    return [float(a) for a in min_norm_point(gram=gram)]


@torch.no_grad()
def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to `.grad`, as a backward pass does."""
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets back the mode that it had."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _chosen(model: nn.Module, wanted: Iterable[int] | Mapping[int, float] | None) -> dict[int, float]:
    """Precision -> weight, widest first."""
    known = precisions(model)
    if not known:
        raise ValueError("joint_backward: the model has no quantized layers; call quantize_ first")
    if not isinstance(wanted, Mapping):
        wanted = dict.fromkeys(known if wanted is None else wanted, 1.0)
    unknown = [p for p in wanted if p not in known]
    if unknown or not wanted:
        raise ValueError(f"joint_backward: precisions must be among {known}, got {tuple(sorted(wanted))}")
    for p, weight in wanted.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"joint_backward: the weight of precision {p} must be positive, got {weight!r}")
    return {p: float(wanted[p]) for p in sorted(wanted, reverse=True)}


def _check_option(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"joint_backward: {name} must be one of {allowed}, got {value!r}")


def _distillation(distill: str | Callable[[Tensor, Tensor], Tensor] | None) -> Distillation | None:
    if distill is None or callable(distill):
        return distill
    if distill not in DISTILLATIONS:
        raise ValueError(f"joint_backward: distill must be one of {sorted(DISTILLATIONS)} or None, got {distill!r}")
    return DISTILLATIONS[distill]


def _checked_teacher(model: nn.Module, teacher: str | nn.Module, distill: object) -> str | nn.Module:
    if not isinstance(teacher, nn.Module):
        if teacher not in TEACHERS:
            raise ValueError(f"joint_backward: teacher must be one of {TEACHERS} or a network, got {teacher!r}")
        return teacher
    if distill is None:
        raise ValueError("joint_backward: a teacher network is given, but distill is None")
    if not {id(m) for m in teacher.modules()}.isdisjoint(id(m) for m in model.modules()):
        raise ValueError("joint_backward: the teacher shares modules with the model; it must be a network of its own")
    return teacher


def _owners(model: nn.Module) -> dict[int, int]:
    """id of a parameter -> the one precision that uses it; parameters of several precisions count as shared."""
    users: dict[int, set[int]] = {}
    for p, group in precision_parameters(model).items():
        for q in group:
            users.setdefault(id(q), set()).add(p)
    return {key: next(iter(found)) for key, found in users.items() if len(found) == 1}


@contextmanager
def _unscaled_precision_gradients(
    model: nn.Module, owner: dict[int, int], inverse: Mapping[int, float]
) -> Iterator[None]:
    """Multiply what flows into parameters of precision p alone by inverse[p] = 1/alpha_p, undoing alpha_p for them."""
    scaled = [(q, inverse.get(owner[id(q)], 1.0)) for q in model.parameters() if q.requires_grad and id(q) in owner]
    handles = [q.register_hook(lambda grad, f=f: grad * f) for q, f in scaled if f != 1.0]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unscaled_sharded_gradients(
    model: nn.Module, owner: dict[int, int], inverse: Mapping[int, float]
) -> Iterator[None]:
    """The same where the parameters are sharded, whose gradients come from elsewhere than a hook could see."""
    scaled = [(q, inverse.get(owner[id(q)], 1.0)) for q in model.parameters() if q.requires_grad and id(q) in owner]
    before = [q.grad for q, _ in scaled]
    for q, _ in scaled:
        q.grad = None
    yield
    for (q, factor), earlier in zip(scaled, before, strict=True):
        if q.grad is not None:
            q.grad.mul_(factor)
        if earlier is not None:
            q.grad = earlier if q.grad is None else q.grad.add_(earlier)
