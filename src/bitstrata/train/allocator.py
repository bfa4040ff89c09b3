"""Keep freed memory: on Linux, most of what allocation costs a training step is giving memory back and asking again."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt, see its manual page. Not in any module of Python's.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_NEVER = -1
_PAD = 64 << 20
_LARGEST = (1 << 30, 32 << 20)  # bytes; older versions of glibc refuse the first


def keep_freed_memory() -> bool:
    """Let the C allocator keep what the process frees, for its next allocations; whether it will.

    Tensors of a step are large, and glibc gives large blocks back to the operating system as they are freed: the next
    step gets them anew, page by page, each of them cleared, which takes up to half the time of a training step.
    Afterwards blocks below 1 GiB are kept until the process ends; its peak stays about what it was, but what it holds
    between peaks no longer falls. For the whole process, so it is for programs, not for libraries: `bitstrata train`,
    `quantize`, `demo` and `reproduce` call it. False, and nothing is changed, where the C library is not glibc. Results
    do not depend on it.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    large = any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST)
    return bool(large and mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_TOP_PAD, _PAD))
