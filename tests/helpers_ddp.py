"""A process of a small distributed run of a model that trains in integers; importable by the processes it spawns."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitstrata.prepare.integer_training import integer_


class Small(nn.Module):
    """An LSTM and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(4, 6, batch_first=True)
        self.hidden = nn.Linear(6, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(self.memory(x)[0][:, -1]).relu())


def shard(rank: int) -> Tensor:
    """The batch of a process."""
    return torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(rank))


def small(seed: int) -> Small:
    """The same weights for every seed; the seed is that of rounding."""
    torch.manual_seed(0)
    model = Small()
    integer_(model, shard(0), seed=seed)
    return model


def run(rank: int, world: int, folder: str) -> None:
    """Three steps of SGD; saves the first step's gradients and the parameters at the end."""
    torch.set_num_threads(1)
    where = Path(folder)
    if "lo" in {name for _, name in socket.if_nameindex()}:  # needs no name of this machine to resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{where}/meeting", rank=rank, world_size=world)
    try:
        torch.save(trained(rank), where / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def trained(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """The first step's gradients, and the parameters.

    In a function of its own, so that the model is gone before its process group: torch can hang where a model frees the
    group, as it then waits, with the interpreter's lock, for a thread that needs the lock.
    """
    model = DistributedDataParallel(small(rank))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first: list[Tensor] = []
    for _ in range(3):
        optimizer.zero_grad()
        model(shard(rank)).square().sum().backward()
        first = first or [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return first, [p.detach() for p in model.parameters()]
