"""What one rank of a distributed run does, and one process with the joined batches; importable by spawned processes."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bitstrata as bs
from bitstrata import data, recipes
from bitstrata.train import TrainConfig, Trainer

SPLIT = (6, 4)  # samples on each rank: shares may differ

RECIPES: dict[str, Callable[[], recipes.Recipe]] = {
    "strata": lambda: recipes.strata((1, 2, 4)),
    "mgd": lambda: recipes.strata((1, 2, 4)),
    "lsq": lambda: recipes.lsq(3, numel="batch"),
    "lsq_plus": lambda: recipes.lsq_plus(3),
    "maqd": recipes.maqd,
}


class Net(nn.Module):
    """Three convolutions, a residual, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.norm3 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.conv1(x)))
        x = self.relu2(self.norm2(self.conv2(x)) + x)
        x = self.relu3(self.norm3(self.conv3(x)))
        return self.head(x.mean((2, 3)))


def batch() -> tuple[Tensor, Tensor]:
    """The joined batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(sum(SPLIT), 3, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 5, (sum(SPLIT),), generator=generator)


def quantized(kind: str) -> nn.Module:
    """In float64, so that codes do not flip where sums are taken in another order."""
    torch.manual_seed(1)
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bs.quantize_(model, RECIPES[kind](), batch()[0][:2].float())
    return model.double()


def share(x: Tensor, rank: int, world: int) -> Tensor:
    return x if world == 1 else x.split(SPLIT)[rank]


def steps(kind: str, rank: int, world: int) -> dict[str, Any]:
    """Calibration and two steps of SGD; the states after each."""
    model = bs.synchronize_(quantized(kind))
    x, y = (share(t, rank, world) for t in batch())
    if kind != "lsq_plus":  # its steps come from the first training batch
        bs.calibrate_(model, [x, 0.5 * x])
    states = [copied(model.state_dict())]
    runner = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        result = bs.joint_backward(runner, x, y, combine="mgd" if kind == "mgd" else "scalarization")
        optimizer.step()
        states.append(copied(model.state_dict()))
    return {"states": states, "alphas": {p: r.alpha for p, r in result.items()}}


def accumulated(rank: int, world: int) -> dict[str, Tensor]:
    """Gradients of two batches, of which the first is not exchanged by itself."""
    model = bs.synchronize_(quantized("strata"))
    x, y = (share(t, rank, world) for t in batch())
    runner: Any = DistributedDataParallel(model) if world > 1 else model
    bs.calibrate_(model, [x])
    if world > 1:
        with runner.no_sync():
            bs.joint_backward(runner, x, y)
    else:
        bs.joint_backward(runner, x, y)
    bs.joint_backward(runner, 0.7 * x, y)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fully_sharded(rank: int, world: int) -> dict[str, Tensor]:
    """Gradients of a joint step with sharded parameters, gathered."""
    model = bs.synchronize_(quantized("strata"))
    x, y = (share(t, rank, world) for t in batch())
    bs.calibrate_(model, [x])
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in (model.conv2, model.conv3):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    for _ in range(2):  # gradients accumulate
        bs.joint_backward(model, x, y)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


class Double(data.Loader):
    """Batches in float64."""

    def _make(self, *args: Any) -> tuple[Tensor, Tensor]:
        images, labels = super()._make(*args)
        return images.double(), labels


def images(n: int) -> data.ArrayDataset:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (n, 3, 6, 6), generator=generator, dtype=torch.uint8)
    return data.ArrayDataset(
        images=pixels,
        labels=pixels.float().mean((1, 2, 3)).argsort().argsort() * 5 // n,
        classes=tuple("abcde"),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        split="train",
    )


def trainer(out: Path | None, batch_size: int) -> Trainer:
    """Two epochs of 45 images, whose last batch is shorter; 23 images of evaluation."""
    augment = data.Compose((data.RandomCrop(6, 1), data.RandomHorizontalFlip()))
    train = Double(images(45), batch_size, train=True, transform=augment, seed=3, prefetch=False)
    test = Double(images(23), 4, train=False, prefetch=False)
    config = TrainConfig(epochs=2, lr=0.05, batch_size=batch_size, checkpoint_every=1, log_every=1, threads=1)
    return Trainer(bs.calibrate_(quantized("strata"), [batch()[0]]), config, train, test, out)


class Stop(Exception):
    """What ends a run in the middle."""


def trained(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """A run in one go, and one that stops after three steps and goes on."""
    whole = trainer(folder / f"whole{world}", 8 // world)
    accuracy = whole.fit()
    broken = trainer(folder / f"broken{world}", 8 // world)
    step, done = broken._step, []

    def stopping(*args: Any) -> Any:
        if len(done) == 3:
            raise Stop
        done.append(None)
        return step(*args)

    broken._step = stopping  # type: ignore[method-assign]
    try:
        broken.fit()
    except Stop:
        pass
    again = trainer(folder / f"broken{world}", 8 // world)
    again.fit()
    return {
        "state": copied(whole.model.state_dict()),
        "resumed": copied(again.model.state_dict()),
        "accuracy": accuracy,
        "types": sorted({type(m).__name__ for m in whole.model.modules()}),
    }


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def everything(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """All that is compared."""
    return {
        **{kind: steps(kind, rank, world) for kind in RECIPES},
        "accumulated": accumulated(rank, world),
        "sharded": fully_sharded(rank, world),
        "trained": trained(folder, rank, world),
    }


def run(rank: int, world: int, folder: str, port: int) -> None:
    """One rank; its results go to RANK.pt."""
    torch.set_num_threads(1)
    if "lo" in {name for _, name in socket.if_nameindex()}:  # needs no name of this machine to resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    where = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{where}/meeting", rank=rank, world_size=world)
    try:
        torch.save(everything(rank, world, where), where / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
