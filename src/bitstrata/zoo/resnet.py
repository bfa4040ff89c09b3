"""Residual networks for 224x224 photographs, normalized after each convolution, or with a small stem for 32x32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x)))))) with a 1x1 convolution and batch norm as `downsample`.

    (B, inputs, H, W) to (B, outputs, ceil(H / stride), ceil(W / stride)); x is its own shortcut where shapes agree.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.downsample = _downsample(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """As `BasicBlock`, around three convolutions: 1x1 to a quarter of the outputs, 3x3 with `stride`, 1x1.

    (B, inputs, H, W) to (B, outputs, ceil(H / stride), ceil(W / stride)); outputs is a multiple of 4. The stride is the
    3x3 convolution's, as in the public checkpoints; the paper gives it to the first 1x1 one.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        middle = outputs // 4
        self.conv1 = conv1x1(inputs, middle)
        self.bn1 = nn.BatchNorm2d(middle)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(middle, middle, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = conv1x1(middle, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu3 = nn.ReLU(inplace=True)
        self.downsample = _downsample(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """(B, in_channels, H, W) to logits (B, classes), four stages of blocks[s] blocks.

    Stage s has width * 2^s channels, four times as many with `block=Bottleneck`.
    stem: "imagenet", a 7x7 convolution of stride 2 and a 3x3 max pool of stride 2, for 224x224 images; or "cifar", a
    3x3 convolution of stride 1 and no pool, for 32x32.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, table 1; parameter names as in torchvision.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        classes: int,
        in_channels: int,
        *,
        width: int,
        stem: str,
        block: Callable[[int, int, int], nn.Module] = BasicBlock,
    ) -> None:
        super().__init__()
        check_positive("ResNet", classes=classes, in_channels=in_channels, width=width)
        check_choice("ResNet", "stem", stem, STEMS)
        self.conv1 = first_convolution(in_channels, width, stem)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        outputs = width * 4 if block is Bottleneck else width
        self.layer1, self.layer2, self.layer3, self.layer4 = residual_stages(block, blocks, width, outputs)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * outputs, classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


def resnet18(classes: int = 10, in_channels: int = 3, *, width: int = 64, stem: str = "imagenet") -> ResNet:
    """11,689,512 parameters at 1,000 classes with the "imagenet" stem. See `ResNet`."""
    return ResNet((2, 2, 2, 2), classes, in_channels, width=width, stem=stem)


def resnet34(classes: int = 10, in_channels: int = 3, *, width: int = 64, stem: str = "imagenet") -> ResNet:
    """21,797,672 parameters at 1,000 classes with the "imagenet" stem. See `ResNet`."""
    return ResNet((3, 4, 6, 3), classes, in_channels, width=width, stem=stem)


def resnet50(classes: int = 10, in_channels: int = 3, *, width: int = 64, stem: str = "imagenet") -> ResNet:
    """Of `Bottleneck` blocks: 25,557,032 parameters at 1,000 classes with the "imagenet" stem. See `ResNet`."""
    return ResNet((3, 4, 6, 3), classes, in_channels, width=width, stem=stem, block=Bottleneck)
