"""What several networks share: convolutions, the parameter-free shortcut, initialization, argument checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

STEMS = ("imagenet", "cifar")


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution, padding 1, no bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution, no bias."""
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


def first_convolution(in_channels: int, outputs: int, stem: str) -> nn.Conv2d:
    """The first convolution of a residual network: 7x7 of stride 2 ("imagenet") or 3x3 of stride 1 ("cifar")."""
    if stem == "imagenet":
        return nn.Conv2d(in_channels, outputs, 7, 2, padding=3, bias=False)
    return conv3x3(in_channels, outputs)


def residual_stages(
    block: Callable[[int, int, int], nn.Module], counts: Sequence[int], inputs: int, width: int
) -> list[nn.Sequential]:
    """Stage s: counts[s] of `block(inputs, outputs, stride)` with width * 2^s outputs, halving the map from s = 1 on.

    inputs: channels that the first block reads.
    """
    stages = []
    for stage, count in enumerate(counts):
        outputs = width * 2**stage
        first = block(inputs, outputs, 1 if stage == 0 else 2)
        stages.append(nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(count - 1))))
        inputs = outputs
    return stages


class PadShortcut(nn.Module):
    """Shortcut without parameters: every second row and column, zero channels on both sides.

    (B, C, H, W) to (B, C + 2 * extra, ceil(H / 2), ceil(W / 2)).
    Source: He et al., Deep Residual Learning for Image Recognition, 2015, option A of section 3.3.
    """

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))

    def extra_repr(self) -> str:
        return f"extra={self.extra}"


def initialize(model: nn.Module, head_std: float = 0.01) -> None:
    """In place: He-normal convolutions (fan out), unit batch norms, normal linear weights, zero biases.

    Source: He et al., Delving Deep into Rectifiers, 2015.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=head_std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_positive(network: str, **values: int | float) -> None:
    """ValueError naming the first argument that is not positive."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{network}: {name} must be positive, got {value}")


def check_choice(network: str, argument: str, value: object, choices: tuple[object, ...]) -> None:
    """ValueError naming the argument and its choices."""
    if value not in choices:
        raise ValueError(f"{network}: {argument} must be {' or '.join(map(repr, choices))}, got {value!r}")
