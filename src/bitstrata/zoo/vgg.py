"""VGG-16 with batch normalization."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import STEMS, check_choice, check_positive, initialize

# stages of 3x3 convolutions, as multiples of the width: column D of the paper's table 1
_STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))


class VGG(nn.Module):
    """(B, in_channels, H, W) to logits (B, classes): 13 3x3 convolutions, a max pool after each of five stages.

    width: channels of the first stage; the last has eight times as many.
    stem: "imagenet", three linear layers on a 7x7 map, for 224x224 images; or "cifar", one linear layer on the mean of
    the last map, for 32x32 (whose last map is 1x1).
    hidden: features between the three linear layers; dropout: probability behind each of the first two, in training
    only. The "cifar" form has neither.

    Source: Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2015;
    parameter names, and the biases of convolutions that a batch norm follows, as in torchvision.
    """

    def __init__(
        self, classes: int, in_channels: int, *, width: int, stem: str, hidden: int = 4096, dropout: float = 0.5
    ) -> None:
        super().__init__()
        check_positive("VGG", classes=classes, in_channels=in_channels, width=width, hidden=hidden)
        check_choice("VGG", "stem", stem, STEMS)
        features: list[nn.Module] = []
        channels = in_channels
        for stage in _STAGES:
            for multiple in stage:
                outputs = multiple * width
                convolution = nn.Conv2d(channels, outputs, 3, padding=1)
                features += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                channels = outputs
            features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(7 if stem == "imagenet" else 1)
        self.classifier: nn.Module = nn.Linear(channels, classes)
        if stem == "imagenet":
            self.classifier = nn.Sequential(
                *(nn.Linear(channels * 7 * 7, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)),
                *(nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)),
                nn.Linear(hidden, classes),
            )
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def vgg16_bn(
    classes: int = 10,
    in_channels: int = 3,
    *,
    width: int = 64,
    stem: str = "imagenet",
    hidden: int = 4096,
    dropout: float = 0.5,
) -> VGG:
    """138,365,992 parameters at 1,000 classes; 14,728,266 at 10 with the "cifar" stem. See `VGG`."""
    return VGG(classes, in_channels, width=width, stem=stem, hidden=hidden, dropout=dropout)
