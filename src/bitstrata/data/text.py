"""Text as a sequence of characters, for language models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from .dataset import DataError
from .lines import read_text


@dataclass(frozen=True, eq=False)
class CharacterText:
    """A text as tokens: int64, each the index of its character in `vocabulary`.

    train, valid: the first part of the text and the rest.
    vocabulary: the characters of the whole text, ascending.
    """

    train: Tensor
    valid: Tensor
    vocabulary: str

    def encode(self, text: str) -> Tensor:
        """Tokens (T,). DataError for a character that the vocabulary lacks."""
        index = {character: i for i, character in enumerate(self.vocabulary)}
        unknown = next((c for c in text if c not in index), None)
        if unknown is not None:
            raise DataError(f"character text: {unknown!r} is none of {len(index)} characters of the vocabulary")
        return torch.tensor([index[c] for c in text], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The characters of tokens (T,)."""
        return "".join(self.vocabulary[int(token)] for token in tokens)

    def part(self, split: str) -> Tensor:
        """The tokens of "train" or "valid"; ValueError for another name."""
        if split not in ("train", "valid"):
            raise ValueError(f"character text: split must be 'train' or 'valid', got {split!r}")
        return self.train if split == "train" else self.valid

    def windows(self, split: str, count: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """`count` windows at uniform places: inputs and, one character later, targets, both int64 (count, length).

        ValueError where the part has no `length` + 1 characters.
        """
        tokens = self.part(split)
        _fits(tokens, length, split)
        starts = torch.randint(len(tokens) - length, (count,), generator=generator)
        rows = tokens[starts[:, None] + torch.arange(length + 1)]
        return rows[:, :-1], rows[:, 1:]

    def spans(self, split: str, length: int) -> tuple[Tensor, Tensor]:
        """The part in consecutive windows (n, length) and their targets; what is left over at the end is not used."""
        tokens = self.part(split)
        _fits(tokens, length, split)
        n = (len(tokens) - 1) // length
        return tokens[: n * length].view(n, length), tokens[1 : n * length + 1].view(n, length)


def _fits(tokens: Tensor, length: int, split: str) -> None:
    if not 1 <= length < len(tokens):
        raise ValueError(f"character text: windows of {length} do not fit the {len(tokens)} characters of {split!r}")


def read_characters(path: str | Path, *, valid_fraction: float = 0.1) -> CharacterText:
    """Text from a UTF-8 file, plain, .gz or .xz; its last int(valid_fraction * length) characters are "valid".

    Raises DataError for a file that cannot be read or has fewer than two characters in a part, ValueError for a
    fraction outside 0..1.
    """
    path = Path(path)
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction must lie between 0 and 1, got {valid_fraction}")
    text = read_text(path)
    valid = int(valid_fraction * len(text))
    if min(valid, len(text) - valid) < 2:
        raise DataError(f"{path}: {len(text)} characters are too few for two parts at valid_fraction={valid_fraction}")
    vocabulary = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(vocabulary)}
    tokens = torch.tensor([index[c] for c in text], dtype=torch.int64)
    return CharacterText(tokens[: len(text) - valid], tokens[len(text) - valid :], vocabulary)
