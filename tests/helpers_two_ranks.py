"""What one rank of a distributed run does, and one process with the joined batches; importable by spawned processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import bitstrata as bs
from bitstrata import data, recipes
from bitstrata.cli import main
from bitstrata.functional.ranks import gather_rows
from bitstrata.train import TrainConfig, Trainer
from bitstrata.train.distributed import Distributed
from bitstrata.train.signals import TrainingStopped
from bitstrata.train.source import as_source

SPLIT = (6, 4)  # samples on each rank: shares may differ

RECIPES: dict[str, Callable[[], recipes.Recipe]] = {
    "strata": lambda: recipes.strata((1, 2, 4)),
    "mgd": lambda: recipes.strata((1, 2, 4)),
    "sampled": lambda: recipes.strata((1, 2, 4)),
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
    sampler = bs.PrecisionSampler(bs.precisions(model), "pair" if kind == "sampled" else "all")
    for step in range(2):
        optimizer.zero_grad()
        combine = "mgd" if kind == "mgd" else "scalarization"
        result = bs.joint_backward(runner, x, y, combine=combine, precisions=sampler.at(step))
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


def fully_sharded(rank: int, world: int) -> dict[str, Any]:
    """Gradients of a joint step with sharded parameters, the weights after it, gathered, and what the Trainer says."""
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
    gradients = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}
    torch.optim.SGD(model.parameters(), 0.1).step()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = copied(get_model_state_dict(model, options=whole) if world > 1 else model.state_dict())
    if state:  # the first rank's
        quantized("strata").load_state_dict(state)
    refusal = ""
    if world > 1:
        try:
            Trainer(model, TrainConfig(epochs=1, lr=0.1, batch_size=4), [(x, y)])
        except ValueError as error:
            refusal = str(error)
    return {"gradients": gradients, "state": state, "refusal": refusal}


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
    """Two epochs of 29 images, whose last batch is shorter; 23 images of evaluation."""
    augment = data.Compose((data.RandomCrop(6, 1), data.RandomHorizontalFlip()))
    train = Double(images(29), batch_size, train=True, transform=augment, seed=3, prefetch=False)
    test = Double(images(23), 8, train=False, prefetch=False)
    config = TrainConfig(epochs=2, lr=0.05, batch_size=batch_size, checkpoint_every=1, log_every=1, threads=1)
    return Trainer(bs.calibrate_(quantized("strata"), [batch()[0]]), config, train, test, out)


def trained(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """A run in one go, and one of which the last rank is asked to stop in the third step, and that goes on."""
    whole = trainer(folder / f"whole{world}", 8 // world)
    accuracy = whole.fit()
    broken = trainer(folder / f"broken{world}", 8 // world)
    step, done = broken._step, []

    def stopping(*args: Any) -> Any:
        done.append(None)
        if len(done) == 3 and rank == world - 1:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    broken._step = stopping  # type: ignore[method-assign]
    with contextlib.suppress(TrainingStopped):
        broken.fit()
    again = trainer(folder / f"broken{world}", 8 // world)
    again.fit()
    return {
        "state": copied(whole.model.state_dict()),
        "resumed": copied(again.model.state_dict()),
        "stopped": broken.position.step,
        "accuracy": accuracy,
        "types": sorted({type(m).__name__ for m in whole.model.modules()}),
    }


class Bad(Double):
    """Something not finite in the second batch of the last rank."""

    def _make(self, order: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        images, labels = super()._make(order, epoch, step)
        if step == 1 and self.rank == self.ranks - 1:
            images[0, 0, 0, 0] = torch.nan
        return images, labels


def not_finite(world: int) -> str:
    """What a run says of such a batch."""
    loader = Bad(images(32), 8 // world, train=True, prefetch=False)
    model = bs.calibrate_(quantized("strata"), [batch()[0]])
    try:
        Trainer(model, TrainConfig(epochs=1, lr=0.05, batch_size=8 // world, threads=1), loader).fit()
    except FloatingPointError as error:
        return str(error)
    return ""


def normalized(rank: int, world: int) -> dict[str, Tensor]:
    """Results, gradients and statistics of batch normalizations by themselves, with the options that they have."""
    x, upstream = (share(t, rank, world) for t in torch.randn(2, 10, 4, 3, generator=torch.Generator().manual_seed(4)))
    norms = {
        "plain": nn.BatchNorm1d(4),
        "cumulative": nn.BatchNorm1d(4, momentum=None, affine=False),
        "untracked": nn.BatchNorm1d(4, track_running_stats=False),
        "double": nn.BatchNorm1d(4).double(),
        "images": nn.BatchNorm2d(4),
        "bfloat16": nn.BatchNorm1d(4),
    }
    found: dict[str, Tensor] = {}
    for name, norm in norms.items():
        bs.synchronize_(norm)
        mine, above = (t.double() if name == "double" else t for t in (x, upstream))
        if name == "images":
            mine, above = mine[:, :, :, None], above[:, :, :, None]
        mine = (mine.bfloat16() if name == "bfloat16" else mine).clone().requires_grad_()
        for _ in range(2):
            y = norm(mine)
        (y * above).sum().backward()
        whole = [y.detach(), mine.grad]
        if world > 1:
            whole = [gather_rows(t) for t in whole]
            for p in norm.parameters():
                dist.all_reduce(p.grad)
        found |= {f"{name}.y": whole[0], f"{name}.dx": whole[1]}
        found |= {f"{name}.{key}": value for key, value in norm.named_buffers()}
        found |= {f"{name}.d{key}": p.grad for key, p in norm.named_parameters()}
    return found


def refused(world: int) -> str:
    """What calibration says when ranks come with different numbers of batches."""
    model = bs.synchronize_(quantized("strata"))
    try:
        bs.calibrate_(model, [batch()[0]] * (1 + int(world > 1 and dist.get_rank())))
    except ValueError as error:
        return str(error)
    return ""


def dealt(rank: int, world: int) -> list[list[int]]:
    """What accelerate deals out of a shuffled DataLoader, epochs 0, 1 and 0 again."""
    loader = DataLoader(TensorDataset(torch.arange(12)), 2, shuffle=True)
    source = as_source(Distributed().share(loader, 7), 7)
    return [[int(i) for (part,) in source.epoch(epoch) for i in part] for epoch in (0, 1, 0)]


COMMAND = (
    "train --data digits --model digits_cnn --bits 1,2 --float-epochs 1 --epochs 1 --lr 0.05 --batch-size 16 "
    "--train-limit 96 --test-limit 24 --calibration-batches 1 --verify-images 2 --threads 1"
)


def commanded(folder: Path, world: int) -> int:
    """`bitstrata train`, on several ranks."""
    return main([*COMMAND.split(), "--out", str(folder / "command")]) if world > 1 else 0


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def everything(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """All that is compared."""
    return {
        **{kind: steps(kind, rank, world) for kind in RECIPES},
        "accumulated": accumulated(rank, world),
        "sharded": fully_sharded(rank, world),
        "trained": trained(folder, rank, world),
        "normalized": normalized(rank, world),
        "refused": refused(world),
        "not finite": not_finite(world),
        "dealt": dealt(rank, world),
        "commanded": commanded(folder, world),
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
