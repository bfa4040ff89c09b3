"""Transformers on sequences of tokens: a causal language model, and an encoder with a decoder for translation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .layers import check_positive


class FeedForward(nn.Module):
    """Two linear layers with GELU between: (..., width) to (..., width)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class EncoderBlock(nn.Module):
    """Pre-normalized block: self-attention and a feed-forward part, each added to its input, behind dropout."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.feed = FeedForward(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, absent: Tensor | None = None) -> Tensor:
        """x (B, T, width); mask bool (T, T), True where attention is barred; absent bool (B, T), True for padding."""
        y = self.norm1(x)
        mixed, _ = self.attention(y, y, y, attn_mask=mask, key_padding_mask=absent, need_weights=False)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.feed(self.norm2(x)))


class DecoderBlock(nn.Module):
    """Pre-normalized block: causal self-attention, attention to the encoder's result, a feed-forward part."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm3 = nn.LayerNorm(width)
        self.feed = FeedForward(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor, absent: Tensor) -> Tensor:
        """x (B, T, width); memory (B, S, width); mask bool (T, T); absent bool (B, S), True for padding of memory."""
        y = self.norm1(x)
        mixed, _ = self.attention(y, y, y, attn_mask=mask, need_weights=False)
        x = x + self.dropout(mixed)
        mixed, _ = self.cross(self.norm2(x), memory, memory, key_padding_mask=absent, need_weights=False)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.feed(self.norm3(x)))


