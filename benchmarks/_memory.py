"""Peak memory of some steps of training, measured in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

MB = 2**20
STEPS = 3  # in a process that measures memory
PROCESSES = 3  # that measure the same: peaks of torch's steps differ by a tenth
KEEP_FREED = "let glibc keep freed memory, for all contestants; the processes that measure memory do not"
_CLEAR = Path("/proc/self/clear_refs")  # of Linux: written to, it makes the peak the present


def rise(work: Callable[[], object], steps: int = STEPS) -> float:
    """MB (2^20 bytes) by which the peak resident set of `steps` runs of `work` is above the resident set before them.

    What a library needs only once should be touched before, for instance by a step on a small batch.
    """
    before = _resident()
    for _ in range(steps):
        work()
    return (_peak() - before) / MB


def in_own_processes(script: str, options: Mapping[str, object], what: str, *, quick: bool) -> float:
    """The number that `script` prints last when it runs with these options in a process of its own.

    The median of PROCESSES, of one if `quick`.

    Raises:
        SystemExit: a process failed; `what` names what was measured.
    """
    command = [sys.executable, script, *(str(part) for option in options.items() for part in option)]
    found = []
    for _ in range(1 if quick else PROCESSES):
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"{what}: the process that measures memory failed")
        found.append(float(result.stdout.split()[-1]))
    return statistics.median(found)


def _resident() -> int:
    """Bytes in use, after all that is free was returned to the system; the peak starts anew from here."""
    gc.collect()
    if not _CLEAR.exists():
        return _peak()
    ctypes.CDLL(None).malloc_trim(0)
    # ru_maxrss keeps the peak of making the model, and on Linux a process starts with its parent's
    _CLEAR.write_text("5", encoding="ascii")
    return _status("VmRSS")


def _peak() -> int:
    """Bytes of the largest resident set so far."""
    if _CLEAR.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
