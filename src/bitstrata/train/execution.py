"""What decides the bits of a run beside its configuration: the machine's side, and how the network is quantized."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bitstrata_runtime
from bitstrata_runtime.machine import cpu_name

#: Attributes of modules that change while a network trains, or say how it is run.
_PASSING = frozenset({"training", "precision", "observing", "step_weights", "sync"})


def execution(device: torch.device) -> dict[str, str]:
    """Threads, instruction sets, processor, device and versions: with all of them equal, a run repeats its bits."""
    isas = bitstrata_runtime.available_isas()
    return {
        "threads": str(torch.get_num_threads()),
        "torch's instruction set": torch.backends.cpu.get_cpu_capability(),
        "bitstrata's instruction set": os.environ.get("BITSTRATA_ISA") or (isas[-1] if isas else "none"),
        "processor": cpu_name() or "unknown",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "bitstrata": importlib.metadata.version("bitstrata"),
    }


def quantization(model: nn.Module) -> dict[str, dict[str, str]]:
    """Qualified name -> type and settings, for every module of this package: what a recipe has made of a network."""
    return {name: _settings(module) for name, module in model.named_modules() if _is_ours(module)}


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that the state_dict leaves out, by qualified name."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def unequal(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """Readable differences, in the order of the names."""
    return [
        f"{name}: {saved.get(name, 'not recorded')} saved, {current.get(name, 'absent')} now"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]


def requantized(saved: Mapping[str, Mapping[str, str]], current: Mapping[str, Mapping[str, str]]) -> str:
    """The difference between two results of `quantization` in words; "" if they are equal."""
    changed = [name for name in sorted(saved.keys() | current.keys()) if saved.get(name) != current.get(name)]
    if not changed:
        return ""
    first = changed[0]
    if first in saved and first in current:
        details = ", ".join(unequal(saved[first], current[first]))
    else:
        details = f"{'in the checkpoint' if first in saved else 'in the network'} only"
    return f"{len(changed)} modules differ, the first is {first!r}: {details}"


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitstrata.")


def _settings(module: nn.Module) -> dict[str, str]:
    settings = {
        name: repr(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _PASSING and _is_plain(value)
    }
    return {"type": type(module).__name__, **settings}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    if is_dataclass(value) and not isinstance(value, type):
        return bool(value.__dataclass_params__.frozen)  # type: ignore[attr-defined]
    return value is None or isinstance(value, bool | int | float | str)
