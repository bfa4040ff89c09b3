"""One process at a time in a run directory: two would overwrite each other's checkpoints and mix their records."""

from __future__ import annotations

import os
import platform
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows has none, and directories are not locked there
    fcntl = None

NAME = ".lock"


class DirectoryInUseError(RuntimeError):
    """Another process trains in the directory."""


class _Held:
    """A lock of this process: the open file that has it, and how many `DirectoryLock`s share it."""

    def __init__(self, handle: int) -> None:
        self.handle, self.shares = handle, 1


_held: dict[Path, _Held] = {}


class DirectoryLock:
    """Keeps other processes out of a run directory from `take` to `release`, or to the end of a `with` block.

    The lock is the kernel's (flock) on the file DIRECTORY/.lock, which holds the process's number and host. It ends
    with the process, however that ends, and does not pass to forked ones. Within a process it can be taken by several:
    a command holds it around all of its stages.

    Where the system or the file system has no locks, nothing is locked (with a warning for a file system).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path: Path | None = None  # while this object has a share of the lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def take(self) -> None:
        """Take the lock, and make the directory if there is none; nothing changes if this object has it.

        Raises:
            DirectoryInUseError: another process has it; the message names it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        if fcntl is None or self.path is not None:
            return
        path = self.directory.resolve() / NAME
        if path in _held:
            _held[path].shares += 1
        else:
            handle = self._locked(path)
            if handle is None:
                return
            _held[path] = _Held(handle)
        self.path = path

    def release(self) -> None:
        """Give the lock back, with the file; nothing happens without it."""
        path, self.path = self.path, None
        if path is None or path not in _held:
            return
        held = _held[path]
        held.shares -= 1
        if held.shares == 0:
            del _held[path]
            with suppress(OSError):  # the directory may be gone
                path.unlink()  # before the lock ends: who opened this file in the meantime sees that it has no name
            os.close(held.handle)

    def _locked(self, path: Path) -> int | None:
        """An open file with the lock; None where there are no locks."""
        while True:
            handle = None
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert handle is not None
                raise self._in_use(handle) from None
            except OSError as error:  # a right or a place to write is missed too, and told of, by the first checkpoint
                if handle is not None:
                    os.close(handle)
                warnings.warn(
                    f"{path}: cannot be locked ({error.strerror or error}); no other process may train in this "
                    "directory at the same time",
                    stacklevel=3,
                )
                return None
            if _names(path, handle):
                with suppress(OSError):  # on a full disk the lock does without
                    os.ftruncate(handle, 0)
                    os.write(handle, f"{os.getpid()} {platform.node()}\n".encode())
                return handle
            os.close(handle)  # its holder has given it back, and taken the file away

    def _in_use(self, handle: int) -> DirectoryInUseError:
        number, _, host = os.read(handle, 4096).decode(errors="replace").strip().partition(" ")
        os.close(handle)
        who = f"process {number} on {host}" if number and host else "another process"
        return DirectoryInUseError(
            f"{self.directory}: {who} trains in this directory; wait until it has ended, end it, or use another "
            "directory"
        )


def _names(path: Path, handle: int) -> bool:
    """Whether the path still stands for the open file."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(handle))


def _forget() -> None:
    """In a forked process: the locks are the parent's; open files that share them would outlive it."""
    for held in _held.values():
        os.close(held.handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
