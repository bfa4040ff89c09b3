"""Checkpoint files: written whole or not at all, checked when they are read, and without code in them.

A file is a safetensors file. Its tensors are those of the state, named by their place in it; its metadata hold the rest
as JSON and a SHA-256 digest of everything. Files of format 1, which torch wrote, are still read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

FORMAT = 2
READABLE = (1, FORMAT)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read, or that belongs to another run."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, and dicts, lists and tuples of them) atomically.

    A crash at any moment leaves either the old file or the new one under the name.

    Raises:
        CheckpointError: the file system refuses (full, read-only, ...); what was there before is intact.
        TypeError: a value of another kind, with its place in the state.
    """
    temporary = write_temporary(path, state)
    with refused(path, temporary):
        os.replace(temporary, path)
        sync_directory(path.parent)


def write_temporary(path: Path, state: Mapping[str, Any]) -> Path:
    """Write `state` beside `path`, down to the disk; the caller gives the file its name. Raises what `save` does."""
    data = encode(state)
    temporary = path.with_name(path.name + ".tmp")
    with refused(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    return temporary


class refused:  # noqa: N801 - reads as a clause: with refused(path, temporary): ...
    """Turns what the file system refuses into a CheckpointError, and frees the space of the temporary file."""

    def __init__(self, path: Path, temporary: Path) -> None:
        self.path, self.temporary = path, temporary

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        with contextlib.suppress(OSError):  # the error at hand says more
            self.temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"checkpoint {self.path}: cannot be written ({error.strerror or error}); checkpoints that were there "
            "before are intact. Mend the cause and start again to continue from the last one"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it, onto the processor.

    Raises:
        CheckpointError: the file is torn, altered, of another format, or no checkpoint; the message names it.
    """
    state = load_tensors(path)
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found not in READABLE:
        raise CheckpointError(f"checkpoint {path}: format {found!r}, this version reads formats 1 and {FORMAT}")
    return cast(dict[str, Any], state)


def load_tensors(path: Path) -> Any:
    """The content of a checkpoint of either format, or of any file of torch that holds tensors and plain values alone.

    Raises:
        CheckpointError: anything else.
    """
    with path.open("rb") as stream:
        ours = stream.read(9)[8:] == b"{"  # a safetensors file: the length of its header, then JSON
    return decode(path) if ours else _load_with_torch(path)


def encode(state: Mapping[str, Any]) -> bytes:
    """The bytes of a checkpoint file. Raises TypeError for a value that it cannot hold, naming its place."""
    from safetensors.torch import save as serialize

    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_plain({**state, "format": FORMAT}, "", tensors))
    stored = _stored(tensors)
    metadata = {"format": f"bitstrata checkpoint {FORMAT}", "state": plain, "sha256": _digest(plain, stored)}
    return serialize(stored, metadata)


def decode(path: Path) -> dict[str, Any]:
    """Read what `encode` made. Raises CheckpointError if a byte that matters is not as it was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {path}: not readable, torn or altered ({error})") from error
    plain = metadata.get("state")
    if plain is None:
        raise CheckpointError(f"checkpoint {path}: a safetensors file, but no checkpoint of a run")
    if _digest(plain, tensors) != metadata.get("sha256"):
        raise CheckpointError(f"checkpoint {path}: torn or altered: its content does not have the SHA-256 it states")
    return cast(dict[str, Any], _restored(json.loads(plain), tensors))


def _plain(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; tensors go into `tensors` and are referred to."""
    if isinstance(value, Tensor):
        tensors[place] = value
        stride = {} if value.is_contiguous() else {"stride": list(value.stride())}
        return {"$tensor": place, **stride}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_plain(item, f"{place}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [_plain(item, f"{place}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, Mapping):
        items = [(key, _plain(item, f"{place}.{key}".lstrip("."), tensors)) for key, item in value.items()]
        named = all(isinstance(key, str) and not key.startswith("$") for key, _ in items)
        return dict(items) if named else {"$items": [[_plain(key, place, tensors), item] for key, item in items]}
    raise TypeError(f"checkpoint: {place} is a {type(value).__name__}, which a checkpoint cannot hold")


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_plain`."""
    if isinstance(value, list):
        return [_restored(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        tensor = tensors[value["$tensor"]]
        if "stride" not in value:
            return tensor
        return torch.empty_strided(tensor.shape, value["stride"], dtype=tensor.dtype).copy_(tensor)
    if "$tuple" in value:
        return tuple(_restored(value["$tuple"], tensors))
    if "$items" in value:
        return {key: _restored(item, tensors) for key, item in value["$items"]}
    return {key: _restored(item, tensors) for key, item in value.items()}


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: on the processor, contiguous, none sharing memory with another."""
    seen: set[int] = set()
    stored = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage().data_ptr()
        stored[name] = own.clone() if memory in seen else own
        seen.add(memory)
    return stored


def _digest(plain: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(plain.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load_with_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # malformed pickles fail in any way
        # torch goes on to recommend loading the file without protection, which is no advice to pass on.
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise CheckpointError(f"checkpoint {path}: not readable as weights only ({reason})") from error


def rng_state() -> dict[str, Any]:
    """State of every random generator in use, as tensors and plain values that a checkpoint can hold."""
    name, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss_next],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def seed_all(seed: int) -> None:
    """Seed torch (all devices), numpy's global generator and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def sync_directory(directory: Path) -> None:
    """Make a rename itself durable; not every file system offers it, and the data is safe either way."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
