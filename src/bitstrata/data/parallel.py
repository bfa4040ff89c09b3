"""Aligned texts in two languages, word vocabularies, and BLEU."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .dataset import DataError, Indices, as_index
from .lines import read_lines

PADDING, START, END, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


@dataclass(frozen=True)
class WordVocabulary:
    """Words by number; 0..3 are padding, start, end and unknown."""

    words: tuple[str, ...]

    @classmethod
    def build(cls, sentences: Iterable[Sequence[str]], *, limit: int | None = None, least: int = 1) -> WordVocabulary:
        """The most frequent words, at most `limit` (None for all), that occur at least `least` times.

        Words of equal frequency are in the order of their characters. ValueError for limit or least below 1.
        """
        if (limit is not None and limit < 1) or least < 1:
            raise ValueError(f"WordVocabulary: limit and least must be at least 1, got {limit} and {least}")
        counts = Counter(word for sentence in sentences for word in sentence)
        ordered = sorted((word for word in counts if counts[word] >= least), key=lambda word: (-counts[word], word))
        return cls((*SPECIAL, *(word for word in ordered[:limit] if word not in SPECIAL)))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, sentences: Sequence[Sequence[str]], *, start: bool = False) -> Tensor:
        """Tokens int64 (B, L), each sentence with the end token behind it, and before it the start token if asked.

        Shorter sentences are filled up with padding; unknown words, and words spelled like one of the four, get the
        unknown token.
        """
        index = {word: i for i, word in enumerate(self.words) if i >= len(SPECIAL)}
        head = [START] if start else []
        rows = [[*head, *(index.get(word, UNKNOWN) for word in sentence), END] for sentence in sentences]
        length = max(map(len, rows), default=0)
        filled = [row + [PADDING] * (length - len(row)) for row in rows]
        return torch.tensor(filled, dtype=torch.int64).view(len(rows), length)

    def decode(self, tokens: Tensor) -> list[list[str]]:
        """Words of tokens (B, L), each row up to its end token, without padding and start token."""
        sentences = []
        for row in tokens.tolist():
            kept = row[: row.index(END)] if END in row else row
            sentences.append([self.words[token] for token in kept if token not in (PADDING, START)])
        return sentences


@dataclass(frozen=True, eq=False)
class ParallelCorpus:
    """Sentence pairs, each a tuple of words."""

    source: tuple[tuple[str, ...], ...]
    target: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: Indices, source: WordVocabulary, target: WordVocabulary) -> tuple[Tensor, Tensor, Tensor]:
        """Source (B, S), decoder input (B, T) from the start token on, and what it should say, (B, T) to the end token.

        IndexError beyond the end.
        """
        rows = as_index(indices).tolist()
        told = target.encode([self.target[row] for row in rows], start=True)
        return source.encode([self.source[row] for row in rows]), _without_end(told), told[:, 1:]


def _without_end(tokens: Tensor) -> Tensor:
    """Rows without their end token, one column shorter."""
    return tokens.masked_fill(tokens == END, PADDING)[:, :-1]


def read_parallel(source: str | Path, target: str | Path) -> ParallelCorpus:
    """Two files (plain, .gz or .xz) whose lines n translate each other; words are separated by white space.

    Raises:
        DataError: a file that cannot be read, different numbers of lines, no line, or a line without words.
    """
    paths = (Path(source), Path(target))
    sides = [[tuple(line.split()) for line in read_lines(path)] for path in paths]
    if len(sides[0]) != len(sides[1]):
        raise DataError(f"{paths[0]} has {len(sides[0])} lines but {paths[1]} {len(sides[1])}: not aligned")
    for path, side in zip(paths, sides, strict=True):
        if not side:
            raise DataError(f"{path}: no lines")
        if () in side:
            raise DataError(f"{path}, line {side.index(()) + 1}: a sentence without words")
    return ParallelCorpus(tuple(sides[0]), tuple(sides[1]))


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 0..100, one reference a sentence, as sacrebleu computes it by default (tokenizer 13a).

    Sources: Papineni et al., BLEU, 2002; Post, A call for clarity in reporting BLEU scores, 2018.

    Raises:
        ImportError: sacrebleu is not installed. ValueError: different numbers of sentences, or none.
    """
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"bleu: {len(hypotheses)} hypotheses do not fit {len(references)} references")
    try:
        sacrebleu = importlib.import_module("sacrebleu")
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install 'bitstrata[tasks]'") from error
    return float(sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score)
