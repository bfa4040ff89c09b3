"""What the commands share: errors, checked choices, JSON files and a description of the machine."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console


class CommandError(Exception):
    """A command cannot go on; the message is all that the user needs."""


def need_training(command: str, *others: str) -> None:
    """Raise CommandError when torch, or one of the `others` that the command uses, is absent: what to install."""
    missing = [module for module in ("torch", *others) if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(f'{command}: needs {", ".join(missing)}; install it with: pip install "bitstrata[train]"')


def choose(value: str, allowed: Iterable[str], what: str) -> str:
    """`value` if it is allowed, else CommandError listing the choices, the nearest one first."""
    names = sorted(allowed)
    if value in names:
        return value
    close = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise CommandError(f"{what} {value!r} is unknown; {hint}choices: {', '.join(names)}")


def parse_bits(text: str, option: str = "--bits") -> tuple[int, ...]:
    """'1,2,4' -> (1, 2, 4): ascending, each from 1 to 8."""
    try:
        bits = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise CommandError(f"{option} {text!r}: expected numbers separated by commas, such as 1,2,3,4") from None
    if not all(1 <= b <= 8 for b in bits) or list(bits) != sorted(set(bits)):
        raise CommandError(f"{option} {text!r}: expected ascending bit-widths from 1 to 8, such as 1,2,3,4")
    return bits


def parse_floats(text: str, option: str) -> tuple[float, ...]:
    """'0.5,0.5,0.5' -> (0.5, 0.5, 0.5)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise CommandError(f"{option} {text!r}: expected numbers separated by commas, such as 0.49,0.48,0.45") from None


def output() -> Console:
    """Where tables go: as wide as the terminal, or 120 columns in a file."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises CommandError naming the file when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CommandError(f"{path}: not JSON ({error})") from None


def environment() -> dict[str, Any]:
    """Processor, versions and source commit: what a result needs beside it to be compared with another."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(terse=True),
        "versions": {"python": platform.python_version(), **_versions("bitstrata", "numpy", "torch")},
        "commit": _commit(),
    }


def cpu_name() -> str:
    """The processor's model name as the operating system tells it."""
    from bitstrata_runtime.machine import cpu_name as name

    return name()


def bytes_of(path: Path) -> dict[str, int]:
    """Size of every file under a directory, by relative name, in order."""
    return {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()}


def human_bytes(count: int) -> str:
    """1536 -> '1.5 KiB'."""
    if count < 1024:
        return f"{count} B"
    if count < 1024**2:
        return f"{count / 1024:.1f} KiB"
    return f"{count / 1024**2:.2f} MiB"


def _versions(*packages: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> str | None:
    """Commit of the source tree this package lies in; None for an installed package."""
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
