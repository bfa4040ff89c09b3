"""Residual networks for small images, normalized before each convolution (pre-activation)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import check_positive, conv1x1, conv3x3, initialize


class PreActBlock(nn.Module):
    """y = relu(bn1(x)); shortcut + conv2(relu(bn2(conv1(y)))), where a 1x1 convolution of y is the shortcut.

    Where the shape stays, the shortcut is x itself. (B, inputs, H, W) to (B, outputs, H / stride, W / stride).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut = conv1x1(inputs, outputs, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class PreActResNet(nn.Module):
    """(B, in_channels, H, W) to logits (B, classes); three stages of `blocks` blocks, width * 2^s channels.

    The stem is a convolution alone; batch norm and ReLU come before every later convolution and before the pool.

    Source: He et al., Identity Mappings in Deep Residual Networks, 2016; the form that UniQ (Pham et al., 2021) uses.
    """

    def __init__(self, blocks: int, classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        check_positive("PreActResNet", classes=classes, in_channels=in_channels, width=width)
        self.conv1 = conv3x3(in_channels, width)
        self.layer1 = _stage(width, width, 1, blocks)
        self.layer2 = _stage(width, 2 * width, 2, blocks)
        self.layer3 = _stage(2 * width, 4 * width, 2, blocks)
        self.bn = nn.BatchNorm2d(4 * width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(4 * width, classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(self.pool(F.relu(self.bn(x))).flatten(1))


def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    rest = (PreActBlock(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(PreActBlock(inputs, outputs, stride), *rest)


def preact_resnet20(classes: int = 10, in_channels: int = 3, *, width: int = 16) -> PreActResNet:
    """Three blocks a stage, 32x32 images: 272,282 parameters at 10 classes. See `PreActResNet`."""
    return PreActResNet(3, classes, in_channels, width)


def preact_resnet32(classes: int = 10, in_channels: int = 3, *, width: int = 16) -> PreActResNet:
    """Five blocks a stage, 32x32 images: 472,564 parameters at 100 classes. See `PreActResNet`."""
    return PreActResNet(5, classes, in_channels, width)


def preact_resnet56(classes: int = 10, in_channels: int = 3, *, width: int = 16) -> PreActResNet:
    """Nine blocks a stage, 32x32 images: 855,578 parameters at 10 classes. See `PreActResNet`."""
    return PreActResNet(9, classes, in_channels, width)