class TransformerLM(nn.Module):
    """Causal language model: tokens int64 (B, T), T <= context, to logits (B, T, vocabulary).

    Position t sees tokens 0..t. Token embedding plus learned positions, pre-normalized blocks, layer normalization, a
    linear layer. Attention is `nn.MultiheadAttention`.

    Args:
        vocabulary: number of tokens. context: the longest sequence.
        hidden: of the feed-forward parts, None for 4 * width.
        tied: the last layer's weight is the embedding's.

    Sources: Vaswani et al., Attention is all you need, 2017; Radford et al., Language models are unsupervised multitask
    learners, 2019 (norms first); tied weights: Press and Wolf, 2017.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        context: int = 128,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        hidden: int | None = None,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        _check("TransformerLM", width, heads, vocabulary=vocabulary, context=context, depth=depth)
        hidden = 4 * width if hidden is None else hidden
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.positions, std=0.02)
        _initialize(self, residual=2 * depth)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= self.context:
            raise ValueError(
                f"TransformerLM: tokens must be (B, T) with T in 1..{self.context}, got {tuple(tokens.shape)}"
            )
        length = tokens.shape[1]
        mask = causal_mask(length, tokens.device)
        x = self.dropout(self.embedding(tokens) + self.positions[:length])
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class Seq2SeqTransformer(nn.Module):
    """Translation: source int64 (B, S) and target int64 (B, T) to logits (B, T, target_vocabulary).

    logits[:, t] predict the token behind target[:, t]; they depend on target[:, :t + 1] and on the whole source. The
    target starts with a start token. Sinusoidal positions, so lengths have no limit; pre-normalized blocks.

    Args:
        source_vocabulary, target_vocabulary: numbers of tokens.
        depth: blocks of the encoder, and of the decoder.
        hidden: of the feed-forward parts, None for 4 * width.
        padding: the token of both languages that fills up sentences; attention skips it in the source.
        tied: the last layer's weight is the target embedding's.

    Source: Vaswani et al., Attention is all you need, 2017; norms first as in Xiong et al., 2020.
    """

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        *,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        hidden: int | None = None,
        dropout: float = 0.1,
        padding: int = 0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        counts = {"source_vocabulary": source_vocabulary, "target_vocabulary": target_vocabulary, "depth": depth}
        _check("Seq2SeqTransformer", width, heads, **counts)
        if width % 2:
            raise ValueError(f"Seq2SeqTransformer: width must be even for sinusoidal positions, got {width}")
        hidden = 4 * width if hidden is None else hidden
        self.padding = padding
        self.source_embedding = nn.Embedding(source_vocabulary, width)
        self.target_embedding = nn.Embedding(target_vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(EncoderBlock(width, heads, hidden, dropout) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(DecoderBlock(width, heads, hidden, dropout) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, target_vocabulary, bias=False)
        _initialize(self, residual=3 * depth)
        if tied:
            self.head.weight = self.target_embedding.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        if source.dim() != 2 or target.dim() != 2 or len(source) != len(target):
            raise ValueError(
                f"Seq2SeqTransformer: source and target must be (B, S) and (B, T), "
                f"got {tuple(source.shape)} and {tuple(target.shape)}"
            )
        return self.decode(self.encode(source), source == self.padding, target)

    def encode(self, source: Tensor) -> Tensor:
        """Source (B, S) to what the decoder reads, (B, S, width). ValueError for a sentence of padding alone."""
        absent = source == self.padding
        empty = absent.all(1)
        if empty.any():
            raise ValueError(f"Seq2SeqTransformer: source sentence {int(empty.nonzero()[0])} holds nothing but padding")
        x = self._embedded(self.source_embedding, source)
        for block in self.encoder:
            x = block(x, absent=absent)
        return self.encoder_norm(x)

    def decode(self, memory: Tensor, absent: Tensor, target: Tensor) -> Tensor:
        """Memory (B, S, width), absent bool (B, S) and target (B, T) to logits (B, T, target_vocabulary)."""
        x = self._embedded(self.target_embedding, target)
        mask = causal_mask(target.shape[1], target.device)
        for block in self.decoder:
            x = block(x, memory, mask, absent)
        return self.head(self.decoder_norm(x))

    @torch.no_grad()
    def greedy(self, source: Tensor, start: int, end: int, limit: int) -> Tensor:
        """The likeliest token at each step, from `start` on until all sentences met `end`, at most `limit` tokens.

        Returns int64 (B, L), L <= limit, without the start token; padding behind `end`. In the model's present mode:
        call `eval()` first. Padding itself is never chosen.

        Raises:
            ValueError: limit below 1.
        """
        if limit < 1:
            raise ValueError(f"Seq2SeqTransformer.greedy: limit must be at least 1, got {limit}")
        memory, absent = self.encode(source), source == self.padding
        tokens = torch.full((len(source), 1), start, dtype=torch.int64, device=source.device)
        done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        while tokens.shape[1] <= limit and not done.all():
            scores = self.decode(memory, absent, tokens)[:, -1]
            scores[:, self.padding] = -math.inf
            chosen = scores.argmax(1).masked_fill(done, self.padding)
            done |= chosen == end
            tokens = torch.cat((tokens, chosen[:, None]), 1)
        return tokens[:, 1:]

    def _embedded(self, embedding: nn.Module, tokens: Tensor) -> Tensor:
        x = embedding(tokens)
        width = x.shape[-1]
        return self.dropout(x * math.sqrt(width) + sinusoids(tokens.shape[1], width).to(x))


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """Bool (length, length), True where a position would see a later one."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def sinusoids(length: int, width: int) -> Tensor:
    """Positions as float32 (length, width): sin in even, cos in odd columns (Vaswani et al., section 3.5)."""
    rates = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), 2).flatten(1).float()


def _check(network: str, width: int, heads: int, **counts: int) -> None:
    check_positive(network, width=width, heads=heads, **counts)
    if width % heads:
        raise ValueError(f"{network}: width {width} is no multiple of {heads} heads")


def _initialize(model: nn.Module, residual: int) -> None:
    """Normal weights of deviation 1 / sqrt(inputs), smaller by sqrt(residual) where a layer ends in a sum."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2 and name != "positions":
            ends = name.endswith(("out_proj.weight", "fc2.weight"))
            nn.init.normal_(parameter, std=(parameter.shape[1] * (residual if ends else 1)) ** -0.5)
