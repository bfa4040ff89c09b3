"""Small networks for 8x8 digits, which train in seconds on a processor."""

from __future__ import annotations

from torch import nn

from .cifar_resnet import CifarResNet
from .layers import check_positive, conv3x3, initialize


def digits_cnn(classes: int = 10, in_channels: int = 1, *, width: int = 16) -> nn.Sequential:
    """(B, in_channels, 8, 8) to logits (B, classes): three 3x3 convolutions with batch norm and ReLU, then a pool.

    Channels are width, 2 * width and 2 * width; the second convolution halves the map. The network is a plain
    LeNet-like chain of this project: 14,458 parameters at 10 classes.
    """
    check_positive("digits_cnn", classes=classes, in_channels=in_channels, width=width)
    model = nn.Sequential(
        *_unit(in_channels, width, 1),
        *_unit(width, 2 * width, 2),
        *_unit(2 * width, 2 * width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.Linear(2 * width, classes),
    )
    initialize(model)
    return model


def digits_resnet(
    classes: int = 10, in_channels: int = 1, *, width: int = 16, stages: int = 2, blocks: int = 1, shortcut: str = "B"
) -> CifarResNet:
    """(B, in_channels, 8, 8) to logits (B, classes): `stages` stages of `blocks` blocks of `CifarResNet`."""
    check_positive("digits_resnet", stages=stages, blocks=blocks)
    return CifarResNet((blocks,) * stages, classes, in_channels, width, shortcut)


def _unit(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
