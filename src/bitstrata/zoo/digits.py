"""Small networks for 8x8 digits, which train in seconds on a processor."""

from __future__ import annotations

from torch import nn

from .cifar_resnet import CifarResNet
from .layers import check_positive, conv3x3, initialize


def digits_cnn(classes: int = 10, in_channels: int = 1, *, width: int = 16) -> nn.Sequential:
    """(B, in_channels, 8, 8) to logits (B, classes): three 3x3 convolutions (batch norm, ReLU), a linear layer.

    Channels are width, 2 * width and 2 * width; the second convolution halves the map, and an average pool leaves
    2x2 of it: digits so small are told apart by where strokes are. A plain chain of this project, 15,418 parameters.
    """
    check_positive("digits_cnn", classes=classes, in_channels=in_channels, width=width)
    model = nn.Sequential(
        *_unit(in_channels, width, 1),
        *_unit(width, 2 * width, 2),
        *_unit(2 * width, 2 * width, 1),
        nn.AvgPool2d(2),
        nn.Flatten(1),
        nn.Linear(4 * 2 * width, classes),
    )
    initialize(model)
    return model


def digits_resnet(
    classes: int = 10, in_channels: int = 1, *, width: int = 16, stages: int = 2, blocks: int = 1, shortcut: str = "B"
) -> CifarResNet:
    """(B, in_channels, 8, 8) to logits (B, classes): `stages` stages of `blocks` blocks of `CifarResNet`.

    Pooled to 2x2 as `digits_cnn`, with 1 to 3 stages: 20,666 parameters by default.
    """
    check_positive("digits_resnet", blocks=blocks)
    if not 1 <= stages <= 3:
        raise ValueError(f"digits_resnet: an 8x8 image allows 1 to 3 stages, got {stages}")
    return CifarResNet((blocks,) * stages, classes, in_channels, width=width, shortcut=shortcut, pool=2)


def _unit(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
