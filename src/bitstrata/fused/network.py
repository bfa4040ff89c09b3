"""fuse: a training step whose convolutions, normalizations and rectifiers run as one operation, in integers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..integer.pool import Pool
from ..nn.integer_layers import IntegerLayer
from ..nn.l1_norm import QuantizedL1BatchNorm
from ..nn.layers import QuantizedLayer
from ..nn.norm import PrecisionBatchNorm
from ..nn.own import OwnLayer
from ..quantizers.base import Quantizer
from .plan import Planner, trace
from .qat_plan import QatPlanner, can_run
from .qat_units import entry, track
from .qat_values import from_torch as wrap
from .units import Step, Unit
from .values import Flow, NotFiniteError, from_torch

RECOMPUTE = 160  # products of a sum: few, so that keeping it costs more than it would to make it again


class FusedNetwork(nn.Module):
    """What `fuse` makes: trains `model`, whose parameters and buffers it uses, and is otherwise the same function.

    In training mode a convolution and the normalization and rectifier after it are one unit; whatever else the network
    does runs in torch between units. In evaluation mode, or where a part of the model is, `model` runs. Hooks on fused
    modules do not run; a module that had some when it was fused is not fused. The result is differentiable once, and
    its backward pass runs once. Parameters are inputs of the one autograd function, so gradients accumulate, and hooks
    on parameters run, as with `model`.

    After `integer_` (training in integers): sums stay in integers until they are the normalization's 8-bit codes, and
    these become the next layer's codes without floats in between. Of each such unit the 8-bit codes are all that is
    kept for the backward pass; where a convolution reads a residual sum, its codes of that are too, packed where they
    have up to 4 bits. Residual sums, and what torch does, stay in float32. Results, gradients, running statistics and
    random bits equal those of `model` itself to the last bit. Under on_nonfinite "skip" a gradient that
    is not finite makes all gradients of the step 0 (in `model`, those of its layer and of what lies before it); a
    forward pass with values that are not finite is `model`'s.

    After `quantize_` (quantization-aware training): a convolution is computed in the integer codes of its input and its
    weight, at the precision that the model has at the call, exactly; batch statistics come from these integers. So is
    a first one that reads pixels, unless somebody wants the gradient of the input. Kept
    for the backward pass are integer sums (16 bits), or nothing where they are made again (see `recompute` of `fuse`),
    and residual sums as floats.
    The gradients are those of the fake-quantized formula. Floats are bfloat16 where torch.autocast("cpu",
    torch.bfloat16) is active at the call: residual sums and the gradients of activations are rounded to it once, and
    torch's own operations run under autocast; otherwise all is float32. Products of the backward pass are torch's or,
    in bfloat16 where `qat_products` says so, the engine's, which for dense 3x3 convolutions round sums and differences
    of two gradients of a row to bfloat16 too. All but torch's is the same to the bit for every number of threads.
    A step that the units cannot take is
    `model`'s: while steps of activations are not set yet or calibration goes on.

    Attributes:
        model: the network; its state_dict is what to save.
        fused: names of the convolutions in fused units.
    """

    def __init__(self, model: nn.Module, recompute: int | None = None) -> None:
        super().__init__()
        self.model = model
        self._parts = tuple(model.modules())
        self._graph = trace(model)
        self._quantized = any(isinstance(part, QuantizedLayer) for part in self._parts)
        if recompute is not None and not self._quantized:
            raise ValueError(f"fuse: recompute={recompute} is for models after quantize_, not for training in integers")
        repeated = RECOMPUTE if recompute is None else recompute
        planner = QatPlanner(model, self._graph, repeated) if self._quantized else Planner(model, self._graph)
        self._units = planner.plan()
        self._input = next(n for n in self._graph.nodes if n.op == "placeholder").name
        output = next(n for n in self._graph.nodes if n.op == "output").args[0]
        self._output = output.name
        self._last_reads = _last_reads(self._units, self._output)
        self._pool, self._lasting = Pool(), Pool()
        self.fused = tuple(planner.fused)
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """The model's result for x, (N, C, H, W).

        Raises:
            ValueError: x is not float32 on the CPU in training mode; NaN or infinity (NotFiniteError, which names the
                layer), in training in integers under on_nonfinite "error"; whatever the model raises.
        """
        if not self.training or not all(part.training for part in self._parts):
            return self.model(x)
        if x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(
                f"fused network: the input must be (N, C, H, W) in float32 on the CPU, got {tuple(x.shape)} of "
                f"{x.dtype} on {x.device}"
            )
        if x.numel() == 0 or not self._can_run():
            return self.model(x)
        parameters = self._parameters_now()
        try:
            return _Step.apply(x, self, parameters, *parameters)
        except NotFiniteError:
            if self._skips():
                return self.model(x)
            raise

    def _parameters_now(self) -> list[nn.Parameter]:
        """Parameters that are trained, without those that belong to other precisions than the present one."""
        found = {id(p): p for part in self._parts for p in part._parameters.values() if p is not None}
        for part in self._parts:
            if isinstance(part, Quantizer | PrecisionBatchNorm | OwnLayer):
                for precision, own in part.precision_parameters().items():
                    for p in own if precision != part.precision else ():
                        found.pop(id(p), None)
        return [p for p in found.values() if p.requires_grad]

    def _can_run(self) -> bool:
        if not self._quantized:
            return True
        casts = torch.is_autocast_enabled("cpu")
        return can_run(self._units) and (not casts or torch.get_autocast_dtype("cpu") == torch.bfloat16)

    def _run(self, x: Tensor, *, real: torch.dtype, record: bool) -> tuple[Step, Flow]:
        if self._quantized:
            step = Step(self._pool, self._lasting, wrap=partial(wrap, real=real), real=real)
            step.env[self._input] = entry(x, self._pool, real)
        else:
            step = Step(self._pool, self._lasting)
            step.env[self._input] = from_torch(x, self._pool)
        self._prepare(step, backward=False)
        for i, unit in enumerate(self._units):
            unit.run(step)
            if not record:
                step.tape.clear()
            for name in self._last_reads.get(i, ()):
                value = step.env[name]
                if isinstance(value, Flow):
                    value.forget()
        track(step) if self._quantized else _track(step)
        return step, step.env[self._output]

    def _prepare(self, step: Step, *, backward: bool) -> None:
        for unit in self._units:
            unit.prepare(step, backward=backward)

    def _skips(self) -> bool:
        return any(layer.rule.on_nonfinite == "skip" for layer in self.modules() if isinstance(layer, IntegerLayer))

    def _skipped(self, ctx: Any) -> tuple[Tensor | None, ...]:
        for layer in self.modules():
            if isinstance(layer, IntegerLayer):
                layer.state.skipped += 1
        gx = torch.zeros_like(ctx.x) if ctx.needs_input_grad[0] else None
        return gx, None, None, *(torch.zeros_like(p) for p in ctx.parameters)

    def extra_repr(self) -> str:
        return f"{len(self.fused)} convolutions fused"


def _last_reads(units: list[Unit], output: str) -> dict[int, list[str]]:
    """Unit number -> names that no later unit reads."""
    last = {name: i for i, unit in enumerate(units) for name in unit.reads}
    out: dict[int, list[str]] = {}
    for name, i in last.items():
        if name != output:
            out.setdefault(i, []).append(name)
    return out


def _track(step: Step) -> None:
    """Running statistics of all normalizations, moved at once where they share a momentum."""
    by_momentum: dict[float | None, list[tuple[QuantizedL1BatchNorm, Any]]] = {}
    for norm, found in step.statistics:
        by_momentum.setdefault(norm.momentum, []).append((norm, found))
    for momentum, group in by_momentum.items():
        if momentum is None or len({id(norm) for norm, _ in group}) < len(group):
            for norm, found in group:
                norm.track(torch.from_numpy(found.mean), torch.from_numpy(found.deviation))
            continue
        for norm, found in group:
            found.track(norm.running_mean.numpy(), norm.running_deviation.numpy(), momentum)
        torch._foreach_add_([norm.num_batches_tracked for norm, _ in group], 1)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, network: FusedNetwork, parameters: list[nn.Parameter], *_: Tensor) -> Tensor:
        ctx.network, ctx.parameters, ctx.x = network, parameters, x.detach() if x.requires_grad else None
        ctx.step = None
        record = any(ctx.needs_input_grad)
        real = torch.bfloat16 if network._quantized and torch.is_autocast_enabled("cpu") else torch.float32
        with torch.autocast("cpu", enabled=False):
            step, value = network._run(x, real=real, record=record)
        ctx.step, ctx.value, ctx.entry = step, value, step.env[network._input]
        step.env = {}
        return value.as_leaf().detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        step = ctx.step
        if step is None:
            raise RuntimeError("fused network: the backward pass of a step runs once; its codes are gone")
        ctx.step = None
        gx = None
        with torch.autocast("cpu", enabled=False):
            ctx.value.deliver(gradient)
            ctx.value = None
            ctx.network._prepare(step, backward=True)
            try:
                while step.tape:
                    step.tape.pop()(step)
            except BaseException as error:
                step.pool.forget()
                if isinstance(error, NotFiniteError) and ctx.network._skips():
                    return ctx.network._skipped(ctx)
                raise
            if ctx.needs_input_grad[0]:
                gx = ctx.entry.take_gradient(step, ctx.x)
            ctx.entry.release()
        return gx, None, None, *(step.gradients.get(id(p)) for p in ctx.parameters)


def fuse(model: nn.Module, *, recompute: int | None = None) -> FusedNetwork:
    """A network whose training step has convolutions, normalizations and rectifiers fused; see `FusedNetwork`.

    Args:
        model: after `integer_`, or after `quantize_`, on the CPU. It is used, not copied or changed.
        recompute: after `quantize_`, memory for time: a convolution whose sums have at most so many products (input
            channels of a group times the kernel's size) is computed again in the backward pass, of which the result
            is the same to the bit; the sums of others are kept. 0 repeats none. Default RECOMPUTE.

    Raises:
        TypeError: model is no module, or recompute no integer.
        ValueError: recompute is negative, or the model trains in integers, where it means nothing.
        FuseError: a forward pass that cannot be traced (it depends on values), or of several tensors; nothing to fuse.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}")
    if recompute is not None and (isinstance(recompute, bool) or not isinstance(recompute, int)):
        raise TypeError(f"fuse: recompute must be a number of products, got {recompute!r}")
    if recompute is not None and recompute < 0:
        raise ValueError(f"fuse: recompute must be at least 0, got {recompute}")
    return FusedNetwork(model, recompute)


__all__ = ["FusedNetwork", "NotFiniteError", "fuse"]
