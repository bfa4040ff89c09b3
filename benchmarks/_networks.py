"""The networks that are timed: a float network, and the integer program made of it."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import bitstrata as bs
from bitstrata_runtime import Program

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
BITS = (1, 2, 3, 4)
_IMAGES = 8  # in a calibration batch


@dataclass(frozen=True)
class Case:
    """A zoo network at one input size. Only its shape matters here: weights are random."""

    name: str
    network: str
    side: int
    classes: int
    options: tuple[tuple[str, str], ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its input."""
        return 3, self.side, self.side


CASES = {
    case.name: case
    for case in (
        Case("resnet20", "resnet20", 32, 10),
        Case("resnet18", "resnet18", 224, 1000),
        Case("mobilenetv2", "mobilenet_v2", 224, 1000),
    )
}


def pixels(case: Case, count: int, seed: int = 1) -> NDArray[np.uint8]:
    """Random pixels, uint8 (count, C, H, W)."""
    return np.random.default_rng(seed).integers(0, 256, (count, *case.shape), dtype=np.uint8)


def normalized(images: NDArray[np.uint8]) -> Tensor:
    """What the float network reads for these pixels, float32 (N, C, H, W)."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return (torch.from_numpy(images).float() / 255 - mean) / std


def calibration(case: Case) -> list[Tensor]:
    """Inputs to calibrate with, the same for ours and for the peers."""
    return [normalized(pixels(case, _IMAGES, seed)) for seed in (2, 3)]


def float_network(case: Case) -> nn.Module:
    """Random weights, and batch-normalization statistics of the calibration inputs; in evaluation mode."""
    torch.set_num_threads(1)  # nothing here is timed, and several threads are slow on a machine that is busy
    torch.manual_seed(0)
    model = bs.zoo.create(case.network, classes=case.classes, **dict(case.options)).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the plain average over the inputs
    with torch.no_grad():
        for x in calibration(case):
            model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def program(case: Case, model: nn.Module, w: tuple[int, ...] = BITS, a: int | str = "same") -> Program:
    """The integer program of a copy of `model`, quantized by the strata recipe for these widths and calibrated."""
    torch.set_num_threads(1)
    model = copy.deepcopy(model).train()
    example = calibration(case)[0][:1]
    bs.quantize_(model, bs.recipes.strata(w=w, a=a), example, input=bs.Pixels(MEAN, STD))
    bs.calibrate_(model, calibration(case))
    with warnings.catch_warnings():  # few fraction bits cost accuracy, which random weights have none of
        warnings.simplefilter("ignore")
        return bs.lower(model.eval(), example)
