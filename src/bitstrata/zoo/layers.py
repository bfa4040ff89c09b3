"""What several networks share: convolutions, the parameter-free shortcut, initialization, argument checks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

STEMS = ("imagenet", "cifar")


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution, padding 1, no bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution, no bias."""
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


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


def initialize(model: nn.Module) -> None:
    """In place: He-normal convolutions (fan out), unit batch norms, small normal linear weights, zero biases.

    Source: He et al., Delving Deep into Rectifiers, 2015.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_positive(network: str, **values: int | float) -> None:
    """ValueError naming the first argument that is not positive."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{network}: {name} must be positive, got {value}")


def check_choice(network: str, argument: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError naming the argument and its choices."""
    if value not in choices:
        raise ValueError(f"{network}: {argument} must be {' or '.join(map(repr, choices))}, got {value!r}")
