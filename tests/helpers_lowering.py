"""Small torch networks, made ready to lower, for tests of lowering and verification."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import bitstrata as bs
from bitstrata_runtime import Program, Session

torch.set_num_threads(1)  # maps of a few positions: more threads only wait for each other
STRATA = bs.recipes.strata(w=(1, 4))
MEAN, STD = (0.45, 0.5, 0.4), (0.25, 0.2, 0.3)


class Net(nn.Module):
    """Modules by name, and a forward given as a function of (network, x)."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics, gains (some negative, one zero) and shifts of batch normalizations far from their initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            n = module.num_features
            if module.running_mean is not None:
                module.running_mean.copy_(torch.randn(n, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(n, generator=generator) * 2 + 0.2)
            if module.weight is not None:
                gain = torch.randn(n, generator=generator)
                gain[n // 2] = 0.0
                module.weight.data.copy_(gain)
                module.bias.data.copy_(torch.randn(n, generator=generator) * 0.5)
    return model


def images(shape: tuple[int, ...], count: int = 4, seed: int = 1) -> Tensor:
    """uint8 pixels (count, *shape)."""
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def normalised(pixels: Tensor) -> Tensor:
    """Pixels (N, C, H, W) as the float model takes them, in float64."""
    channels = pixels.shape[1]
    mean, std = (torch.tensor(v[:channels], dtype=torch.float64).view(-1, 1, 1) for v in (MEAN, STD))
    return (pixels.double() / 255 - mean) / std


def prepared(
    model: nn.Module, x: Tensor, recipe: bs.Recipe = STRATA, *, pixels: bool = False, seed: int = 0
) -> nn.Module:
    """`model` with random normalizations, quantized and calibrated on x (a float batch, as the model takes it).

    Every precision's normalizations get gains and shifts of their own, and the statistics of x.
    """
    randomize_(model, seed)
    x = x.float()
    source = bs.Pixels(MEAN[: x.shape[1]], STD[: x.shape[1]]) if pixels else None
    bs.quantize_(model, recipe, x, input=source)
    bs.calibrate_(model, [x])
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, bs.PrecisionBatchNorm):
            for level in module.levels.values():
                for parameter in level.parameters():
                    parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=generator)
    bs.reestimate_batchnorm_(model, [x])
    return model.eval()


def lowered(model: nn.Module, shape: tuple[int, ...], recipe: bs.Recipe = STRATA, *, pixels: bool = False) -> Program:
    """The program of a fresh float model; for tests that look at the program or at an error."""
    x = normalised(images(shape)) if pixels else torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    return bs.lower(prepared(model, x, recipe, pixels=pixels), x)


def assert_equal(model: nn.Module, program: Program, data: Tensor, *, isas: tuple[str, ...] | None = None) -> None:
    """The program is the model at every precision: `verify`, and the logits of both compared without it.

    data: pixels, or floats as the model takes them.
    """
    report = bs.verify(model, program, data, isas=isas)
    assert report.ok, str(report)
    for p in program.precisions:
        mine, theirs = logits(model, program, data, p)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6 * max(1.0, float(np.abs(theirs).max())))


def logits(
    model: nn.Module, program: Program, data: Tensor, choice: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits of the program (reference executor) and of the float64 model on its own, at a precision or a map."""
    pixels = program.input_kind == "pixels"
    session = Session.from_program(program, choice, executor="reference")
    x = data.numpy().reshape(len(data), *program.input_shape)
    scale = session.plan.values[session.plan.output].scale
    assert scale is not None
    mine = session.run_raw(x, floats=not pixels).astype(np.float64) * scale
    twin = copy.deepcopy(model).double().eval()
    bs.set_precision(twin, session.precision_map)
    with torch.no_grad():
        theirs = twin(normalised(data) if pixels else data.double()).numpy()
    return mine.reshape(theirs.shape), theirs
