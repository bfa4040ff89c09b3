"""Residual networks for small images, normalized after each convolution (post-activation)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .layers import PadShortcut, check_choice, check_positive, conv1x1, conv3x3, initialize


class CifarBlock(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x)))))), two 3x3 convolutions, the first with `stride`.

    (B, inputs, H, W) to (B, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module
        if stride == 1 and inputs == outputs:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PadShortcut((outputs - inputs) // 2)
        else:
            self.shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """(B, in_channels, H, W) to logits (B, classes); stage s has width * 2^s channels at H / 2^s.

    blocks: their number in each stage; attributes layer1, layer2, ... hold the stages.
    head_std: deviation of the linear layer's initial weights; where SAT rescales it, 1/sqrt(classes) trains well.
    pool: side of the map that the last stage is averaged to, before the linear layer reads all of it.
    shortcut: "A" (subsample and pad with zero channels) or "B" (1x1 convolution and batch norm) where shapes change.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, section 4.2; parameter names as in the
    public PyTorch implementation by Y. Idelbayev, so its checkpoints load.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        classes: int,
        in_channels: int,
        *,
        width: int,
        shortcut: str,
        pool: int = 1,
        head_std: float = 0.01,
    ) -> None:
        super().__init__()
        check_positive("CifarResNet", classes=classes, in_channels=in_channels, width=width, pool=pool)
        if not head_std > 0:
            raise ValueError(f"CifarResNet: head_std must be positive, got {head_std}")
        check_choice("CifarResNet", "shortcut", shortcut, ("A", "B"))
        if shortcut == "A" and width % 2:
            raise ValueError(f"CifarResNet: shortcut 'A' pads both sides alike, so width must be even, got {width}")
        self.conv1 = conv3x3(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        stages = []
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            first = CifarBlock(inputs, outputs, 1 if stage == 0 else 2, shortcut)
            rest = [CifarBlock(outputs, outputs, 1, shortcut) for _ in range(count - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
            stages.append(f"layer{stage + 1}")
            inputs = outputs
        self.stages = tuple(stages)
        self.pool = nn.AdaptiveAvgPool2d(pool)
        self.linear = nn.Linear(inputs * pool**2, classes)
        initialize(self, head_std)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.linear(self.pool(x).flatten(1))


def resnet20(
    classes: int = 10, in_channels: int = 3, *, width: int = 16, shortcut: str = "A", head_std: float = 0.01
) -> CifarResNet:
    """Three stages of 3 blocks, 32x32 images: 269,722 parameters at 10 classes. See `CifarResNet`."""
    return CifarResNet((3, 3, 3), classes, in_channels, width=width, shortcut=shortcut, head_std=head_std)


def resnet32(
    classes: int = 10, in_channels: int = 3, *, width: int = 16, shortcut: str = "A", head_std: float = 0.01
) -> CifarResNet:
    """Three stages of 5 blocks, 32x32 images: 464,154 parameters at 10 classes. See `CifarResNet`."""
    return CifarResNet((5, 5, 5), classes, in_channels, width=width, shortcut=shortcut, head_std=head_std)


def resnet44(
    classes: int = 10, in_channels: int = 3, *, width: int = 16, shortcut: str = "A", head_std: float = 0.01
) -> CifarResNet:
    """Three stages of 7 blocks, 32x32 images: 658,586 parameters at 10 classes. See `CifarResNet`."""
    return CifarResNet((7, 7, 7), classes, in_channels, width=width, shortcut=shortcut, head_std=head_std)


def resnet56(
    classes: int = 10, in_channels: int = 3, *, width: int = 16, shortcut: str = "A", head_std: float = 0.01
) -> CifarResNet:
    """Three stages of 9 blocks, 32x32 images: 853,018 parameters at 10 classes. See `CifarResNet`."""
    return CifarResNet((9, 9, 9), classes, in_channels, width=width, shortcut=shortcut, head_std=head_std)
