"""Processes of a distributed run, forked from one that has imported what they need, so that starting costs nothing."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

NEEDED = ("torch.distributed.fsdp", "accelerate", "sklearn.datasets", "bitstrata.cli.pipeline")


def start(run: Callable[..., None], *args: Any, ranks: int = 2) -> None:
    """run(rank, *args) in a process of its own for each rank; raises what one of them raises."""
    found = [name for name in NEEDED if importlib.util.find_spec(name.partition(".")[0]) is not None]
    multiprocessing.set_forkserver_preload(found)  # the server is started by the first call, and serves the others
    mp.start_processes(run, args=args, nprocs=ranks, start_method="forkserver")
