"""What this machine is called."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the operating system tells it, with family and model where it has them.

    Virtual machines often say no more than a brand: processors of several generations are all called "AMD EPYC".
    """
    found: dict[str, str] = {}
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip().lower(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    if found.get("cpu family") and found.get("model"):
        return f"{name} (family {found['cpu family']}, model {found['model']})"
    return name
