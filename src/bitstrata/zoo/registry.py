"""The networks by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .cifar_resnet import resnet20, resnet32, resnet44, resnet56
from .digits import digits_cnn, digits_resnet
from .maqd import maqd_cnn9, maqd_preact_resnet, maqd_vgg
from .mobilenet import mobilenet_v1, mobilenet_v2
from .preact_resnet import (
    preact_resnet18,
    preact_resnet20,
    preact_resnet32,
    preact_resnet34,
    preact_resnet50,
    preact_resnet56,
)
from .resnet import resnet18, resnet34, resnet50
from .vgg import vgg16_bn
from .vit import vit_cifar


@dataclass(frozen=True)
class Network:
    """One network: `build(classes, in_channels, **options)`; `input_shape` is its customary (C, H, W)."""

    name: str
    description: str
    input_shape: tuple[int, int, int]
    build: Callable[..., nn.Module]

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword options that `create` passes on."""
        parameters = inspect.signature(self.build).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


_CIFAR, _PHOTO, _DIGIT = (3, 32, 32), (3, 224, 224), (1, 8, 8)
_BOTH = "for 224x224 images, or 32x32 with stem='cifar'"
_NETWORKS = {
    network.name: network
    for network in (
        Network("digits_cnn", "three convolutions for 8x8 digits", _DIGIT, digits_cnn),
        Network("digits_resnet", "two residual blocks for 8x8 digits", _DIGIT, digits_resnet),
        Network("resnet20", "post-activation ResNet-20 for 32x32 images", _CIFAR, resnet20),
        Network("resnet32", "post-activation ResNet-32 for 32x32 images", _CIFAR, resnet32),
        Network("resnet44", "post-activation ResNet-44 for 32x32 images", _CIFAR, resnet44),
        Network("resnet56", "post-activation ResNet-56 for 32x32 images", _CIFAR, resnet56),
        Network("preact_resnet20", "pre-activation ResNet-20 for 32x32 images", _CIFAR, preact_resnet20),
        Network("preact_resnet32", "pre-activation ResNet-32 for 32x32 images", _CIFAR, preact_resnet32),
        Network("preact_resnet56", "pre-activation ResNet-56 for 32x32 images", _CIFAR, preact_resnet56),
        Network("resnet18", f"ResNet-18 {_BOTH}", _PHOTO, resnet18),
        Network("resnet34", f"ResNet-34 {_BOTH}", _PHOTO, resnet34),
        Network("resnet50", f"ResNet-50 {_BOTH}", _PHOTO, resnet50),
        Network("preact_resnet18", f"pre-activation ResNet-18 {_BOTH}", _PHOTO, preact_resnet18),
        Network("preact_resnet34", f"pre-activation ResNet-34 {_BOTH}", _PHOTO, preact_resnet34),
        Network("preact_resnet50", f"pre-activation ResNet-50 {_BOTH}", _PHOTO, preact_resnet50),
        Network("mobilenet_v1", f"MobileNetV1 {_BOTH}", _PHOTO, mobilenet_v1),
        Network("mobilenet_v2", f"MobileNetV2 {_BOTH}", _PHOTO, mobilenet_v2),
        Network("vgg16_bn", f"VGG-16 with batch norm {_BOTH}", _PHOTO, vgg16_bn),
        Network("maqd_vgg", "VGG of 17 convolutions for 32x32 images, as in MaQD", _CIFAR, maqd_vgg),
        Network("maqd_preact_resnet", "pre-activation ResNet for 32x32 images, as in MaQD", _CIFAR, maqd_preact_resnet),
        Network("maqd_cnn9", "plain 9-layer network for 32x32 images, as in MaQD", _CIFAR, maqd_cnn9),
        Network("vit_cifar", "vision transformer for 32x32 images, patches of 4x4", _CIFAR, vit_cifar),
    )
}


def names() -> tuple[str, ...]:
    """Names that `create` knows."""
    return tuple(_NETWORKS)


def get(name: str) -> Network:
    """The record of one network; ValueError with a suggestion if there is none."""
    if name not in _NETWORKS:
        raise ValueError(f"unknown network {name!r}{_suggest(name, names())}; known: {', '.join(names())}")
    return _NETWORKS[name]


def create(name: str, classes: int = 10, in_channels: int | None = None, **options: Any) -> nn.Module:
    """A freshly initialized network, in training mode.

    in_channels: of the images; None takes the network's customary number (3, or 1 for digits).
    options: `get(name).options`; their meaning is in the docstring of `get(name).build`.

    Raises ValueError for an unknown name or option, with a suggestion, and for impossible values.
    """
    network = get(name)
    for option in options:
        if option not in network.options:
            known = ("classes", "in_channels", *network.options)
            raise ValueError(f"{name}: unknown option {option!r}{_suggest(option, known)}; known: {', '.join(known)}")
    return network.build(classes, network.input_shape[0] if in_channels is None else in_channels, **options)


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f", did you mean {close[0]!r}?" if close else ""
