"""PACKAGE.MODULE:NAME on the command line: a user's own network or data, imported and called (torch side)."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitstrata.cli.common import CommandError
from bitstrata.data import DataError, Dataset, from_pairs


def network(name: str, fields: Mapping[str, Any]) -> nn.Module:
    """What PACKAGE.MODULE:NAME stands for: a class or function called with `fields`, or a network (copied).

    Raises CommandError for whatever goes wrong, with the option, the cause and what to do.
    """
    found = imported(name, "--model")
    if isinstance(found, nn.Module):
        if fields:
            raise CommandError(f"--model {name}: is a network already, so --model-set has nothing to set")
        return copy.deepcopy(found)
    model = _called(found, name, fields, "--model", "--model-set")
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model {name}: returned {_kind(model)}, expected a torch.nn.Module")
    return model


def dataset(name: str, split: str, root: Path | None, fields: Mapping[str, Any]) -> Dataset:
    """A split of the user's own data: PACKAGE.MODULE:FUNCTION called with the split, `root` if given, and `fields`.

    It returns a `bitstrata.data.Dataset`, or whatever `bitstrata.data.from_pairs` takes.
    """
    found = imported(name, "--data")
    given = {**({} if root is None else {"root": root}), **fields}
    if not callable(found):
        raise CommandError(
            f"--data {name}: is {_kind(found)}, expected a function of the split ('train' or 'test') that returns data"
        )
    data = _called(found, name, given, "--data", "--data-set", split)
    if isinstance(data, Dataset):
        return data
    try:
        return from_pairs(data, split)
    except (DataError, TypeError) as error:
        raise CommandError(f"--data {name}, split {split!r}: {error}") from error


def imported(name: str, option: str) -> Any:
    """The object PACKAGE.MODULE:NAME; modules of the current directory can be imported, as with `python -m`."""
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    if module_name.endswith(".py") or "/" in module_name:
        dotted = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise CommandError(f"{option} {name}: write the module as Python imports it: {dotted}:{attribute}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise CommandError(
                f"{option} {name}: no module {missing!r} in {here} or among the installed packages"
            ) from error
        raise CommandError(f"{option} {name}: importing {module_name} failed: {error}") from error
    except Exception as error:  # whatever the user's module does when it is imported
        raise CommandError(f"{option} {name}: importing {module_name} failed: {_told(error)}") from error
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module_name]
            raise CommandError(
                f"{option} {name}: {module.__name__} ({getattr(module, '__file__', None)}) has no {attribute!r}; it "
                f"defines: {', '.join(own) or 'nothing'}"
            )
        found = getattr(found, part)
    return found


def check_network(model: nn.Module, example: Tensor, classes: int, what: str) -> None:
    """Raise CommandError unless `model` maps `example` to logits of at least `classes` classes.

    Args:
        example: (1, ...), one input of the data set.
        what: the option that named the network, for the message.
    """
    import torch

    from bitstrata.prepare.observe import evaluating

    takes = f"inputs {example.dtype} of shape {tuple(example.shape)}"
    try:
        with torch.no_grad(), evaluating(model):
            output = model(example)
    except Exception as error:
        raise CommandError(f"{what}: the network does not run on the data's {takes}: {_told(error)}") from error
    if not isinstance(output, Tensor):
        raise CommandError(
            f"{what}: the network returns {_kind(output)}; expected one tensor of logits (N, classes): wrap the "
            "network in one whose forward returns the logits alone"
        )
    if output.dim() != 2 or output.shape[0] != 1:
        raise CommandError(
            f"{what}: the network returns shape {tuple(output.shape)} for {takes}; expected logits (1, classes)"
        )
    if output.shape[1] < classes:
        raise CommandError(
            f"{what}: the network returns {output.shape[1]} logits, but the data have labels 0..{classes - 1}, "
            f"{classes} classes"
        )


def _called(found: Any, name: str, fields: Mapping[str, Any], option: str, setter: str, *positional: Any) -> Any:
    if not callable(found):
        raise CommandError(f"{option} {name}: is {_kind(found)}, expected a function or class")
    try:
        signature: inspect.Signature | None = inspect.signature(found)
    except (TypeError, ValueError):  # built in C, without one
        signature = None
    if signature is not None:
        try:
            signature.bind(*positional, **fields)
        except TypeError as error:
            given = ", ".join([*map(repr, positional), *(f"{key}={value!r}" for key, value in fields.items())])
            raise CommandError(
                f"{option} {name}: {error}; its arguments are {signature}, called with ({given}). Give others as "
                f"{setter} NAME=VALUE, or name a function that needs none"
            ) from error
    try:
        return found(*positional, **fields)
    except Exception as error:
        raise CommandError(f"{option} {name}: calling it failed: {_told(error)}") from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _kind(value: object) -> str:
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    return f"the class {name}" if isinstance(value, type) else f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"
