"""fuse: a training step whose convolutions, normalizations and rectifiers run as integers from end to end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..nn.integer_layers import IntegerLayer
from ..nn.l1_norm import QuantizedL1BatchNorm
from .plan import Planner, trace
from .pool import Pool
from .units import ConvNorm, Step, Unit, as_map
from .values import NotFiniteError, Plain, Real, Value


class FusedNetwork(nn.Module):
    """What `fuse` makes: trains `model`, whose parameters and buffers it uses, and is otherwise the same function.

    In training mode a convolution and the quantized normalization and rectifier after it are one unit: sums stay in
    integers until they are the normalization's 8-bit codes, and these become the next layer's codes without floats in
    between. Of each such unit the 8-bit codes are all that is kept for the backward pass. Residual sums, and whatever
    else the network does, stay in float32. Results, gradients, running statistics and random bits equal those of
    `model` itself to the last bit.

    Under on_nonfinite "skip" a gradient that is not finite makes all gradients of the step 0 (in `model`, those of its
    layer and of what lies before it); a forward pass with values that are not finite is `model`'s.

    In evaluation mode, or where a part of the model is, `model` runs. Hooks on fused modules do not run; a module that
    had some when it was fused is not fused. The result is differentiable once, and its backward pass runs once.

    Attributes:
        model: the network; its state_dict is what to save.
        fused: names of the convolutions in fused units.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._parts = tuple(model.modules())
        self._graph = trace(model)
        self._units = Planner(model, self._graph).plan()
        self._input = next(n for n in self._graph.nodes if n.op == "placeholder").name
        output = next(n for n in self._graph.nodes if n.op == "output").args[0]
        self._output = output.name
        self._last_reads = _last_reads(self._units, self._output)
        self._pool = Pool()
        self.fused = tuple(_name(model, unit.conv) for unit in self._units if isinstance(unit, ConvNorm))
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """The model's result for x, (N, C, H, W).

        Raises:
            ValueError: x is not float32 on the CPU in training mode; whatever the model raises, also for NaN or
                infinity under on_nonfinite "error".
        """
        if not self.training or not all(part.training for part in self._parts):
            return self.model(x)
        if x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(
                f"fused network: the input must be (N, C, H, W) in float32 on the CPU, got {tuple(x.shape)} of "
                f"{x.dtype} on {x.device}"
            )
        if x.numel() == 0:
            return self.model(x)
        found = {id(p): p for part in self._parts for p in part._parameters.values() if p is not None}
        parameters = [p for p in found.values() if p.requires_grad]
        try:
            return _Step.apply(x, self, parameters, *parameters)
        except NotFiniteError:
            if self._skips():
                return self.model(x)
            raise

    def _run(self, x: Tensor, *, record: bool) -> tuple[Step, Value]:
        step = Step(self._pool)
        n, c, h, w = x.shape
        rows = x.detach().permute(0, 2, 3, 1).contiguous().view(n * h * w, c)
        entry = Real(rows.numpy(), (n, h, w, c), self._pool, escaped=True)
        entry.wanted = x.requires_grad
        step.env[self._input] = entry
        for i, unit in enumerate(self._units):
            unit.run(step)
            if not record:
                step.tape.clear()
            for name in self._last_reads.get(i, ()):
                value = step.env[name]
                if isinstance(value, Value):
                    value.forget()
        _track(step)
        return step, step.env[self._output]

    def _skips(self) -> bool:
        return any(layer.rule.on_nonfinite == "skip" for layer in self.modules() if isinstance(layer, IntegerLayer))

    def _skipped(self, ctx: Any) -> tuple[Tensor | None, ...]:
        for layer in self.modules():
            if isinstance(layer, IntegerLayer):
                layer.state.skipped += 1
        gx = torch.zeros(ctx.entry.shape).permute(0, 3, 1, 2) if ctx.needs_input_grad[0] else None
        return gx, None, None, *(torch.zeros_like(p) for p in ctx.parameters)

    def extra_repr(self) -> str:
        return f"{len(self.fused)} convolutions fused"


def _name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


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
        running = [t for norm, _ in group for t in (norm.running_mean, norm.running_deviation)]
        batch = [torch.from_numpy(a) for _, found in group for a in (found.mean, found.deviation)]
        torch._foreach_mul_(running, 1 - momentum)
        torch._foreach_add_(running, torch._foreach_mul(batch, momentum))
        torch._foreach_add_([norm.num_batches_tracked for norm, _ in group], 1)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, network: FusedNetwork, parameters: list[nn.Parameter], *_: Tensor) -> Tensor:
        ctx.network, ctx.parameters, ctx.x = network, parameters, x.detach() if x.requires_grad else None
        ctx.step = None
        record = any(ctx.needs_input_grad)
        with torch.autocast("cpu", enabled=False):
            step, value = network._run(x, record=record)
        ctx.step, ctx.value, ctx.entry = step, value, step.env[network._input]
        step.env = {}
        if isinstance(value, Plain):
            return value.tensor.detach()
        value.escaped = True
        return as_map(value.real(), value.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        step, value = ctx.step, ctx.value
        if step is None:
            raise RuntimeError("fused network: the backward pass of a step runs once; its codes are gone")
        ctx.step = None
        gx = None
        with torch.autocast("cpu", enabled=False):
            if isinstance(value, Plain):
                value.add_gradient(gradient)
            else:
                rows = step.pool.take(value.rows, np.float32)
                as_map(rows, value.shape).copy_(gradient)
                value.gradient.append(rows)
            try:
                while step.tape:
                    step.tape.pop()(step)
            except BaseException as error:
                step.pool.forget()
                if isinstance(error, NotFiniteError) and ctx.network._skips():
                    return ctx.network._skipped(ctx)
                raise
            if ctx.needs_input_grad[0] and ctx.entry.gradient:
                total, _ = ctx.entry.gradient.total(step.pool)
                gx = as_map(total.copy(), ctx.entry.shape)
                step.pool.give(total)
            ctx.entry.release()
        return gx, None, None, *(step.gradients.get(id(p)) for p in ctx.parameters)


def fuse(model: nn.Module) -> FusedNetwork:
    """A network that trains in integers with convolutions, normalizations and rectifiers fused; see `FusedNetwork`.

    Args:
        model: after `integer_`, on the CPU. It is used, not copied or changed.

    Raises:
        TypeError: model is no module.
        FuseError: a forward pass that cannot be traced (it depends on values), or of several tensors; nothing to fuse.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}")
    return FusedNetwork(model)


__all__ = ["FusedNetwork", "NotFiniteError", "fuse"]
