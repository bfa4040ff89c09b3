"""ResNet-18 for 224x224 photographs, or with a small stem for 32x32 ones."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import STEMS, check_choice, check_positive, conv1x1, conv3x3, initialize


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
        changes = stride != 1 or inputs != outputs
        self.downsample = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """(B, in_channels, H, W) to logits (B, classes), four stages of two blocks, width * 2^s channels.

    stem: "imagenet", a 7x7 convolution of stride 2 and a 3x3 max pool of stride 2, for 224x224 images; or "cifar", a
    3x3 convolution of stride 1 and no pool, for 32x32.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, table 1; parameter names as in torchvision.
    """

    def __init__(self, classes: int, in_channels: int, width: int, stem: str) -> None:
        super().__init__()
        check_positive("ResNet", classes=classes, in_channels=in_channels, width=width)
        check_choice("ResNet", "stem", stem, STEMS)
        large = stem == "imagenet"
        self.conv1 = (
            nn.Conv2d(in_channels, width, 7, 2, padding=3, bias=False) if large else conv3x3(in_channels, width)
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))


def resnet18(classes: int = 10, in_channels: int = 3, *, width: int = 64, stem: str = "imagenet") -> ResNet:
    """11,689,512 parameters at 1,000 classes with the "imagenet" stem. See `ResNet`."""
    return ResNet(classes, in_channels, width, stem)
