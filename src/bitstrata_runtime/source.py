"""Where an artifact's files come from. A `Source` hands out whole files by name; nothing else is asked of it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Protocol

from .errors import ArtifactError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")


class Source(Protocol):
    """Anything that can deliver an artifact's files: a directory, an archive, a server."""

    def read(self, name: str, limit: int) -> bytes:
        """The whole content of file `name`.

        Raises ArtifactError if there is no such file, or if it is longer than `limit` bytes; in that case no more than
        limit + 1 bytes of it are read.
        """
        ...


def check_name(name: str) -> None:
    """Raise ArtifactError unless `name` is a plain file name of an artifact: no separators, no leading dot."""
    if not _NAME.fullmatch(name):
        raise ArtifactError(
            f"file name {name[:80]!r} is not allowed: names have 1 to 128 of the characters a-z 0-9 . _ - "
            "and start with a letter or digit"
        )


class DirectorySource:
    """The files of one directory. The directory itself may be a link; its entries must be regular files.

    `reads` lists (name, bytes) of every completed read, in order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.reads: list[tuple[str, int]] = []
        if not os.path.isdir(self.path):
            raise ArtifactError(f"{self.path}: no such directory; an artifact is a directory with a manifest.json")

    def read(self, name: str, limit: int) -> bytes:
        """See `Source.read`. Symbolic links, devices, pipes and directories are refused."""
        check_name(name)
        try:
            data = self._read(name, limit)
        except OSError as error:
            raise ArtifactError(f"{name}: cannot be read from {self.path}: {error.strerror or error}") from error
        self.reads.append((name, len(data)))
        return data

    def _read(self, name: str, limit: int) -> bytes:
        path = self.path / name
        # The kind is looked at before opening (opening a pipe or a device can act or wait) and again on what was
        # opened, in case the entry was exchanged in between.
        _check_regular(name, os.lstat(path).st_mode)
        flags = os.O_RDONLY
        for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
            flags |= getattr(os, flag, 0)
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            _check_regular(name, status.st_mode)
            if status.st_size > limit:
                raise ArtifactError(f"{name}: has {status.st_size} bytes, at most {limit} are allowed")
            data = file.read(status.st_size + 1)  # one byte more shows a file that is still growing
        if len(data) != status.st_size:
            raise ArtifactError(f"{name}: changed while it was read")
        return data


def _check_regular(name: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "a directory" if stat.S_ISDIR(mode) else "a special file"
        raise ArtifactError(f"{name}: is {kind}; the files of an artifact are regular files")
