"""Fake quantizers, inputs and parameters that tests of their kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

from bitstrata.functional.affine import Affine
from bitstrata.functional.clipping import Clipping
from bitstrata.functional.companded import Companded
from bitstrata.functional.formula import Formula
from bitstrata.functional.multi_state import Scaled, Sigmoids
from bitstrata.functional.nested import Nested
from bitstrata.functional.symmetric import Symmetric
from bitstrata.functional.uniform import Uniform
from bitstrata.functional.vertical import Vertical

DTYPES = (torch.float32, torch.bfloat16)
BY_CHANNEL = ("uniform", "symmetric", "nested", "vertical")
CASES = (
    Uniform(0, 15), Uniform(0, 1, True), Uniform(-8, 7), Uniform(-2, 1, True), Uniform(0, 255, True),
    Uniform(-127, 127, False, True), Symmetric(1), Symmetric(2), Symmetric(4), Symmetric(8), Nested(4, 4), Nested(4, 1),
    Nested(8, 3), Nested(1, 1), Vertical(8, 8, 0.0, 0.0), Vertical(8, 2, 63 / 128, 63 / 128), Vertical(4, 3, 0.25, 0.0),
    Affine(15), Affine(1), Affine(255), Clipping(15, False, False), Clipping(15, False, True), Clipping(1, True, True),
    Clipping(15, True, False), Clipping(3, False, False, True), Clipping(255, True, True),
)  # fmt: skip
FREE = (  # those whose grid has no step
    Scaled(1, 1.0, 1 / 3, 1 / 3), Scaled(4, 4.0, 0.5, 1.0), Scaled(15, 7.5, 1 / 3, 1 / 3), Scaled(127, 127.0, 0.5, 0.5),
    Sigmoids(1, 0.25, 1.0), Sigmoids(15, 0.25, 1 / 15), Sigmoids(3, 3.0, 1.0), Sigmoids(255, 0.05, 1 / 255),
    Companded(4, False, 0.5, False, True), Companded(2, True, 0.0, False, False),
    Companded(1, False, 0.5, False, False), Companded(8, True, 0.5, False, True),
    Companded(8, False, 0.5, False, False),
)  # fmt: skip
NAN, INF = float("nan"), float("inf")


def name_of(case: Formula) -> str:
    return case.name + "".join(f"-{v:g}" for v in case.numbers())


def sample(shape: tuple[int, ...], step: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values of a few steps, a third of them exact multiples of half a step; zeros, bounds and far outside."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator) * step.abs()
    ties = torch.randint(-40, 41, shape, generator=generator) * 0.5 * step.abs()
    x = torch.where(torch.rand(shape, generator=generator) < 0.33, ties, x)
    special = torch.tensor([0.0, -0.0, 300.0, -300.0, 1e30, -1e30, INF, -INF, 1e-30, -1e-30]) * step.abs().flatten()[0]
    where = torch.randperm(x.numel(), generator=generator)[: min(x.numel(), 40) // 2]
    x.view(-1)[where] = special.repeat(4)[: len(where)]
    return x.to(dtype)


def parameters(case: Formula, channels: int = 1, dims: int = 1, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """A step that is no round number, one a channel if there are several, and the extra parameter."""
    generator = torch.Generator().manual_seed(seed + 99)
    shape = (channels, *[1] * (dims - 1)) if channels > 1 else (1,)
    step = 0.05 + torch.rand(shape, generator=generator)
    extra = {"nested": 0.8, "affine": -0.3}.get(case.name)
    return step, None if extra is None else extra + 0.2 * torch.rand(shape, generator=generator)
