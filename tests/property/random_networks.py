"""Random small networks, recipes and data for property tests: `cases()` is a hypothesis strategy.

Structure (blocks, shapes, grids) is drawn; weights, statistics and images come from a drawn seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import bitstrata as bs

Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass
class Case:
    """A float model, how to quantize it, and the shape of its input."""

    model: nn.Module
    recipe: bs.Recipe
    shape: tuple[int, ...]
    pixels: bool
    seed: int

    def __repr__(self) -> str:
        return f"Case(pixels={self.pixels}, seed={self.seed}, shape={self.shape}\n{self.recipe}\n{self.model})"


class Residual(nn.Module):
    """body(x) + shortcut(x)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class Subsample(nn.Module):
    """Every second row and column, `before` and `after` zero channels: a shortcut without parameters."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"{self.before}, {self.after}"


class Window(nn.Module):
    """A part of the map, with zeros around it."""

    def __init__(self, top: int, left: int, step: int, margin: int) -> None:
        super().__init__()
        self.top, self.left, self.step, self.margin = top, left, step, margin

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, self.top :: self.step, self.left :], (self.margin, 0, 0, self.margin))

    def extra_repr(self) -> str:
        return f"{self.top}, {self.left}, {self.step}, {self.margin}"


class _Maker:
    """Draws blocks one after another and keeps the shape (C, H, W) they end in."""

    def __init__(self, draw: Draw, shape: tuple[int, int, int]) -> None:
        self.draw, self.shape = draw, shape

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def append(self, *modules: nn.Module) -> nn.Module:
        """The modules as one, the shape moved behind them."""
        block = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
        with torch.no_grad():
            self.shape = tuple(block.eval()(torch.zeros(2, *self.shape)).shape[1:])
        return block.train()

    def activation(self) -> nn.Module:
        return self.pick(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.5, 1.0), nn.Identity())

    def conv(self) -> nn.Module:
        channels = self.shape[0]
        kernel = self.pick(1, 2, 3, (1, 3), (3, 2))
        span = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        groups = self.pick(1, 1, *(g for g in (2, channels) if channels % g == 0))
        dilation = self.pick(1, 2) if min(self.shape[1:]) > 4 else 1
        padding = self.pick(*range(max(span) // 2 + 1), "same")
        if padding != "same" and any(
            n + 2 * padding < dilation * (k - 1) + 1 for n, k in zip(self.shape[1:], span, strict=True)
        ):
            padding = "same"
        stride = 1 if padding == "same" else self.pick(1, 1, 2)
        out = groups * self.pick(1, 2, 3)
        return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=self.pick(True, False))

    def unit(self) -> nn.Module:
        """conv, perhaps batch normalization, an activation."""
        conv = self.conv()
        norm = [nn.BatchNorm2d(conv.out_channels)] if self.pick(True, True, False) else []
        return self.append(conv, *norm, self.activation())

    def pre_activated(self) -> nn.Module:
        norm = nn.BatchNorm2d(self.shape[0])
        return self.append(norm, self.activation(), self.conv())

    def residual(self) -> nn.Module:
        channels = self.shape[0]
        kernel = self.pick(1, 3)
        body = nn.Sequential(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(channels),
            self.activation(),
        )
        shortcuts = (nn.Identity(), nn.Conv2d(channels, channels, 1), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(channels))
        return self.append(Residual(body, self.pick(*shortcuts)), self.activation())

    def downsampled(self) -> nn.Module:
        channels = self.shape[0]
        before, after = self.pick((0, 0), (1, 1), (0, 2))
        out = channels + before + after
        body = nn.Sequential(nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.BatchNorm2d(out))
        shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=2, bias=False), nn.BatchNorm2d(out))
        return self.append(Residual(body, self.pick(shortcut, Subsample(before, after))), self.activation())

    def pool(self) -> nn.Module:
        if min(self.shape[1:]) < 3:
            return self.append(nn.AdaptiveAvgPool2d(1))
        kernel = self.pick(2, 3, (2, 1))
        padding = 0 if isinstance(kernel, tuple) else self.pick(0, kernel // 2)
        return self.append(self.pick(nn.MaxPool2d, nn.AvgPool2d)(kernel, self.pick(1, 2), padding))

    def window(self) -> nn.Module:
        top, left = (self.pick(*range(min(n, 3))) for n in self.shape[1:])
        return self.append(Window(top, left, self.pick(1, 2), self.pick(0, 1)))

    def head(self) -> nn.Module:
        """To (N, classes)."""
        pools = [nn.AdaptiveAvgPool2d(1)] if self.pick(True, False) else []
        layers = [self.append(*pools, nn.Flatten())]
        if self.pick(True, False):
            layers.append(self.append(nn.Linear(self.shape[0], 5), nn.BatchNorm1d(5), self.activation()))
        layers.append(self.append(nn.Linear(self.shape[0], 3)))
        return nn.Sequential(*layers)


@st.composite
def recipes(draw: Draw) -> bs.Recipe:
    if draw(st.integers(0, 2)) == 0:
        return draw(st.sampled_from(OTHERS))()
    per_channel, edge_bits = draw(st.booleans()), draw(st.sampled_from((8, 8, 4, 2)))
    if draw(st.integers(0, 4)) == 0:
        bits, a = draw(st.integers(2, 8)), draw(st.sampled_from(("same", 3, 8)))
        return bs.recipes.lsq(bits, a, per_channel=per_channel, edge_bits=edge_bits)
    widths = draw(st.sets(st.integers(1, 8), min_size=1, max_size=4))
    a, scales = draw(st.sampled_from(("same", "same", 2, 8))), draw(st.sampled_from(("free", "tied")))
    return bs.recipes.strata(sorted(widths), a, per_channel=per_channel, scales=scales, edge_bits=edge_bits)


def replaced(recipe: bs.Recipe, **parts: object) -> bs.Recipe:
    return dataclasses.replace(recipe, **parts)  # type: ignore[arg-type]


R, Part = bs.recipes, bs.recipes.Part
OTHERS: tuple[Callable[[], bs.Recipe], ...] = (
    lambda: R.lsq_plus(3),
    lambda: R.lsq_plus(2, a=1, per_channel=True),
    lambda: R.lsq_plus(4, edges="inner"),
    lambda: R.dorefa(1),
    lambda: R.dorefa(3, scheme="centered"),
    lambda: R.pact(2),
    lambda: R.pact(4, double_side=True, alpha=1.5),
    lambda: R.sat(2, convs="all"),
    lambda: R.sat(5, rescale="stddev"),
    lambda: R.uniq(1, per_channel=True),
    lambda: R.uniq(8, a=4),
    lambda: R.vertical((2, 3, 4)),
    lambda: R.vertical((2, 5, 8), compensation=False, norm_levels="statistics"),
    lambda: R.vertical((3, 8), edges="inner", norm_levels="shared"),
    lambda: R.adabits((1, 2, 4)),
    lambda: R.adabits((2, 8), scheme="centered"),
    lambda: R.ascending((2, 4)),
    R.int8,
    lambda: R.int8(range="full", per_channel=True),
    lambda: replaced(
        R.strata((1, 3)), transform=Part("standardize", "transform", {"eps_ws": 0.01}), norm="layer_batch"
    ),
    lambda: replaced(
        R.strata((2, 4)), activation=Part("lsq_plus", "activation"), rescale=Part("constant", "rescale"), norm="l1"
    ),
)


@st.composite
def cases(draw: Draw) -> Case:
    """Networks of one to four blocks between a convolution and a linear head."""
    seed = draw(st.integers(0, 2**31 - 1))
    torch.manual_seed(seed)
    shape = (draw(st.integers(1, 3)), draw(st.integers(4, 8)), draw(st.integers(4, 8)))
    maker = _Maker(draw, shape)
    blocks = [maker.append(nn.Conv2d(shape[0], draw(st.integers(2, 5)), 3, padding=1))]
    kinds = (maker.unit, maker.unit, maker.residual, maker.downsampled, maker.pre_activated, maker.pool, maker.window)
    blocks += [maker.pick(*kinds)() for _ in range(draw(st.integers(1, 4)))]
    model = nn.Sequential(*blocks, maker.head())
    return Case(model, draw(recipes()), shape, draw(st.booleans()), seed)
