"""MobileNet versions 1 and 2: networks around depthwise convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import STEMS, check_choice, check_positive, initialize

# channels, blocks, stride of the first: table 1 of the first version's paper
_STAGES_V1 = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))

# expansion, channels, blocks, stride of the first: table 2 of the second version's paper
_STAGES_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1, relu6: bool = False
) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    activation = nn.ReLU6(inplace=True) if relu6 else nn.ReLU(inplace=True)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), activation)


def _round8(channels: float) -> int:
    """Nearest multiple of 8, at least 8, never under nine tenths of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class MobileNetV1(nn.Module):
    """(B, in_channels, H, W) to logits (B, classes): 3x3 depthwise and 1x1 convolutions in turn, each with its ReLU.

    width: multiplies every channel count, rounded to multiples of 8.
    stem: "imagenet" halves the map five times, for 224x224 images; "cifar" leaves out the first two, for 32x32.

    Source: Howard et al., MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications, 2017,
    table 1, where the stride that it prints for the last depthwise convolution is 1, as the map's size tells.
    """

    def __init__(self, classes: int, in_channels: int, width: float, stem: str) -> None:
        super().__init__()
        check_positive("MobileNetV1", classes=classes, in_channels=in_channels, width=width)
        check_choice("MobileNetV1", "stem", stem, STEMS)
        small = stem == "cifar"
        channels = _round8(32 * width)
        features: list[nn.Module] = [_conv(in_channels, channels, 3, 1 if small else 2)]
        for stage, (base, blocks, stride) in enumerate(_STAGES_V1):
            outputs = _round8(base * width)
            first = 1 if small and stage == 1 else stride
            for block in range(blocks):
                depthwise = _conv(channels, channels, 3, first if block == 0 else 1, groups=channels)
                features.append(nn.Sequential(depthwise, _conv(channels, outputs, 1)))
                channels = outputs
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


class InvertedResidual(nn.Module):
    """1x1 convolution to `hidden` channels, 3x3 depthwise, linear 1x1 projection; x is added where shapes agree.

    (B, inputs, H, W) to (B, outputs, ceil(H / stride), ceil(W / stride)). expand: whether the first is there; without
    it hidden must equal inputs.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int, *, expand: bool, relu6: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *((_conv(inputs, hidden, 1, relu6=relu6),) if expand else ()),
            _conv(hidden, hidden, 3, stride, groups=hidden, relu6=relu6),
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
    dropout: probability before the classifier, in training only.
    relu6: clip activations at 6; False leaves that to the quantizers, as SAT (Jin et al., 2019) does.
    first_expansion: give the first block, of expansion 1, a 1x1 convolution as well.
    conv_classifier: classify by a 1x1 convolution without bias in place of the linear layer. UniQ (Pham et al., 2021)
    uses both of these.

    Source: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018; parameter names as in
    torchvision.
    """

    def __init__(
        self,
        classes: int,
        in_channels: int,
        width: float,
        stem: str,
        dropout: float,
        *,
        relu6: bool = True,
        first_expansion: bool = False,
        conv_classifier: bool = False,
    ) -> None:
        super().__init__()
        check_positive("MobileNetV2", classes=classes, in_channels=in_channels, width=width)
        check_choice("MobileNetV2", "stem", stem, STEMS)
        small = stem == "cifar"
        channels = _round8(32 * width)
        last = _round8(1280 * max(1.0, width))
        features: list[nn.Module] = [_conv(in_channels, channels, 3, 1 if small else 2, relu6=relu6)]
        for stage, (expansion, base, blocks, stride) in enumerate(_STAGES_V2):
            outputs = _round8(base * width)
            expand = expansion != 1 or first_expansion
            for block in range(blocks):
                step = stride if block == 0 and not (small and stage == 1) else 1
                hidden = channels * expansion
                features.append(InvertedResidual(channels, hidden, outputs, step, expand=expand, relu6=relu6))
                channels = outputs
        features.append(_conv(channels, last, 1, relu6=relu6))
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        classifier = nn.Conv2d(last, classes, 1, bias=False) if conv_classifier else nn.Linear(last, classes)
        self.classifier = nn.Sequential(nn.Dropout(dropout), classifier)
        self.conv_classifier = conv_classifier
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x))
        return self.classifier(x).flatten(1) if self.conv_classifier else self.classifier(x.flatten(1))


def mobilenet_v1(classes: int = 10, in_channels: int = 3, *, width: float = 1.0, stem: str = "imagenet") -> MobileNetV1:
    """4,231,976 parameters at 1,000 classes and width 1. See `MobileNetV1`."""
    return MobileNetV1(classes, in_channels, width, stem)


def mobilenet_v2(
    classes: int = 10,
    in_channels: int = 3,
    *,
    width: float = 1.0,
    stem: str = "imagenet",
    dropout: float = 0.2,
    relu6: bool = True,
    first_expansion: bool = False,
    conv_classifier: bool = False,
) -> MobileNetV2:
    """3,504,872 parameters at 1,000 classes and width 1; 3,504,960 with `first_expansion` and `conv_classifier`.

    See `MobileNetV2`.
    """
    return MobileNetV2(
        classes,
        in_channels,
        width,
        stem,
        dropout,
        relu6=relu6,
        first_expansion=first_expansion,
        conv_classifier=conv_classifier,
    )
