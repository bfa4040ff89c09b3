"""Networks for tests of passes over plans."""

from __future__ import annotations

import numpy as np
import torch

import bitstrata as bs
import bitstrata_runtime as runtime


def lowered(recipe: bs.Recipe, name: str = "maqd_vgg", **options: int) -> tuple[runtime.Program, np.ndarray]:
    """The program of `trained`'s network, and uint8 images (4, 3, 32, 32)."""
    model, images = trained(recipe, name, **options)
    return bs.lower(model, torch.zeros(1, 3, 32, 32)), images


def trained(recipe: bs.Recipe, name: str = "maqd_vgg", **options: int) -> tuple[torch.nn.Module, np.ndarray]:
    """A calibrated network with normalization scales of both signs and of zero; and uint8 images (4, 3, 32, 32)."""
    torch.manual_seed(0)
    model = bs.zoo.create(name, classes=10, in_channels=3, **options).train()
    x = torch.rand(4, 3, 32, 32)
    bs.quantize_(model, recipe, x[:1], input=bs.Pixels((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    bs.calibrate_(model, [(x - 0.5) / 0.25])
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and weight.dim() == 1 and len(weight) > 2:
            with torch.no_grad():
                weight[::3] *= -1
                weight[1] = 0
    return model.eval(), (x.numpy() * 255).astype(np.uint8)
