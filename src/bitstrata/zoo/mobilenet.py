"""MobileNetV2: inverted residuals around depthwise convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import STEMS, check_choice, check_positive, initialize

# expansion, channels, blocks, stride of the first: table 2 of the paper
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


def _round8(channels: float) -> int:
    """Nearest multiple of 8, at least 8, never under nine tenths of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; x is added where shapes agree.

    (B, inputs, H, W) to (B, outputs, ceil(H / stride), ceil(W / stride)). An expansion of 1 has no convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            *((_conv(inputs, hidden, 1),) if expansion != 1 else ()),
            _conv(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """(B, in_channels, H, W) to logits (B, classes).

    width: multiplies every channel count, rounded to multiples of 8; the last convolution has at least 1,280.
    stem: "imagenet" halves the map five times, for 224x224 images; "cifar" leaves out the first two, for 32x32.
    dropout: before the classifier, in training only.

    Source: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018; parameter names as in
    torchvision.
    """

    def __init__(self, classes: int, in_channels: int, width: float, stem: str, dropout: float) -> None:
        super().__init__()
        check_positive("MobileNetV2", classes=classes, in_channels=in_channels, width=width)
        check_choice("MobileNetV2", "stem", stem, STEMS)
        small = stem == "cifar"
        channels = _round8(32 * width)
        last = _round8(1280 * max(1.0, width))
        features: list[nn.Module] = [_conv(in_channels, channels, 3, 1 if small else 2)]
        for stage, (expansion, base, blocks, stride) in enumerate(_STAGES):
            outputs = _round8(base * width)
            first = 1 if small and stage == 1 else stride
            for block in range(blocks):
                features.append(InvertedResidual(channels, outputs, first if block == 0 else 1, expansion))
                channels = outputs
        features.append(_conv(channels, last, 1))
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, classes))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


def mobilenet_v2(
    classes: int = 10, in_channels: int = 3, *, width: float = 1.0, stem: str = "imagenet", dropout: float = 0.2
) -> MobileNetV2:
    """3,504,872 parameters at 1,000 classes and width 1. See `MobileNetV2`."""
    return MobileNetV2(classes, in_channels, width, stem, dropout)
