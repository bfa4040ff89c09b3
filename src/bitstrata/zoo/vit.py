"""Vision transformer for small images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import check_positive


class SelfAttention(nn.Module):
    """Multi-head self-attention (B, T, width) to (B, T, width), whose projections are `nn.Linear`.

    One layer gives queries, keys and values, so the input is quantized once where layers train in integers. Scores,
    softmax and the weighted mean are `scaled_dot_product_attention`.

    Source: Vaswani et al., Attention is all you need, 2017, section 3.2.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"SelfAttention: width {width} is no multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.out(mixed.transpose(1, 2).flatten(2))


class ViTBlock(nn.Module):
    """Pre-normalized block: attention, then two linear layers with GELU between, each added to its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """(B, in_channels, size, size) to logits (B, classes).

    Patches by a convolution of stride `patch`, learned positions, `depth` pre-normalized blocks, layer normalization,
    and the mean over patches instead of a class token.

    Sources: Dosovitskiy et al., An image is worth 16x16 words, 2020; the mean: Beyer et al., Better plain ViT baselines
    for ImageNet-1k, 2022.
    """

    def __init__(
        self,
        classes: int,
        in_channels: int,
        *,
        size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
    ) -> None:
        super().__init__()
        check_positive(
            "VisionTransformer", classes=classes, in_channels=in_channels, size=size, patch=patch, width=width,
            depth=depth, heads=heads, hidden=hidden,
        )  # fmt: skip
        if size % patch:
            raise ValueError(f"VisionTransformer: images of {size} pixels do not divide into patches of {patch}")
        self.patches = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(ViTBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def vit_cifar(
    classes: int = 10,
    in_channels: int = 3,
    *,
    width: int = 192,
    depth: int = 6,
    heads: int = 3,
    hidden: int | None = None,
    patch: int = 4,
) -> VisionTransformer:
    """(B, in_channels, 32, 32) to logits (B, classes): a `VisionTransformer` on 64 patches of 4x4 pixels.

    hidden: of the blocks' linear layers, None for 4 * width. 2,693,194 parameters by default.

    Raises ValueError for sizes that are not positive, and where patches do not divide 32 or heads the width.
    """
    hidden = 4 * width if hidden is None else hidden
    return VisionTransformer(
        classes, in_channels, size=32, patch=patch, width=width, depth=depth, heads=heads, hidden=hidden
    )
