"""Text files, plain or compressed, and numbers in them, with errors that name path and line."""

from __future__ import annotations

import gzip
import lzma
import math
import zlib
from pathlib import Path

from .dataset import DataError, read_bytes


def read_text(path: Path) -> str:
    """The file's text (UTF-8), decompressed if its name ends in .gz or .xz. Raises DataError."""
    data = read_bytes(path)
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        elif path.suffix == ".xz":
            data = lzma.decompress(data)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{path}: truncated or malformed {path.suffix[1:]} file of {len(data)} bytes ({error})"
        ) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 at byte {error.start} ({error.reason})") from error


def read_lines(path: Path) -> list[str]:
    """Lines as `read_text` has them, ended by newline (with or without carriage return), which is taken off."""
    lines = read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def number(text: str, where: str, what: str) -> float:
    """A finite number, or DataError: `where` is path and line, `what` the column."""
    try:
        value = float(text)
    except ValueError as error:
        raise DataError(f"{where}: {what} must be a number, found {text!r}") from error
    if not math.isfinite(value):
        raise DataError(f"{where}: {what} must be finite, found {text!r}")
    return value


def whole(text: str, where: str, what: str) -> int:
    """A whole number of 0 or more, or DataError."""
    value = number(text, where, what)
    if value < 0 or value != int(value) or value >= 2**53:
        raise DataError(f"{where}: {what} must be a whole number of at least 0, found {text!r}")
    return int(value)
