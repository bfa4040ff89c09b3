"""Residual networks normalized before each convolution (pre-activation), for 32x32 images and 224x224 photographs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from .layers import (
    STEMS,
    check_choice,
    check_positive,
    conv1x1,
    conv3x3,
    first_convolution,
    initialize,
    residual_stages,
)

PROJECTIONS = ("preact", "raw")


class PreActBlock(nn.Module):
    """y = relu(bn1(x)); shortcut + conv2(relu(bn2(conv1(y)))).

    The shortcut is x itself where the shape stays, else a 1x1 convolution, without a norm, of y (proj_input="preact")
    or of x (proj_input="raw"). (B, inputs, H, W) to (B, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, proj_input: str = "preact") -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut = _projection(inputs, outputs, stride)
        self.raw = proj_input == "raw"

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(x if self.raw else out)
        return self.conv2(self.relu2(self.bn2(self.conv1(out)))) + shortcut


class PreActBottleneck(nn.Module):
    """As `PreActBlock`, with three convolutions: 1x1 to a quarter of the outputs, 3x3 with `stride`, 1x1.

    (B, inputs, H, W) to (B, outputs, ceil(H / stride), ceil(W / stride)); outputs is a multiple of 4.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, proj_input: str = "preact") -> None:
        super().__init__()
        middle = outputs // 4
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv1x1(inputs, middle)
        self.bn2 = nn.BatchNorm2d(middle)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(middle, middle, stride)
        self.bn3 = nn.BatchNorm2d(middle)
        self.relu3 = nn.ReLU()
        self.conv3 = conv1x1(middle, outputs)
        self.shortcut = _projection(inputs, outputs, stride)
        self.raw = proj_input == "raw"

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(x if self.raw else out)
        out = self.conv2(self.relu2(self.bn2(self.conv1(out))))
        return self.conv3(self.relu3(self.bn3(out))) + shortcut


class PreActResNet(nn.Module):
    """(B, in_channels, H, W) to logits (B, classes); stage s has blocks[s] blocks of width * 2^s channels.

    Four times as many channels with `block=PreActBottleneck`. Batch norm and ReLU come before every convolution of a
    block and before the last pool; attributes layer1, layer2, ... hold the stages.
    stem: "imagenet", a 7x7 convolution of stride 2, batch norm, ReLU and a 3x3 max pool of stride 2; or "cifar", a 3x3
    convolution alone.
    proj_input: what the 1x1 convolutions of shortcuts read: "preact", the block's first relu(bn(x)), or "raw", x.

    Source: He et al., Identity Mappings in Deep Residual Networks, 2016. UniQ (Pham et al., 2021) uses the form with
    "preact"; SAT (Jin et al., 2019) the bottlenecks with "raw".
    """

    def __init__(
        self,
        blocks: Sequence[int],
        classes: int,
        in_channels: int,
        *,
        width: int,
        stem: str = "cifar",
        proj_input: str = "preact",
        block: type[PreActBlock] | type[PreActBottleneck] = PreActBlock,
    ) -> None:
        super().__init__()
        check_positive("PreActResNet", classes=classes, in_channels=in_channels, width=width)
        check_choice("PreActResNet", "stem", stem, STEMS)
        check_choice("PreActResNet", "proj_input", proj_input, PROJECTIONS)
        self.conv1 = first_convolution(in_channels, width, stem)
        self.bn1: nn.Module = nn.Identity()
        self.relu1: nn.Module = nn.Identity()
        self.maxpool: nn.Module = nn.Identity()
        if stem == "imagenet":
            self.bn1, self.relu1 = nn.BatchNorm2d(width), nn.ReLU()
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        outputs = width * 4 if block is PreActBottleneck else width
        stages = residual_stages(partial(block, proj_input=proj_input), blocks, width, outputs)
        self.stages = tuple(f"layer{number}" for number, _ in enumerate(stages, 1))
        for name, stage in zip(self.stages, stages, strict=True):
            self.add_module(name, stage)
        features = outputs * 2 ** (len(stages) - 1)
        self.bn = nn.BatchNorm2d(features)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(features, classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu1(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.linear(self.pool(self.relu(self.bn(x))).flatten(1))


def _projection(inputs: int, outputs: int, stride: int) -> nn.Conv2d | None:
    return None if stride == 1 and inputs == outputs else conv1x1(inputs, outputs, stride)


def preact_resnet20(
    classes: int = 10, in_channels: int = 3, *, width: int = 16, proj_input: str = "preact"
) -> PreActResNet:
    """Three stages of 3 blocks, 32x32 images: 272,282 parameters at 10 classes. See `PreActResNet`."""
    return PreActResNet((3, 3, 3), classes, in_channels, width=width, proj_input=proj_input)


def preact_resnet32(
    classes: int = 10, in_channels: int = 3, *, width: int = 16, proj_input: str = "preact"
) -> PreActResNet:
    """Three stages of 5 blocks, 32x32 images: 472,564 parameters at 100 classes. See `PreActResNet`."""
    return PreActResNet((5, 5, 5), classes, in_channels, width=width, proj_input=proj_input)


def preact_resnet56(
    classes: int = 10, in_channels: int = 3, *, width: int = 16, proj_input: str = "preact"
) -> PreActResNet:
    """Three stages of 9 blocks, 32x32 images: 855,578 parameters at 10 classes. See `PreActResNet`."""
    return PreActResNet((9, 9, 9), classes, in_channels, width=width, proj_input=proj_input)


def preact_resnet18(
    classes: int = 10, in_channels: int = 3, *, width: int = 64, stem: str = "imagenet", proj_input: str = "preact"
) -> PreActResNet:
    """Four stages of 2 blocks: 11,687,848 parameters at 1,000 classes, "imagenet" stem. See `PreActResNet`."""
    return PreActResNet((2, 2, 2, 2), classes, in_channels, width=width, stem=stem, proj_input=proj_input)


def preact_resnet34(
    classes: int = 10, in_channels: int = 3, *, width: int = 64, stem: str = "imagenet", proj_input: str = "preact"
) -> PreActResNet:
    """Stages of 3, 4, 6, 3 blocks: 21,796,008 parameters at 1,000 classes, "imagenet" stem. See `PreActResNet`."""
    return PreActResNet((3, 4, 6, 3), classes, in_channels, width=width, stem=stem, proj_input=proj_input)


def preact_resnet50(
    classes: int = 10, in_channels: int = 3, *, width: int = 64, stem: str = "imagenet", proj_input: str = "raw"
) -> PreActResNet:
    """Stages of 3, 4, 6, 3 bottlenecks: 25,549,480 parameters at 1,000 classes, "imagenet" stem. See `PreActResNet`."""
    return PreActResNet(
        (3, 4, 6, 3), classes, in_channels, width=width, stem=stem, proj_input=proj_input, block=PreActBottleneck
    )
