"""The networks of MaQD (Sawada, Saiin and Suetake, 2024): plain chains of a convolution, a norm and an activation.

Every activation and every pool is a module of its own at one place of the network, so each can be replaced; `norm`
makes a normalization of so many channels, batch normalization unless the caller gives another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from .layers import check_choice, check_positive, conv1x1, conv3x3, initialize

Norm = Callable[[int], nn.Module]

_VGG = ((1, 1, 2, 2), (4, 4, 4, 4), (8, 8, 8, 8), (8, 8, 8, 8))
_PREACT = (1, 2, 4, 4, 8, 8, 8, 8)
_CNN9 = ((1, 1), (2, 2), (4, 4, 4, 4))


def _chain(in_channels: int, stages: Sequence[Sequence[int]], width: int, norm: Norm) -> Iterator[nn.Module]:
    """3x3 convolutions of multiples of `width`, each normalized and activated; 2x2 averages between stages."""
    channels = in_channels
    for number, stage in enumerate(stages, 1):
        for multiple in stage:
            yield conv3x3(channels, multiple * width)
            yield norm(multiple * width)
            yield nn.ReLU()
            channels = multiple * width
        if number < len(stages):
            yield nn.AvgPool2d(2)


class MaqdVgg(nn.Module):
    """(B, in_channels, H, W) to logits (B, classes): 16 3x3 convolutions, then a 1x1 one to the classes.

    Channels are multiples of width: 1, 1, 2, 2, four times 4, eight times 8; a 2x2 average follows the 4th, 8th and
    12th activation. The last convolution is normalized, not activated, and averaged over the whole map.

    Source: MaQD, section 4.2, the network for CIFAR.
    """

    def __init__(self, classes: int, in_channels: int, width: int, norm: Norm) -> None:
        super().__init__()
        check_positive("MaqdVgg", classes=classes, in_channels=in_channels, width=width)
        self.features = nn.Sequential(*_chain(in_channels, _VGG, width, norm))
        self.output = nn.Sequential(conv1x1(8 * width, classes), norm(classes))
        self.pool = nn.AdaptiveAvgPool2d(1)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.output(self.features(x))).flatten(1)


class MaqdBlock(nn.Module):
    """body(x') + shortcut(x'), where x' is x, or its 2x2 averages if stride is 2.

    body: norm, ReLU, 3x3 convolution, twice, then norm; shortcut: norm, ReLU, one convolution, norm; no module is
    shared. (B, inputs, H, W) to (B, outputs, H // stride, W // stride).

    Source: MaQD, section 4.2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut_kernel: int, norm: Norm) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2) if stride == 2 else nn.Identity()
        self.body = nn.Sequential(
            *(norm(inputs), nn.ReLU(), conv3x3(inputs, outputs)),
            *(norm(outputs), nn.ReLU(), conv3x3(outputs, outputs)),
            norm(outputs),
        )
        projection = conv1x1(inputs, outputs) if shortcut_kernel == 1 else conv3x3(inputs, outputs)
        self.shortcut = nn.Sequential(norm(inputs), nn.ReLU(), projection, norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        return self.body(x) + self.shortcut(x)


class MaqdPreActResNet(nn.Module):
    """(B, in_channels, H, W) to logits (B, classes): eight blocks, then a 1x1 convolution to the classes.

    Channels of the blocks are 1, 2, 4, 4, 8, 8, 8, 8 times width. The last convolution is normalized and averaged over
    the whole map.
    stem: "conv", a 3x3 convolution without norm before the blocks; "literal", none: the first block normalizes and
    activates the image, as the paper's equation 17 says.
    final_act: whether norm and ReLU come between the last block's sum and the last convolution.
    block_strides: 1 or 2 of each block; at 2 it averages its input 2x2. The paper prints a 2 for the last six, which
    32x32 images do not allow; the default halves three times, as the paper's VGG does.
    shortcut_kernel: 1 or 3, the side of the convolutions in shortcuts.

    Source: MaQD, section 4.2 and equation 17.
    """

    def __init__(
        self,
        classes: int,
        in_channels: int,
        *,
        width: int,
        norm: Norm,
        stem: str,
        final_act: bool,
        block_strides: Sequence[int],
        shortcut_kernel: int,
    ) -> None:
        super().__init__()
        check_positive("MaqdPreActResNet", classes=classes, in_channels=in_channels, width=width)
        check_choice("MaqdPreActResNet", "stem", stem, ("conv", "literal"))
        check_choice("MaqdPreActResNet", "shortcut_kernel", shortcut_kernel, (1, 3))
        strides = tuple(block_strides)
        if len(strides) != len(_PREACT) or not set(strides) <= {1, 2}:
            raise ValueError(
                f"MaqdPreActResNet: block_strides must be {len(_PREACT)} numbers, each 1 or 2, got {strides}"
            )
        self.stem = conv3x3(in_channels, width) if stem == "conv" else nn.Identity()
        channels = width if stem == "conv" else in_channels
        blocks = []
        for multiple, stride in zip(_PREACT, strides, strict=True):
            blocks.append(MaqdBlock(channels, multiple * width, stride, shortcut_kernel, norm))
            channels = multiple * width
        self.blocks = nn.Sequential(*blocks)
        self.final = nn.Sequential(norm(channels), nn.ReLU()) if final_act else nn.Identity()
        self.output = nn.Sequential(conv1x1(channels, classes), norm(classes))
        self.pool = nn.AdaptiveAvgPool2d(1)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.output(self.final(self.blocks(self.stem(x))))).flatten(1)


def maqd_vgg(classes: int = 10, in_channels: int = 3, *, width: int = 64, norm: Norm = nn.BatchNorm2d) -> MaqdVgg:
    """20,035,028 parameters at 10 classes, 20,081,288 at 100. See `MaqdVgg`."""
    return MaqdVgg(classes, in_channels, width, norm)


def maqd_preact_resnet(
    classes: int = 10,
    in_channels: int = 3,
    *,
    width: int = 64,
    norm: Norm = nn.BatchNorm2d,
    stem: str = "conv",
    final_act: bool = True,
    block_strides: Sequence[int] = (1, 1, 2, 1, 2, 1, 2, 1),
    shortcut_kernel: int = 1,
) -> MaqdPreActResNet:
    """21,115,732 parameters at 10 classes; 21,073,696 with stem="literal" and final_act=False.

    See `MaqdPreActResNet`.
    """
    return MaqdPreActResNet(
        classes,
        in_channels,
        width=width,
        norm=norm,
        stem=stem,
        final_act=final_act,
        block_strides=block_strides,
        shortcut_kernel=shortcut_kernel,
    )


def maqd_cnn9(
    classes: int = 10, in_channels: int = 3, *, width: int = 64, norm: Norm = nn.BatchNorm2d
) -> nn.Sequential:
    """(B, in_channels, H, W) to logits (B, classes): eight 3x3 convolutions (norm, ReLU) and a linear layer.

    Channels are 1, 1, 2, 2, 4, 4, 4, 4 times width; 2x2 averages follow the second and the fourth activation, and the
    last map is averaged. 2,352,676 parameters at 100 classes.

    Source: MaQD, section 4.1, which names a 9-layer network and leaves its layers open; these are this project's.
    """
    check_positive("maqd_cnn9", classes=classes, in_channels=in_channels, width=width)
    model = nn.Sequential(
        *_chain(in_channels, _CNN9, width, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.Linear(4 * width, classes),
    )
    initialize(model)
    return model
