"""A user's float checkpoint, in any of the usual wrappings, into a network (torch side)."""

from __future__ import annotations

import argparse
import pathlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from torch import Tensor, nn

from bitstrata.cli.common import CommandError
from bitstrata.train.checkpoint import CheckpointError, load_tensors

#: Entries under which training scripts keep the network's weights, the likeliest first.
ENTRIES = (
    "state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "ema", "model_ema",
    "ema_state_dict", "state_dict_ema",
)  # fmt: skip
# Plain values that training scripts store beside the weights; making them runs nothing of the file's.
_HARMLESS: tuple[Any, ...] = (
    argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, np.dtype, np.ndarray, multiarray.scalar,
    multiarray._reconstruct, *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd"),
)  # fmt: skip


def load_weights(model: nn.Module, path: Path, entry: str | None = None) -> None:
    """Load a float checkpoint into `model`: safetensors, or what torch saved, read without running code.

    The state dict may be the file's whole content or an entry (see `ENTRIES`). A prefix that the network does not have,
    left by DataParallel ("module."), Lightning ("model.") or the like, and torch.compile's "_orig_mod." are stripped.

    Args:
        entry: where in the file the state dict is, with dots between levels; found by itself if None.

    Raises:
        CommandError: no such file; pickled objects; no state dict; missing, unexpected or misshapen entries.
    """
    state, place = _state(path, entry)
    wanted = model.state_dict()
    state, prefix, others = _unwrapped(state, wanted)
    problems = []
    # A counter of batches seen decides nothing at inference, and old checkpoints lack it.
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    shapes = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    if missing:
        problems.append(f"missing {_some(missing)}")
    if unexpected:
        problems.append(f"unexpected {_some(unexpected)}")
    if shapes:
        key = shapes[0]
        problems.append(
            f"{len(shapes)} of another shape, such as {key}: {tuple(state[key].shape)} in the file, "
            f"{tuple(wanted[key].shape)} in the network"
        )
    if problems:
        raise CommandError(f"{path}{place} does not fit the network: {'; '.join(problems)}")
    if others:
        print(f"{path}{place}: not used, because outside {prefix!r}: {_some(others)}", flush=True)
    model.load_state_dict({**wanted, **state})


def _state(path: Path, entry: str | None) -> tuple[Mapping[str, Tensor], str]:
    """The state dict in the file, and where it was found, for people."""
    if not path.is_file():
        raise CommandError(f"checkpoint {path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path), ""
        except SafetensorError as error:
            raise CommandError(f"checkpoint {path}: {error}") from error
    loaded = _read(path)
    names: list[str] = []
    for name in entry.split(".") if entry is not None else ():
        if not isinstance(loaded, Mapping) or name not in loaded:
            raise CommandError(f"checkpoint {path}: no entry {entry!r}; {_content(loaded)}")
        loaded, names = loaded[name], [*names, name]
    while not _is_state(loaded) and isinstance(loaded, Mapping):
        name = _entry(path, loaded)
        loaded, names = loaded[name], [*names, name]
    if not _is_state(loaded):
        raise CommandError(f"checkpoint {path}: holds no state dict of tensors; {_content(loaded)}")
    return loaded, f" ({'.'.join(names)})" if names else ""


def _entry(path: Path, loaded: Mapping[str, Any]) -> str:
    """The entry that holds the weights, or more entries."""
    known = [name for name in ENTRIES if isinstance(loaded.get(name), Mapping)]
    if known:
        return known[0]
    states = [name for name, value in loaded.items() if _is_state(value)]
    if len(states) == 1:
        return states[0]
    hint = "; name the entry with --entry" if states else ""
    raise CommandError(
        f"checkpoint {path}: holds no state dict of tensors, which is looked for under {', '.join(ENTRIES)}; "
        f"{_content(loaded)}{hint}"
    )


def _is_state(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _content(value: object) -> str:
    if not isinstance(value, Mapping):
        return f"it is a {type(value).__name__}"
    return f"it has: {_some([str(key) for key in value], 8)}" if value else "it is empty"


def _read(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(list(_HARMLESS)):
            return load_tensors(path)
    except CheckpointError as error:
        objects = _objects(path)
        if not objects:
            raise CommandError(str(error)) from error
        whole = any(name.startswith("torch.nn.modules.") for name in objects)
        raise CommandError(
            f"checkpoint {path}: holds pickled Python objects ({_some(objects)}), and loading them would run code of "
            "the file. "
            + (
                "It looks like a whole model; where its classes can be imported, save the weights alone: "
                'torch.save(torch.load(PATH, weights_only=False).state_dict(), "weights.pt")'
                if whole
                else "Where you trust it, save the weights alone: "
                'torch.save(torch.load(PATH, weights_only=False)["state_dict"], "weights.pt")'
            )
        ) from error


def _objects(path: Path) -> list[str]:
    """Classes and functions that unpickling the file would use, apart from tensors and plain values."""
    try:
        with torch.serialization.safe_globals(list(_HARMLESS)):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError, NotImplementedError):
        return []  # not a file of torch's current format, or a torn one


def _unwrapped(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, list[str]]:
    """The entries under the prefix that makes most of them fit, without it; the prefix; entries outside it."""
    plain = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    parts = {key: key.split(".") for key in plain}
    prefixes = {".".join([*split[:n], ""]) for split in parts.values() for n in range(1, len(split))}
    best = max(["", *sorted(prefixes)], key=lambda prefix: (sum(prefix + key in plain for key in wanted), -len(prefix)))
    inside = {key.removeprefix(best): value for key, value in plain.items() if key.startswith(best)}
    return inside, best, [key for key in plain if not key.startswith(best)]


def _some(keys: list[str], limit: int = 3) -> str:
    rest = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + rest
